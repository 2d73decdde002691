#include "ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "dispatch.h"
#include "kernels/probes.h"
#include "memory.h"
#include "program.h"
#include "threads.h"

namespace smolrun {
namespace {

// The team hands chunks out as it does in a step: a core that a neighbour slows gets fewer.
constexpr int64_t kChunksPerThread = 16;
constexpr int64_t kReadChunk = 1 << 20;
// Long enough that starting the team does not count; short enough that on a busy machine some
// samples have the cores to themselves, as some operations of a model have.
constexpr double kSampleSeconds = 0.003;
constexpr int64_t kMostReadBytes = int64_t{1} << 36;

const Probes& probes_of(std::string_view isa) {
    const Kernels& kernels = kernels_of(isa);  // checks the name, and that this CPU runs it
#ifdef SMOLRUN_X86
    for (const Probes* probes : {&kAvx2Probes, &kAvx512Probes}) {
        if (std::string_view(probes->name) == kernels.name) return *probes;
    }
#endif
    return kScalarProbes;
}

template <class Work>
double seconds_of(Team& team, int64_t chunks, Work&& work) {
    const auto begin = std::chrono::steady_clock::now();
    team.run([&](Worker& worker) { worker.phase(chunks, work); });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Rounds of a probe in a chunk that make a sample last long enough.
int64_t rounds_of(const ComputeProbe& probe, Team& team, int64_t chunks) {
    int64_t rounds = 1000;
    for (;;) {
        const double seconds = seconds_of(team, chunks, [&](int64_t) { probe.run(rounds); });
        if (seconds >= kSampleSeconds) return rounds;
        rounds *= seconds > kSampleSeconds / 8 ? 2 : 8;
    }
}

void check(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return;
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; expected " +
                                std::to_string(least) + " to " + std::to_string(most));
}

}  // namespace

std::vector<Ceiling> measure_ceilings(std::string_view isa, int threads, int samples,
                                      int64_t read_bytes) {
    const Probes& probes = probes_of(isa);
    check_threads(threads);
    check("samples", samples, 1, 1000);
    check("read_bytes", read_bytes, kReadChunk, kMostReadBytes);
    Team team(threads);

    const int64_t read_chunks = read_bytes / kReadChunk;
    // In huge pages, as weights are: small ones halve the rate of a virtual machine in bad moments.
    const AnonymousMemory memory(static_cast<size_t>(read_chunks * kReadChunk), Pages::huge);
    // Memory that nobody wrote to is one page of zeros, seen many times.
    seconds_of(team, read_chunks, [&](int64_t chunk) {
        std::memset(memory.data() + chunk * kReadChunk, 1, kReadChunk);
    });

    int64_t next_read = 0;  // goes on where the last one ended: what was read lately is in a cache
    const auto read = [&](int64_t chunks) {
        const double seconds = seconds_of(team, chunks, [&](int64_t chunk) {
            probes.read(memory.data() + (next_read + chunk) % read_chunks * kReadChunk, kReadChunk);
        });
        next_read = (next_read + chunks) % read_chunks;
        return seconds;
    };
    const int64_t sample_chunks =
        std::max(static_cast<int64_t>(threads),
                 static_cast<int64_t>(kSampleSeconds / read(read_chunks) * read_chunks));

    struct Source {
        const char* name;
        const ComputeProbe* probe;
        int64_t rounds;
    };
    const int64_t chunks = kChunksPerThread * threads;
    std::vector<Source> sources;
    std::vector<Ceiling> ceilings{{"read", {}}};
    for (const Source source : {Source{"f32", &probes.f32, 0}, Source{"int16", &probes.int16, 0},
                                Source{"int8", &probes.int8, 0}}) {
        sources.push_back({source.name, source.probe, rounds_of(*source.probe, team, chunks)});
        ceilings.push_back({source.name, {}});
    }
    for (int sample = 0; sample < samples; ++sample) {
        ceilings[0].rates.push_back(static_cast<double>(sample_chunks * kReadChunk) /
                                    read(sample_chunks));
        for (size_t i = 0; i < sources.size(); ++i) {
            const Source& source = sources[i];
            const double taken =
                seconds_of(team, chunks, [&](int64_t) { source.probe->run(source.rounds); });
            ceilings[i + 1].rates.push_back(
                static_cast<double>(source.rounds * chunks * source.probe->operations) / taken);
        }
    }
    return ceilings;
}

}  // namespace smolrun
