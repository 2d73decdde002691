#include <immintrin.h>

#include <cstdint>

#include "kernels/probes.h"

#define SMOLRUN_INLINE inline __attribute__((always_inline))

namespace smolrun {
namespace {

using Bytes = __m256i;
constexpr int kBytes = 32;

template <class Vector>
SMOLRUN_INLINE Vector opaque(Vector x) {
    __asm__ volatile("" : "+x"(x));
    return x;
}
SMOLRUN_INLINE Bytes load_bytes(const std::byte* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
SMOLRUN_INLINE Bytes fold_bytes(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }

}  // namespace
}  // namespace smolrun

// What it is written on comes before it.
#include "kernels/simd_probes.h"

namespace smolrun {
namespace {

void multiply_f32(int64_t rounds) {
    const __m256 a = opaque(_mm256_set1_ps(0.5f)), b = opaque(_mm256_set1_ps(1.0f));
    accumulate(b, rounds, [&](__m256 sum) { return _mm256_fmadd_ps(a, b, sum); });
}

void dot_int16(int64_t rounds) {
    const __m256i a = _mm256_set1_epi16(3);
    accumulate(a, rounds,
               [&](__m256i sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(opaque(a), a)); });
}

// Without VNNI the products of bytes are added in two steps.
void dot_int8(int64_t rounds) {
    const __m256i a = _mm256_set1_epi8(3), ones = opaque(_mm256_set1_epi16(1));
    accumulate(a, rounds, [&](__m256i sum) {
        const __m256i pairs = _mm256_maddubs_epi16(opaque(a), a);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    });
}

}  // namespace

const Probes kAvx2Probes = {
    .name = "avx2",
    .read = read_all,
    .f32 = {2 * 8 * kSums, multiply_f32},
    .int16 = {2 * 16 * kSums, dot_int16},
    .int8 = {2 * 32 * kSums, dot_int8},
};

}  // namespace smolrun
