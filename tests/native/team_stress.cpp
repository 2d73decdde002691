// Drives a Team through many short phases; built with -fsanitize=thread by test_threads.py.
// Ends with 0, or says what went wrong.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "threads.h"

namespace {

constexpr int kPhases = 30;

// Every value must have been raised once by every phase before the next one reads it: a phase that
// starts too early sees unequal values, and ThreadSanitizer sees the race.
bool phases_are_ordered(smolrun::Team& team, int steps) {
    std::vector<int64_t> values(211);
    for (int step = 0; step < steps; ++step) {
        std::atomic<int> wrong{0};
        team.run([&](smolrun::Worker& worker) {
            for (int phase = 0; phase < kPhases; ++phase) {
                const int64_t chunks = 1 + phase % 13;
                int calls = 0, prepared = 0, mine = 0;
                int64_t first = -1;
                worker.phase(
                    chunks,
                    [&] {
                        if (prepared != 0) ++wrong;  // it is for the time before
                        return ++calls < 3;
                    },
                    [&](int64_t chunk) {
                        ++prepared;
                        first = chunk;
                    },
                    [&](int64_t chunk) {
                        if (prepared != 1 || (mine++ == 0 && chunk != first)) ++wrong;
                        for (const int64_t value : values) {
                            if (value != step * kPhases + phase) ++wrong;
                        }
                    });
                if (calls > 3) ++wrong;
                worker.phase(0, [&](int64_t) { ++wrong; });
                worker.phase(chunks, [&](int64_t chunk) {
                    for (size_t i = static_cast<size_t>(chunk); i < values.size();
                         i += static_cast<size_t>(chunks)) {
                        ++values[i];
                    }
                });
            }
        });
        if (wrong != 0 || values[0] != (step + 1) * kPhases) return false;
    }
    return true;
}

// In a chain the same holds of the values of a share, for a phase that reads all of them.
bool chains_are_ordered(smolrun::Team& team, int steps) {
    constexpr int64_t kChunksOfShare = 5;
    const int64_t chunks = kChunksOfShare * team.threads();
    std::vector<int64_t> values(static_cast<size_t>(chunks));
    int64_t raised = 0;
    for (int step = 0; step < steps; ++step) {
        std::atomic<int> wrong{0};
        team.run([&](smolrun::Worker& worker) {
            for (int chain = 0; chain < 5; ++chain) {
                const int64_t before = raised + chain * kPhases;
                worker.chain([&] {
                    for (int phase = 0; phase < kPhases; ++phase) {
                        worker.phase(chunks, [&](int64_t chunk) {
                            const int64_t first = chunk / kChunksOfShare * kChunksOfShare;
                            for (int64_t i = first; i < first + kChunksOfShare; ++i) {
                                if (values[static_cast<size_t>(i)] != before + phase) ++wrong;
                            }
                        });
                        worker.phase(chunks,
                                     [&](int64_t chunk) { ++values[static_cast<size_t>(chunk)]; });
                    }
                });
                worker.phase(2, [&](int64_t) {
                    for (const int64_t value : values) {
                        if (value != before + kPhases) ++wrong;
                    }
                });
            }
        });
        raised += 5 * kPhases;
        if (wrong != 0) return false;
    }
    return true;
}

// A thread that is held up in a chain does not do its share alone.
bool chains_are_helped(smolrun::Team& team) {
    int helped = 0;
    for (int step = 0; step < 50; ++step) {
        std::vector<int> by(8, -1);
        team.run([&](smolrun::Worker& worker) {
            worker.chain([&] {
                worker.phase(8, [&](int64_t chunk) {
                    by[static_cast<size_t>(chunk)] = worker.index();
                    if (chunk == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
                });
            });
        });
        helped += by[0] != by[3];
    }
    return helped > 0;
}

// An exception on any thread ends the step for all, and the team goes on.
bool exceptions_come_out(smolrun::Team& team) {
    int caught = 0;
    for (int step = 0; step < 40; ++step) {
        const auto walk = [&](smolrun::Worker& worker) {
            for (int phase = 0; phase < 10; ++phase) {
                worker.phase(8, [&](int64_t chunk) {
                    if (phase == step % 10 && chunk == step % 8) throw std::runtime_error("");
                });
            }
        };
        try {
            team.run([&](smolrun::Worker& worker) {
                step % 3 == 0 ? worker.chain([&] { walk(worker); }) : walk(worker);
            });
        } catch (const std::runtime_error&) {
            ++caught;
        }
    }
    return caught == 40;
}

// A thread takes the chunks of its share in order, and only then those of others.
bool shares_come_first(smolrun::Team& team, int steps) {
    constexpr int64_t kChunks = 37;
    bool right = true;
    for (int step = 0; step < steps; ++step) {
        std::vector<std::vector<int64_t>> taken(static_cast<size_t>(team.threads()));
        team.run([&](smolrun::Worker& worker) {
            worker.phase(kChunks, [&](int64_t chunk) {
                taken[static_cast<size_t>(worker.index())].push_back(chunk);
            });
        });
        int64_t all = 0;
        for (int64_t thread = 0; thread < team.threads(); ++thread) {
            const int64_t begin = kChunks * thread / team.threads();
            const int64_t end = kChunks * (thread + 1) / team.threads();
            int64_t last = begin - 1;
            bool others = false;
            for (const int64_t chunk : taken[static_cast<size_t>(thread)]) {
                const bool own = begin <= chunk && chunk < end;
                if (own && (others || chunk <= last)) right = false;
                if (own) last = chunk;
                others = others || !own;
                ++all;
            }
        }
        right = right && all == kChunks;
    }
    return right;
}

// Whoever ends a phase can go on with the next one by itself. A thread that took a chunk of it
// beforehand would hold the others up until the system lets it run again.
bool waiting_threads_hold_nothing(smolrun::Team& team) {
    int went_on = 0;
    for (int step = 0; step < 50; ++step) {
        int first = -1, second = -1;
        team.run([&](smolrun::Worker& worker) {
            worker.phase(1, [&](int64_t) {
                // Long enough for the others to come to the next phase and to fall asleep.
                std::this_thread::sleep_for(std::chrono::milliseconds(2));
                first = worker.index();
            });
            worker.phase(1, [&](int64_t) { second = worker.index(); });
        });
        went_on += first == second;
    }
    return went_on > 0;
}

}  // namespace

int main(int argc, char** argv) {
    const int steps = argc > 1 ? std::atoi(argv[1]) : 20;
    for (const int threads : {1, 2, 3, 8}) {
        smolrun::Team team(threads);
        if (!phases_are_ordered(team, steps) || !exceptions_come_out(team) ||
            !phases_are_ordered(team, steps) || !shares_come_first(team, 100) ||
            !chains_are_ordered(team, steps)) {
            std::printf("%d threads: wrong\n", threads);
            return 1;
        }
    }
    smolrun::Team two(2);  // of more, one that was waiting is often the quicker
    if (!waiting_threads_hold_nothing(two)) {
        std::printf("a waiting thread holds a chunk\n");
        return 1;
    }
    if (!chains_are_helped(two)) {
        std::printf("a thread that is held up gets no help\n");
        return 1;
    }
    for (int i = 0; i < 50; ++i) smolrun::Team(4);  // never used
    return 0;
}
