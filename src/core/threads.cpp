#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <cfenv>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

namespace smolrun {
namespace {

constexpr uint32_t kOpen = uint32_t{1} << 31;
constexpr uint32_t kFailed = uint32_t{1} << 31;
constexpr uint64_t kNoneLeft = std::numeric_limits<uint64_t>::max();

// Some 20 to 50 microseconds: longer than a phase usually keeps anyone waiting, shorter than what
// anybody would miss. With more threads than cores, spinning only takes time from the others.
constexpr int kSpins = 1000;

// Thrown to leave a step that has failed on another thread.
struct StepFailed {};

std::atomic<unsigned> fork_count{0};

void count_forks() {
    static const bool registered = [] {
        pthread_atfork(nullptr, nullptr,
                       [] { fork_count.fetch_add(1, std::memory_order_relaxed); });
        return true;
    }();
    (void)registered;
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

// Waits until value is no longer `old`.
template <class T>
void await_change(const std::atomic<T>& value, T old, int spins) {
    for (int i = 0; i < spins; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    value.wait(old, std::memory_order_acquire);
}

// Signals belong to the interpreter's threads: its handlers must not run on ours.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

  private:
    sigset_t before_;
};

int spins_for(int threads) {
    const unsigned cores = std::thread::hardware_concurrency();
    return cores != 0 && static_cast<unsigned>(threads) > cores ? 1 : kSpins;
}

}  // namespace

Team::Team(int threads)
    : threads_(threads < 1 ? 1 : threads),
      forks_((count_forks(), fork_count.load(std::memory_order_relaxed))),
      spins_(spins_for(threads_)),
      shares_(static_cast<size_t>(threads_)) {
    const SignalsBlocked blocked;
    try {
        workers_.reserve(static_cast<size_t>(threads_ - 1));
        for (int i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error& error) {
        const size_t started = workers_.size() + 1;
        stop();
        throw std::runtime_error("the system lets this process start only " +
                                 std::to_string(started) + " of " + std::to_string(threads_) +
                                 " threads (" + error.what() + "); ask for fewer");
    }
}

Team::~Team() { stop(); }

bool Team::alive() const { return forks_ == fork_count.load(std::memory_order_relaxed); }

void Team::stop() {
    if (!alive()) {
        // The threads do not exist in this process: joining would wait for ever, and a joinable
        // std::thread must not be destroyed. So the handles are leaked.
        new std::vector<std::thread>(std::move(workers_));
        return;
    }
    stopping_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
}

void Team::work(int index) {
    // A thread inherits how its maker rounds, which some other library may have changed.
    std::fesetenv(FE_DFL_ENV);
    uint32_t seen = 0;
    while (true) {
        await_change(epoch_, seen, spins_);
        seen = epoch_.load(std::memory_order_acquire);
        if (stopping_.load(std::memory_order_relaxed)) return;

        // A worker that wakes after the step is over finds the gate shut and never looks inside.
        uint32_t inside = gate_.load(std::memory_order_relaxed);
        while ((inside & kOpen) != 0 &&
               !gate_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire,
                                            std::memory_order_relaxed)) {
        }
        if ((inside & kOpen) == 0) continue;

        carry_out(index);
        if (gate_.fetch_sub(1, std::memory_order_release) == 1) gate_.notify_all();
    }
}

void Team::run_step(Entry entry, void* context) {
    entry_ = entry;
    context_ = context;
    error_ = nullptr;
    for (Share& share : shares_) {
        share.taken.store(0, std::memory_order_relaxed);
        share.done.store(0, std::memory_order_relaxed);
    }
    if (threads_ > 1) {
        gate_.store(kOpen, std::memory_order_release);
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
    }

    carry_out(0);

    if (threads_ > 1) {
        uint32_t inside = gate_.fetch_and(~kOpen, std::memory_order_acquire) & ~kOpen;
        while (inside != 0) {
            await_change(gate_, inside, spins_);
            inside = gate_.load(std::memory_order_acquire);
        }
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Team::carry_out(int index) noexcept {
    try {
        Worker worker(*this, index);
        entry_(context_, worker);
        worker.await_all();
    } catch (const StepFailed&) {
    } catch (...) {
        fail(std::current_exception());
    }
}

void Team::fail(std::exception_ptr error) noexcept {
    {
        const std::lock_guard<std::mutex> lock(error_mutex_);
        if (!error_) error_ = std::move(error);
    }
    for (Share& share : shares_) share.taken.store(kNoneLeft, std::memory_order_relaxed);
    for (Share& share : shares_) {
        // A read and write, not a store: a store may still be on its way when notify_all() looks
        // for sleepers, and a thread that falls asleep in between would never be woken.
        share.done.fetch_or(kFailed, std::memory_order_acq_rel);
        share.done.notify_all();
    }
}

void Team::await_done(int share, uint32_t chunks) const {
    const std::atomic<uint32_t>& of_share = done_of(share);
    uint32_t done = of_share.load(std::memory_order_acquire);
    while (done < chunks) {
        await_change(of_share, done, spins_);
        done = of_share.load(std::memory_order_acquire);
    }
    if (done >= kFailed) throw StepFailed();
}

int64_t Team::take(uint32_t phase, int64_t chunks, int share) {
    const uint64_t none = (uint64_t{phase} + 1) << 32;
    const int64_t begin = share_begin(chunks, share);
    const int64_t left = share_begin(chunks, share + 1) - begin;
    std::atomic<uint64_t>& of_share = shares_[static_cast<size_t>(share)].taken;
    uint64_t seen = of_share.load(std::memory_order_relaxed);
    while (true) {
        // Of a later phase more than `left`.
        const uint64_t taken = std::max(seen, none) - none;
        if (taken >= static_cast<uint64_t>(left)) return -1;
        if (of_share.compare_exchange_weak(seen, none + taken + 1, std::memory_order_relaxed)) {
            return begin + static_cast<int64_t>(taken);
        }
    }
}

void Team::finish(int share, uint32_t chunks, uint32_t all) {
    std::atomic<uint32_t>& done = shares_[static_cast<size_t>(share)].done;
    if (done.fetch_add(chunks, std::memory_order_acq_rel) + chunks == all) done.notify_all();
}

}  // namespace smolrun
