#include <cstdint>

#include "kernels/probes.h"

namespace smolrun {
namespace {

// Enough independent sums that none waits for the one before it, at the width that the compiler
// vectorizes for the oldest CPU of this architecture.
constexpr int kSums = 32;

// Makes the compiler believe that everything in memory was read and changed.
inline void forget() { __asm__ volatile("" : : : "memory"); }
template <class T>
inline void forget(T* values) {
    __asm__ volatile("" : : "r"(values) : "memory");
}

void read(const std::byte* data, int64_t bytes) {
    uint64_t sums[4] = {};
    for (int64_t i = 0; i < bytes; i += 32) {
        for (int64_t j = 0; j < 4; ++j) {
            uint64_t value;
            __builtin_memcpy(&value, data + i + 8 * j, sizeof value);
            sums[j] += value;
        }
    }
    forget(sums);
}

void multiply_f32(int64_t rounds) {
    float sums[kSums] = {};
    float factor = 0.5f, addend = 1.0f;
    forget(&factor);
    forget(&addend);
    const float a = factor, b = addend;
    for (int64_t round = 0; round < rounds; ++round) {
        for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * a + b;
    }
    forget(sums);
}

template <class T>
void multiply_integers(int64_t rounds) {
    int32_t sums[kSums] = {};
    T left[kSums] = {}, right[kSums] = {};
    forget(left);
    forget(right);
    for (int64_t round = 0; round < rounds; ++round) {
        for (int i = 0; i < kSums; ++i) sums[i] += int32_t{left[i]} * int32_t{right[i]};
        forget();
    }
    forget(sums);
}

}  // namespace

const Probes kScalarProbes = {
    .name = "scalar",
    .read = read,
    .f32 = {2 * kSums, multiply_f32},
    .int16 = {2 * kSums, multiply_integers<int16_t>},
    .int8 = {2 * kSums, multiply_integers<int8_t>},
};

}  // namespace smolrun
