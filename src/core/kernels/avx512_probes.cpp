#include <immintrin.h>

#include <cstdint>

#include "kernels/probes.h"

#define SMOLRUN_INLINE inline __attribute__((always_inline))

namespace smolrun {
namespace {

using Bytes = __m512i;
constexpr int kBytes = 64;

template <class Vector>
SMOLRUN_INLINE Vector opaque(Vector x) {
    __asm__ volatile("" : "+v"(x));
    return x;
}
SMOLRUN_INLINE Bytes load_bytes(const std::byte* from) { return _mm512_loadu_si512(from); }
SMOLRUN_INLINE Bytes fold_bytes(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }

}  // namespace
}  // namespace smolrun

// What it is written on comes before it.
#include "kernels/simd_probes.h"

namespace smolrun {
namespace {

void multiply_f32(int64_t rounds) {
    const __m512 a = opaque(_mm512_set1_ps(0.5f)), b = opaque(_mm512_set1_ps(1.0f));
    accumulate(b, rounds, [&](__m512 sum) { return _mm512_fmadd_ps(a, b, sum); });
}

void dot_int16(int64_t rounds) {
    const __m512i a = opaque(_mm512_set1_epi16(3));
    accumulate(a, rounds, [&](__m512i sum) { return _mm512_dpwssd_epi32(sum, a, a); });
}

void dot_int8(int64_t rounds) {
    const __m512i a = opaque(_mm512_set1_epi8(3));
    accumulate(a, rounds, [&](__m512i sum) { return _mm512_dpbusd_epi32(sum, a, a); });
}

}  // namespace

const Probes kAvx512Probes = {
    .name = "avx512",
    .read = read_all,
    .f32 = {2 * 16 * kSums, multiply_f32},
    .int16 = {2 * 32 * kSums, dot_int16},
    .int8 = {2 * 64 * kSums, dot_int8},
};

}  // namespace smolrun
