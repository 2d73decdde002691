// The probes of a vector instruction set, on what its *_probes.cpp says before: SMOLRUN_INLINE,
// kBytes (of a vector), load_bytes, fold_bytes and opaque (a value that the compiler must neither
// guess nor drop).
#pragma once

namespace smolrun {
namespace {

// Sums that do not wait for each other: a latency of 4 or 5 cycles at two a cycle.
constexpr int kSums = 12;

template <class Vector, class Step>
SMOLRUN_INLINE void accumulate(Vector start, int64_t rounds, Step&& step) {
    Vector sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = opaque(start);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) sums[i] = opaque(step(sums[i]));
    }
}

void read_all(const std::byte* data, int64_t bytes) {
    Bytes sums[4] = {load_bytes(data), load_bytes(data), load_bytes(data), load_bytes(data)};
    for (int64_t i = 0; i < bytes; i += 4 * kBytes) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            sums[j] = fold_bytes(sums[j], load_bytes(data + i + j * kBytes));
    }
    for (const Bytes& sum : sums) opaque(sum);
}

}  // namespace
}  // namespace smolrun
