// When each thread finished each operation of a step.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

namespace smolrun {

// One step's times, in nanoseconds after its start. Filled while the step runs, each row by its
// own thread.
class Profile {
  public:
    static constexpr int64_t kNoPart = -1;  // the thread got no chunk of this operation

    void start(int threads, size_t operations) {
        ends_.assign(static_cast<size_t>(threads), std::vector<int64_t>(operations, kNoPart));
        nanoseconds_ = 0;
        started_ = Clock::now();
    }
    void finished(int thread, size_t operation) {
        ends_[static_cast<size_t>(thread)][operation] = now();
    }
    void stop() { nanoseconds_ = now(); }

    const std::vector<std::vector<int64_t>>& ends() const { return ends_; }  // [thread][operation]
    int64_t nanoseconds() const { return nanoseconds_; }                     // the whole step

  private:
    using Clock = std::chrono::steady_clock;
    int64_t now() const {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - started_)
            .count();
    }

    Clock::time_point started_;
    std::vector<std::vector<int64_t>> ends_;
    int64_t nanoseconds_ = 0;
};

}  // namespace smolrun
