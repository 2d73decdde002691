// The threads that carry out a step together.
//
// Workers enter once per step and stay until its end. A step is a row of *phases*; each phase is a
// number of chunks that may run in any order, and a phase starts when the one before it is done.
// Every thread has a share of successive chunks, as neighbours in memory are best read by one core.
// Who is done with it takes of the shares of others, so that a phase is finished by whoever is
// running: a worker whose core was taken away delays only the chunk it holds, never a barrier it
// has not reached. A worker that waits for a phase to start holds none.
//
// Of a *chain* of phases, in which a chunk needs only what the same share's chunks of earlier
// phases made, every thread carries out its own share first, waiting for nobody, and then helps
// others.
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

    // The first chunk of a thread's share.
    int64_t share_begin(int64_t chunks, int index) const { return chunks * index / threads_; }
    // A chunk of a thread's share of a phase, or -1: none is left.
    int64_t take(uint32_t phase, int64_t chunks, int share);

    // Whether `chunks` chunks of a share are done, over all phases of the step.
    bool is_done(int share, uint32_t chunks) const {
        return done_of(share).load(std::memory_order_relaxed) >= chunks;
    }
    void await_done(int share, uint32_t chunks) const;
    // `chunks` more are done; those who wait for `all` of them hear of it.
    void finish(int share, uint32_t chunks, uint32_t all);
    const std::atomic<uint32_t>& done_of(int share) const {
        return shares_[static_cast<size_t>(share)].done;
    }

    const int threads_;
    const unsigned forks_;  // how often this process had been forked from another at the start
    const int spins_;       // checks of a changed value before sleeping
    std::vector<std::thread> workers_;

    struct Share {
        // How many of its chunks are taken, below the number of the phase plus 1.
        alignas(128) std::atomic<uint64_t> taken{0};
        // How many are done, of all phases of the step; kFailed and more where the step failed.
        alignas(128) std::atomic<uint32_t> done{0};
    };
    std::vector<Share> shares_;  // [threads]

    // The step in progress. Written by the caller of run() while the gate is shut.
    Entry entry_ = nullptr;
    void* context_ = nullptr;
    std::mutex error_mutex_;
    std::exception_ptr error_;

    // Each on its own cache lines: they are written by different threads at different times.
    alignas(128) std::atomic<uint32_t> epoch_{0};  // bell: changes when a step starts
    alignas(128) std::atomic<uint32_t> gate_{0};   // open bit, and how many workers are inside
    std::atomic<bool> stopping_{false};
};

// One thread's place in a step.
class Worker {
  public:
    Worker(Team& team, int index)
        : team_(team), index_(index), ends_(static_cast<size_t>(team.threads())) {}

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
        if (alone_) {
            team_.await_done(index_, ends_[static_cast<size_t>(index_)]);
        } else {
            while (!are_done() && meanwhile()) {
            }
            await_all();
        }
        bool prepared = false;
        for (int i = 0; i < (alone_ ? 1 : threads()); ++i) {
            const int share = index_ + i < threads() ? index_ + i : index_ + i - threads();
            uint32_t finished = 0;
            for (int64_t chunk = take(chunks, share); chunk >= 0; chunk = take(chunks, share)) {
                if (!prepared) prepare(chunk);
                prepared = true;
                work(chunk);
                ++finished;
            }
            if (finished == 0) continue;
            team_.finish(share, finished, end_of(share, chunks));
            chunks_done_ += finished;
        }
        for (int share = 0; share < threads(); ++share) {
            ends_[static_cast<size_t>(share)] = end_of(share, chunks);
        }
        ++phase_;
    }

    // The phases of walk(), a chain. It is called twice where another thread is behind.
    template <class Walk>
    void chain(Walk&& walk) {
        await_all();
        const uint32_t first = phase_;
        const std::vector<uint32_t> before = ends_;
        alone_ = true;
        walk();
        alone_ = false;
        if (are_done()) return;
        phase_ = first;
        ends_ = before;
        walk();
    }

    // The first chunk that this thread will take of a phase, unless another is ahead of it.
    int64_t first_chunk(int64_t chunks) const { return team_.share_begin(chunks, index_); }

  private:
    friend class Team;

    int64_t take(int64_t chunks, int share) const { return team_.take(phase_, chunks, share); }
    // What a share has done after a phase of so many chunks.
    uint32_t end_of(int share, int64_t chunks) const {
        const int64_t size =
            team_.share_begin(chunks, share + 1) - team_.share_begin(chunks, share);
        return ends_[static_cast<size_t>(share)] + static_cast<uint32_t>(size);
    }
    // Whether the phases so far are done.
    bool are_done() const {
        for (int share = 0; share < threads(); ++share) {
            if (!team_.is_done(share, ends_[static_cast<size_t>(share)])) return false;
        }
        return true;
    }
    void await_all() const {
        for (int share = 0; share < threads(); ++share) {
            team_.await_done(share, ends_[static_cast<size_t>(share)]);
        }
    }

    Team& team_;
    const int index_;
    std::vector<uint32_t> ends_;  // [share], chunks of the phases so far
    uint32_t phase_ = 0;
    bool alone_ = false;  // whether only its own share is carried out
    int64_t chunks_done_ = 0;
};

}  // namespace smolrun
