// Rounding of inputs to 8 bits (BytePiece), two pieces at a time: four halves in four lanes.
#pragma once

#include "kernels.h"
#include "kernels/simd_common.h"

namespace smolrun {
namespace {

// Of four halves.
struct ByteRounding {
    __m128i shifts;
    __m128i factors;  // the same for both halves of a piece
    __m128 inverse;   // code = x * inverse
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
    with.inverse = _mm_mul_ps(_mm_mul_ps(_mm_set1_ps(finest), inverse), _mm_castsi128_ps(powers));
    return with;
}

// What follows the codes in a piece.
SMOLRUN_INLINE void store_sums(BytePiece* piece, __m128i shifts_and_sums, __m128i rest) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(piece->shifts), shifts_and_sums);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(&piece->eightfold_sum), rest);
}

// One piece or two of a row that is finite and not zero.
template <int pieces>
SMOLRUN_INLINE void quantize_byte_pieces(const float* x, int64_t panel, BytePiece* piece,
                                         float steps, float finest) {
    constexpr int vectors = 16 / kLanes;
    Floats largest[4];
    for (int half = 0; half < 4; ++half) {
        largest[half] = broadcast(0.0f);
        for (int v = 0; half < 2 * pieces && v < vectors; ++v) {
            const Words bits = bits_of(load(x + 16 * half + v * kLanes));
            largest[half] =
                max(largest[half], as_floats(bit_and(bits, broadcast_word(0x7fffffff))));
        }
    }
    const ByteRounding with =
        byte_rounding(max_lanes(largest[0], largest[1], largest[2], largest[3]), steps, finest);
    float inverse[4];
    _mm_storeu_ps(inverse, with.inverse);
    Words totals[4];
    for (int half = 0; half < 4; ++half) {
        totals[half] = zero_words();
        for (int v = 0; half < 2 * pieces && v < vectors; ++v) {
            const Words codes =
                round_to_words(mul(load(x + 16 * half + v * kLanes), broadcast(inverse[half])));
            store_bytes(piece[half / 2 * panel].codes + 16 * (half % 2) + v * kLanes, codes);
            totals[half] = add(totals[half], codes);
        }
    }
    const __m128i sums =
        _mm_sllv_epi32(sum_lanes(totals[0], totals[1], totals[2], totals[3]), with.shifts);
    const __m128i both = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, _MM_SHUFFLE(2, 3, 0, 1)));
    const __m128 factors = _mm_permutevar_ps(_mm_loadu_ps(kByteFactor), with.factors);
    const __m128i scaled = _mm_castps_si128(_mm_mul_ps(factors, _mm_cvtepi32_ps(both)));
    const __m128i eightfold = _mm_slli_epi32(both, 3), sum_128 = _mm_slli_epi32(both, 7);
    store_sums(piece, _mm_unpacklo_epi64(with.shifts, sums),
               _mm_unpacklo_epi64(_mm_unpacklo_epi32(eightfold, sum_128),
                                  _mm_unpacklo_epi32(scaled, with.factors)));
    if constexpr (pieces == 2) {
        store_sums(piece + panel, _mm_unpackhi_epi64(with.shifts, sums),
                   _mm_unpacklo_epi64(_mm_unpackhi_epi32(eightfold, sum_128),
                                      _mm_unpackhi_epi32(scaled, with.factors)));
    }
}

void quantize_bytes(const float* x, int64_t columns, int64_t panel, BytePiece* pieces,
                    float* scale) {
    Words magnitudes = zero_words();
    for (int64_t i = 0; i < columns; i += kLanes) {
        magnitudes = max(magnitudes, bit_and(bits_of(load(x + i)), broadcast_word(0x7fffffff)));
    }
    // As bits: NaN is above infinity, which is above the rest.
    const int32_t largest_bits = max_lane(magnitudes);
    float largest;
    __builtin_memcpy(&largest, &largest_bits, sizeof largest);
    constexpr float steps = 1 << kMostByteShift;
    *scale = largest_bits >= 0x7f800000 ? __builtin_nanf("") : largest / (127 * steps);
    if (!(*scale >= 0x1p-126f)) {
        if (*scale < 0x1p-126f) *scale = 0;
        for (int64_t i = 0; i < columns / 32; ++i) pieces[i * panel] = BytePiece{};
        return;
    }
    int64_t i = 0;
    for (; i + 64 <= columns; i += 64) {
        quantize_byte_pieces<2>(x + i, panel, pieces + i / 32 * panel, steps / largest,
                                127 * steps / largest);
    }
    if (i < columns) {
        quantize_byte_pieces<1>(x + i, panel, pieces + i / 32 * panel, steps / largest,
                                127 * steps / largest);
    }
}

}  // namespace
}  // namespace smolrun
