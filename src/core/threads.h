// The threads that carry out a step together.
//
// Workers enter once per step and stay until its end. A step is a row of *phases*; each phase is a
// number of chunks that may run in any order, and a phase starts when the one before it is done.
// Every thread has a share of successive chunks, as neighbours in memory are best read by one core.
// Who is done with it takes of the shares of others, so that a phase is finished by whoever is
// running: a worker whose core was taken away delays only the chunk it holds, never a barrier it
// has not reached. A worker that waits for a phase to start holds none.
//
// Every thread must walk through the same phases with the same chunk counts.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace smolrun {

class Worker;

class Team {
  public:
    explicit Team(int threads);  // this thread included, at least 1
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int threads() const { return threads_; }

    // False in a forked child: the workers stayed in the parent. run() must not be called there.
    bool alive() const;

    // body(worker) on every thread, this one included. Returns when all phases are done and no
    // thread is inside any more; rethrows the first exception that a body threw.
    template <class Body>
    void run(Body&& body) {
        run_step(
            [](void* context, Worker& worker) {
                (*static_cast<std::remove_reference_t<Body>*>(context))(worker);
            },
            &body);
    }

  private:
    friend class Worker;
    using Entry = void (*)(void* context, Worker& worker);

    void run_step(Entry entry, void* context);
    void work(int index);  // a worker thread's life
    void stop();
    void carry_out(int index) noexcept;
    void fail(std::exception_ptr error) noexcept;
    bool is_open(uint32_t phase) const {
        return completed_.load(std::memory_order_relaxed) >= phase;
    }
    void await_phase(uint32_t phase) const;

    // The first chunk of a thread's share.
    int64_t share_begin(int64_t chunks, int index) const { return chunks * index / threads_; }
    // A chunk of a phase that is open, of the thread's own share where there is one left; or -1.
    int64_t take(uint32_t phase, int64_t chunks, int index);

    void finish(uint32_t phase, int64_t chunks, int64_t phase_end);

    const int threads_;
    const unsigned forks_;  // how often this process had been forked from another at the start
    const int spins_;       // checks of a changed value before sleeping
    std::vector<std::thread> workers_;

    // How many chunks of a thread's share are taken, below the number of the phase plus 1.
    struct alignas(128) Share {
        std::atomic<uint64_t> taken{0};
    };
    std::vector<Share> shares_;  // [threads]

    // The step in progress. Written by the caller of run() while the gate is shut.
    Entry entry_ = nullptr;
    void* context_ = nullptr;
    std::mutex error_mutex_;
    std::exception_ptr error_;

    // Each on its own cache lines: they are written by different threads at different times.
    alignas(128) std::atomic<uint32_t> epoch_{0};      // bell: changes when a step starts
    alignas(128) std::atomic<uint32_t> gate_{0};       // open bit, and how many workers are inside
    alignas(128) std::atomic<int64_t> done_{0};        // chunks of the step that are finished
    alignas(128) std::atomic<uint32_t> completed_{0};  // phases of the step that are finished
    std::atomic<bool> stopping_{false};
};

// One thread's place in a step.
class Worker {
  public:
    Worker(Team& team, int index) : team_(team), index_(index) {}

    int index() const { return index_; }
    int threads() const { return team_.threads(); }
    int64_t chunks_done() const { return chunks_done_; }  // by this thread, in this step

    // The next phase: work(chunk) for every chunk in [0, chunks), each by one of the threads.
    template <class Work>
    void phase(int64_t chunks, Work&& work) {
        phase(chunks, [] { return false; }, [](int64_t) {}, work);
    }

    // Likewise. `meanwhile` is called while the phase before is not done, until it returns false,
    // and should return soon; `prepare`, once on each thread that gets a chunk, before its first.
    template <class Meanwhile, class Prepare, class Work>
    void phase(int64_t chunks, Meanwhile&& meanwhile, Prepare&& prepare, Work&& work) {
        if (chunks <= 0) return;
        while (!team_.is_open(phase_) && meanwhile()) {
        }
        team_.await_phase(phase_);
        int64_t finished = 0;
        for (int64_t chunk = take(chunks); chunk >= 0; chunk = take(chunks)) {
            if (finished == 0) prepare(chunk);
            work(chunk);
            ++finished;
        }
        end_ += chunks;
        if (finished > 0) team_.finish(phase_, finished, end_);
        chunks_done_ += finished;
        ++phase_;
    }

    // The first chunk that this thread will take of a phase, unless another is ahead of it.
    int64_t first_chunk(int64_t chunks) const { return team_.share_begin(chunks, index_); }

  private:
    friend class Team;

    int64_t take(int64_t chunks) const { return team_.take(phase_, chunks, index_); }

    Team& team_;
    const int index_;
    int64_t end_ = 0;  // chunks of the phases so far
    uint32_t phase_ = 0;
    int64_t chunks_done_ = 0;
};

}  // namespace smolrun
