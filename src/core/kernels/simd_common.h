// What the simd_*.h share, on top of avx2_vector.h or avx512_vector.h, one of which comes first.
#pragma once

#include "blocks.h"

namespace smolrun {
namespace {

constexpr int kGroupVectors = static_cast<int>(kGroupRows) / kLanes;

SMOLRUN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Asks for memory, which need not exist, ahead of its use: into the first-level cache.
template <_mm_hint hint = _MM_HINT_T0>
SMOLRUN_INLINE void prefetch(const void* from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) {
        _mm_prefetch(static_cast<const char*>(from) + line, hint);
    }
}
// The same, only as far as the second-level cache: a core has few slots for lines on their way to
// the first level, and lines from memory hold theirs for so long that inputs which are near must
// wait for one.
SMOLRUN_INLINE void prefetch_far(const void* from, int64_t bytes) {
    prefetch<_MM_HINT_T1>(from, bytes);
}

// Calls work(first, count): whole vectors with the constant kLanes, then what is left.
template <class Work>
SMOLRUN_INLINE void each_vector(int64_t size, Work&& work) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) work(i, int64_t{kLanes});
    if (i < size) work(i, size - i);
}
SMOLRUN_INLINE Floats load_up_to(const float* from, int64_t count) {
    return count == kLanes ? load(from) : load_part(from, count);
}
SMOLRUN_INLINE Words load_words_up_to(const void* from, int64_t count) {
    return count == kLanes ? load_words(from) : load_words_part(from, count);
}
SMOLRUN_INLINE void store_up_to(float* to, Floats x, int64_t count) {
    count == kLanes ? store(to, x) : store_part(to, x, count);
}

// The sum of the lanes; sums of four vectors at once, in the same order.
SMOLRUN_INLINE __m128 sum_lanes(Floats a, Floats b, Floats c, Floats d) {
    return _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d)));
}
SMOLRUN_INLINE float sum_lanes(Floats x) {
    const __m128 pairs = _mm_hadd_ps(fold(x), fold(x));
    return _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs));
}
// The largest lane of four vectors; none is NaN.
SMOLRUN_INLINE __m128 max_lanes(Floats a, Floats b, Floats c, Floats d) {
    const Floats ab = max(interleave_low(a, b), interleave_high(a, b));
    const Floats cd = max(interleave_low(c, d), interleave_high(c, d));
    return fold_max(max(join_low(ab, cd), join_high(ab, cd)));
}
SMOLRUN_INLINE int32_t sum_lanes(Words x) {
    __m128i y = fold_sum(x);
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, _MM_SHUFFLE(2, 3, 0, 1))));
}
SMOLRUN_INLINE int32_t max_lane(Words x) {
    __m128i y = fold_max(x);
    y = _mm_max_epi32(y, _mm_shuffle_epi32(y, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, _MM_SHUFFLE(2, 3, 0, 1))));
}

// e^x within 1.5 units in the last place: infinity from 88.73 up, 0 from -104 down, NaN stays.
SMOLRUN_INLINE Floats exponential(Floats x) {
    // The second argument of min and max survives where it is NaN.
    x = min(broadcast(89.0f), max(broadcast(-105.0f), x));
    const Floats n = round(mul(x, broadcast(1.44269504088896341f)));
    // ln 2 in two parts, the first of few enough bits that n times it is exact.
    const Floats part = fnma(n, broadcast(0.693359375f), x);
    const Floats r = fnma(n, broadcast(-2.12194440054690583e-4f), part);
    // Taylor: |r| <= 0.35, so what follows the 7th power is below 6e-9.
    Floats sum = broadcast(1.0f / 5040);
    sum = fma(sum, r, broadcast(1.0f / 720));
    sum = fma(sum, r, broadcast(1.0f / 120));
    sum = fma(sum, r, broadcast(1.0f / 24));
    sum = fma(sum, r, broadcast(1.0f / 6));
    sum = fma(sum, r, broadcast(0.5f));
    sum = fma(sum, mul(r, r), r);
    return scale_by_power_of_two(add(sum, broadcast(1.0f)), n);
}

}  // namespace
}  // namespace smolrun
