// Rounding of inputs to 8 bits (BytePiece), two pieces at a time: four halves in four lanes.
#pragma once

#include "kernels.h"
#include "kernels/simd_vectors.h"

namespace smolrun {
namespace {

// Of four halves.
struct ByteRounding {
    __m128i shifts;
    __m128i factors;   // the same for both halves of a piece
    float inverse[4];  // code = x * inverse
};

// `largest`: number of each half. `steps`: 1024 / largest of the row; `finest`: 127 times that.
SMOLRUN_INLINE ByteRounding byte_rounding(__m128 largest, float steps, float finest) {
    const __m128 least = _mm_set1_ps(1.0f), most = _mm_set1_ps(1 << kMostByteShift);
    const __m128 wanted =
        _mm_min_ps(_mm_max_ps(_mm_mul_ps(largest, _mm_set1_ps(steps)), least), most);
    const __m128 larger = _mm_max_ps(wanted, _mm_permute_ps(wanted, _MM_SHUFFLE(2, 3, 0, 1)));
    // As bits, rounded up to two bits of the mantissa, which are the factor.
    static_assert(kByteFactors == 4);
    const __m128i level = _mm_add_epi32(_mm_castps_si128(larger), _mm_set1_epi32(0x1fffff));
    const __m128i factor = _mm_and_si128(level, _mm_set1_epi32(0x600000));
    // The least k for which factor * 2^k, as bits, does not fall below what is wanted.
    const __m128i above = _mm_sub_epi32(_mm_castps_si128(wanted), factor);
    const __m128i exponents = _mm_srli_epi32(_mm_add_epi32(above, _mm_set1_epi32(0x7fffff)), 23);
    const __m128i powers = _mm_slli_epi32(_mm_sub_epi32(_mm_set1_epi32(2 * 127), exponents), 23);
    ByteRounding with{};
    with.shifts = _mm_sub_epi32(exponents, _mm_set1_epi32(127));
    with.factors = _mm_srli_epi32(factor, 21);
    const __m128 inverse = _mm_permutevar_ps(_mm_loadu_ps(kInverseByteFactor), with.factors);
    _mm_storeu_ps(with.inverse,
                  _mm_mul_ps(_mm_mul_ps(_mm_set1_ps(finest), inverse), _mm_castsi128_ps(powers)));
    return with;
}

// The largest magnitude in each half of two pieces, of which there may be but one.
template <int pieces>
SMOLRUN_INLINE __m128 largest_of_halves(const float* x) {
    Floats largest[4] = {};
    for (int half = 0; half < 2 * pieces; ++half, x += 16) {
        largest[half] = as_floats(magnitude(load(x)));
        for (int i = kLanes; i < 16; i += kLanes) {
            largest[half] = max(largest[half], as_floats(magnitude(load(x + i))));
        }
    }
    return max_lanes(largest[0], largest[1], largest[2], largest[3]);
}

// The codes of some pieces.
template <int pieces>
SMOLRUN_INLINE void store_codes(const float* x, const ByteRounding& with, int64_t panel,
                                BytePiece* to) {
    for (int piece = 0; piece < pieces; ++piece, x += 32) {
        Words codes[32 / kLanes];
        for (int i = 0; i < 32 / kLanes; ++i) {
            const Floats inverse = broadcast(with.inverse[2 * piece + i * kLanes / 16]);
            codes[i] = round_to_words(mul(load(x + i * kLanes), inverse));
        }
        _mm256_store_si256(reinterpret_cast<__m256i*>(to[piece * panel].codes),
                           narrow_to_bytes(codes));
    }
}

// Sums of 8 codes each.
SMOLRUN_INLINE __m256i sums_of_eight(const BytePiece& piece) {
    const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(piece.codes));
    const __m256i sums =
        _mm256_sad_epu8(_mm256_xor_si256(codes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    return _mm256_sub_epi64(sums, _mm256_set1_epi64x(8 * 128));
}
// The sums of the halves.
template <int pieces>
SMOLRUN_INLINE __m128i sums_of_codes(int64_t panel, const BytePiece* from) {
    const __m256i first = sums_of_eight(from[0]);
    const __m256i second = pieces == 2 ? sums_of_eight(from[panel]) : _mm256_setzero_si256();
    // Halves 0, 2, 1, 3, 64 bits each.
    const __m256i halves = _mm256_add_epi64(_mm256_unpacklo_epi64(first, second),
                                            _mm256_unpackhi_epi64(first, second));
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 0, 4, 2, 6);
    return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(halves, order));
}

// What follows the codes in a piece.
SMOLRUN_INLINE void store_sums(BytePiece* piece, __m128i shifts_and_starts, __m128i rest) {
    _mm_store_si128(reinterpret_cast<__m128i*>(piece->shifts), shifts_and_starts);
    _mm_store_si128(reinterpret_cast<__m128i*>(&piece->eightfold_sum), rest);
}
template <int pieces>
SMOLRUN_INLINE void store_sums(const ByteRounding& with, __m128i of_codes, int64_t panel,
                               BytePiece* to) {
    const __m128i starts = _mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), of_codes), 7);
    const __m128i sums = _mm_sllv_epi32(of_codes, with.shifts);
    const __m128i both = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, _MM_SHUFFLE(2, 3, 0, 1)));
    const __m128 factors = _mm_permutevar_ps(_mm_loadu_ps(kByteFactor), with.factors);
    const __m128i first_scaled = _mm_castps_si128(_mm_mul_ps(factors, _mm_cvtepi32_ps(sums)));
    const __m128i scaled = _mm_castps_si128(_mm_mul_ps(factors, _mm_cvtepi32_ps(both)));
    const __m128i eightfold = _mm_slli_epi32(both, 3);
    store_sums(to, _mm_unpacklo_epi64(with.shifts, starts),
               _mm_unpacklo_epi64(_mm_unpacklo_epi32(eightfold, first_scaled),
                                  _mm_unpacklo_epi32(scaled, with.factors)));
    if constexpr (pieces == 2) {
        store_sums(to + panel, _mm_unpackhi_epi64(with.shifts, starts),
                   _mm_unpacklo_epi64(_mm_unpackhi_epi32(eightfold, first_scaled),
                                      _mm_unpackhi_epi32(scaled, with.factors)));
    }
}

// Some of a row that is finite and not zero, each step for all of them before the next: a step
// waits for the one before, which the CPU cannot bridge by looking ahead.
constexpr int64_t kPairsTogether = 16;
template <int pieces>
SMOLRUN_INLINE void quantize_pairs(const float* x, int64_t pairs, int64_t panel, BytePiece* to,
                                   float steps, float finest) {
    __m128 largest[kPairsTogether];
    for (int64_t i = 0; i < pairs; ++i) largest[i] = largest_of_halves<pieces>(x + 64 * i);
    ByteRounding with[kPairsTogether];
    for (int64_t i = 0; i < pairs; ++i) with[i] = byte_rounding(largest[i], steps, finest);
    for (int64_t i = 0; i < pairs; ++i) {
        store_codes<pieces>(x + 64 * i, with[i], panel, to + 2 * i * panel);
    }
    __m128i sums[kPairsTogether];
    for (int64_t i = 0; i < pairs; ++i) sums[i] = sums_of_codes<pieces>(panel, to + 2 * i * panel);
    for (int64_t i = 0; i < pairs; ++i) {
        store_sums<pieces>(with[i], sums[i], panel, to + 2 * i * panel);
    }
}

void quantize_bytes(const float* x, int64_t columns, int64_t panel, BytePiece* pieces,
                    float* scale) {
    Words magnitudes = zero_words();
    for (int64_t i = 0; i < columns; i += kLanes) {
        magnitudes = max(magnitudes, magnitude(load(x + i)));
    }
    // As bits: NaN is above infinity, which is above the rest.
    const int32_t largest_bits = max_lane(magnitudes);
    float largest;
    __builtin_memcpy(&largest, &largest_bits, sizeof largest);
    constexpr float most = 1 << kMostByteShift;
    *scale = largest_bits >= 0x7f800000 ? __builtin_nanf("") : largest / (127 * most);
    if (!(*scale >= 0x1p-126f)) {
        if (*scale < 0x1p-126f) *scale = 0;
        for (int64_t i = 0; i < columns / 32; ++i) pieces[i * panel] = BytePiece{};
        return;
    }
    const float steps = most / largest, finest = 127 * most / largest;
    int64_t i = 0;
    while (i + 64 <= columns) {
        const int64_t pairs = smaller(kPairsTogether, (columns - i) / 64);
        quantize_pairs<2>(x + i, pairs, panel, pieces + i / 32 * panel, steps, finest);
        i += 64 * pairs;
    }
    if (i < columns) quantize_pairs<1>(x + i, 1, panel, pieces + i / 32 * panel, steps, finest);
}

}  // namespace
}  // namespace smolrun
