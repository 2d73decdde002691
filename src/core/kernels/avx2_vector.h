// AVX2 with FMA and F16C: eight 32-bit lanes, half of the rows of a group.
//
// The same names as avx512_vector.h, which says what they share.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define SMOLRUN_INLINE inline __attribute__((always_inline))
#define SMOLRUN_INLINE_LAMBDA __attribute__((always_inline))

namespace smolrun {
namespace {

constexpr int kLanes = 8;
// Tokens in a tile of an exact product. The float totals do not fit the 16 registers, and are spilt
// between pieces.
constexpr int kTileTokens = 8;
constexpr int kSubBlockTileTokens = 8;
// And where tokens are more than two tiles, with codes unpacked beforehand (simd_unpacked.h): 2 x 4
// integer totals.
constexpr int kUnpackedTileTokens = 4;
constexpr int kByteTileTokens = 8;
// None is unrolled: the totals do not fit the registers, and stay in memory.
constexpr int kByteTileUnrolled = 1;
// One tile, which then reads its inputs in order.
constexpr int64_t kTilePanelTokens = 8;
// Pairs of products with codes of 8 bits do not fit 16.
constexpr int kByteProductBits = 6;
constexpr bool kTopmostBits = false;
// Whether one token asks for a long stretch of weights nearer than others (simd_pieces.h): where
// memory is fast it would get half of the bandwidth then, as a line takes two loads.
constexpr bool kExtendedNear = false;
constexpr int kTileVectors = 2;
constexpr int kFloatTileTokens = 6;
constexpr int kCodeTileTokens = 4;  // products wait in a register before they are added
constexpr int kFewFloatTokens = 3;
constexpr int kConvertedF16Tokens = 0;
constexpr int kConvertedBf16Tokens = 24;
constexpr int kTileRowsOfAttention = 2;
constexpr int kAttentionTotals = 8;

using Floats = __m256;
using Words = __m256i;  // 32-bit integers, or pairs of 16-bit ones

SMOLRUN_INLINE Floats broadcast(float x) { return _mm256_set1_ps(x); }
SMOLRUN_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
SMOLRUN_INLINE void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }

SMOLRUN_INLINE __m256i first_lanes(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
// The first `count` lanes (0 to 8); the others are 0 and their memory is not touched.
SMOLRUN_INLINE Floats load_part(const float* from, int64_t count) {
    return _mm256_maskload_ps(from, first_lanes(count));
}
SMOLRUN_INLINE void store_part(float* to, Floats x, int64_t count) {
    _mm256_maskstore_ps(to, first_lanes(count), x);
}
// x in the first `count` lanes (any number), `other` in the rest.
SMOLRUN_INLINE Floats select_first(Floats x, Floats other, int64_t count) {
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(first_lanes(count)));
}

SMOLRUN_INLINE Floats load_f16(const void* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

SMOLRUN_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
SMOLRUN_INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
SMOLRUN_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
SMOLRUN_INLINE Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
// a * b + c, a * b - c, and c - a * b.
SMOLRUN_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
SMOLRUN_INLINE Floats fmsub(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
SMOLRUN_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
// b where either is NaN.
SMOLRUN_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
SMOLRUN_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
// False where either is NaN.
SMOLRUN_INLINE bool any_less(Floats a, Floats b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0;
}
SMOLRUN_INLINE Floats select_less(Floats a, Floats b, Floats if_less, Floats otherwise) {
    return _mm256_blendv_ps(otherwise, if_less, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
SMOLRUN_INLINE Floats round(Floats x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x * 2^n, n a whole number in a float, -250 to 250; overflows to infinity, underflows gradually.
SMOLRUN_INLINE Floats scale_by_power_of_two(Floats x, Floats n) {
    // In two steps, as 2^n itself may be no float.
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i rest = _mm256_sub_epi32(whole, half);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
    return mul(mul(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

// x - floor(x), 0 of infinity; and x * 2^floor(n), for x from 1 to 2 and n up to 126: below 2^-126
// something from 0 to there.
SMOLRUN_INLINE Floats fraction(Floats x) {
    const Floats within = max(broadcast(-126.0f), x);
    return sub(within, _mm256_floor_ps(within));
}
SMOLRUN_INLINE Floats scale_by_whole_part(Floats x, Floats n) {
    const __m256i whole = _mm256_cvtps_epi32(_mm256_floor_ps(max(broadcast(-126.0f), n)));
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(whole, 23)));
}

SMOLRUN_INLINE __m128 fold(__m256 x) {
    return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
SMOLRUN_INLINE __m128 fold_max(__m256 x) {
    return _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
SMOLRUN_INLINE Floats interleave_low(Floats a, Floats b) { return _mm256_unpacklo_ps(a, b); }
SMOLRUN_INLINE Floats interleave_high(Floats a, Floats b) { return _mm256_unpackhi_ps(a, b); }
SMOLRUN_INLINE Floats join_low(Floats a, Floats b) {
    return _mm256_shuffle_ps(a, b, _MM_SHUFFLE(1, 0, 1, 0));
}
SMOLRUN_INLINE Floats join_high(Floats a, Floats b) {
    return _mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 2, 3, 2));
}
// total += squares of x, in double.
struct Doubles {
    __m256d low, high;
};
SMOLRUN_INLINE void add_squares(Floats x, Doubles& total) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    total.low = _mm256_fmadd_pd(low, low, total.low);
    total.high = _mm256_fmadd_pd(high, high, total.high);
}
SMOLRUN_INLINE void add_values(Floats x, Doubles& total) {
    total.low = _mm256_add_pd(total.low, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    total.high = _mm256_add_pd(total.high, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}
SMOLRUN_INLINE double sum_lanes(const Doubles& x) {
    const __m256d y = _mm256_add_pd(x.low, x.high);
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(y), _mm256_extractf128_pd(y, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}

SMOLRUN_INLINE Words zero_words() { return _mm256_setzero_si256(); }
SMOLRUN_INLINE Words broadcast_word(int32_t x) { return _mm256_set1_epi32(x); }
SMOLRUN_INLINE Words load_words(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
SMOLRUN_INLINE Words load_words_part(const void* from, int64_t count) {
    return _mm256_maskload_epi32(static_cast<const int*>(from), first_lanes(count));
}
SMOLRUN_INLINE void store_words(void* to, Words x) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), x);
}
// Two neighbouring 16-bit codes in every lane.
SMOLRUN_INLINE Words broadcast_pair(const int16_t* from) {
    int32_t pair;
    __builtin_memcpy(&pair, from, sizeof pair);
    return _mm256_set1_epi32(pair);
}
SMOLRUN_INLINE Words broadcast_quad(const int8_t* from) {
    int32_t quad;
    __builtin_memcpy(&quad, from, sizeof quad);
    return _mm256_set1_epi32(quad);
}
// total + the two products of 16-bit codes in each lane.
SMOLRUN_INLINE Words dot(Words total, Words codes, Words pair) {
    total = _mm256_add_epi32(total, _mm256_madd_epi16(codes, pair));
    // Keeps the sum one chain: the compiler would cut it in several, for which there are too few
    // registers.
    __asm__("" : "+x"(total));
    return total;
}
SMOLRUN_INLINE Words dot_pair(Words total, Words codes, const int16_t* pair) {
    return dot(total, codes, broadcast_pair(pair));
}
template <int bits>
SMOLRUN_INLINE Words dot_16(const Words& a, const Words& b, const Words& c, const Words& d,
                            const int8_t* codes) {
    static_assert(bits <= kByteProductBits);
    const Words ones = _mm256_set1_epi16(1);
    const Words first = _mm256_add_epi16(_mm256_maddubs_epi16(a, broadcast_quad(codes)),
                                         _mm256_maddubs_epi16(b, broadcast_quad(codes + 4)));
    const Words second = _mm256_add_epi16(_mm256_maddubs_epi16(c, broadcast_quad(codes + 8)),
                                          _mm256_maddubs_epi16(d, broadcast_quad(codes + 12)));
    if constexpr (bits <= 5) {  // 8 * 31 * 127 = 31496
        return _mm256_madd_epi16(_mm256_add_epi16(first, second), ones);
    } else {  // 4 * 63 * 127 = 32004
        return _mm256_add_epi32(_mm256_madd_epi16(first, ones), _mm256_madd_epi16(second, ones));
    }
}
template <int bits>
SMOLRUN_INLINE void dot_halves(const Words (&words)[8], const int8_t* codes, Words (&totals)[2]) {
    for (int half = 0; half < 2; ++half) {
        const Words* const of_half = words + 4 * half;
        const Words sum =
            dot_16<bits>(of_half[0], of_half[1], of_half[2], of_half[3], codes + 16 * half);
        totals[half] = _mm256_add_epi32(totals[half], sum);
    }
}
SMOLRUN_INLINE Words bit_and(Words a, Words b) { return _mm256_and_si256(a, b); }
SMOLRUN_INLINE Words bit_or(Words a, Words b) { return _mm256_or_si256(a, b); }
// Lanes moved to the right by `count` bits; to the left where it is negative.
template <int count>
SMOLRUN_INLINE Words shift_right(Words x) {
    if constexpr (count > 0) {
        return _mm256_srli_epi32(x, count);
    } else if constexpr (count < 0) {
        return _mm256_slli_epi32(x, -count);
    } else {
        return x;
    }
}
template <int count>
SMOLRUN_INLINE Words shift_right_signed(Words x) {
    return _mm256_srai_epi32(x, count);
}
SMOLRUN_INLINE Words shift_right_by(Words x, int count) {
    return _mm256_srl_epi32(x, _mm_cvtsi32_si128(count));
}
SMOLRUN_INLINE Words shift_left_by(Words x, int32_t count) {
    return _mm256_sllv_epi32(x, broadcast_word(count));
}
template <int count>
SMOLRUN_INLINE Words shift_right_16(Words x) {
    return _mm256_srli_epi16(x, count);
}
SMOLRUN_INLINE Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
SMOLRUN_INLINE Words sub(Words a, Words b) { return _mm256_sub_epi32(a, b); }
SMOLRUN_INLINE Words mul(Words a, Words b) { return _mm256_mullo_epi32(a, b); }
SMOLRUN_INLINE Words sub_16(Words a, Words b) { return _mm256_sub_epi16(a, b); }
SMOLRUN_INLINE Words mul_16(Words a, Words b) { return _mm256_mullo_epi16(a, b); }
SMOLRUN_INLINE Words max(Words a, Words b) { return _mm256_max_epi32(a, b); }
SMOLRUN_INLINE Words bits_of(Floats x) { return _mm256_castps_si256(x); }
SMOLRUN_INLINE Floats as_floats(Words bits) { return _mm256_castsi256_ps(bits); }
SMOLRUN_INLINE Floats to_floats(Words x) { return _mm256_cvtepi32_ps(x); }
SMOLRUN_INLINE Words round_to_words(Floats x) { return _mm256_cvtps_epi32(x); }
// Bytes of each 32-bit word replaced by table[byte], byte < 16.
SMOLRUN_INLINE Words look_up(const int8_t* table, Words bytes) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), bytes);
}
SMOLRUN_INLINE Words widen_u8(const std::byte* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
SMOLRUN_INLINE Words widen_i8(const std::byte* from) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
SMOLRUN_INLINE Words widen_u16(const std::byte* from) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
// Codes, which fit 16 bits, in quad order: 0, 2, 1, 3 of each four.
SMOLRUN_INLINE void store_codes(int16_t* to, Words x) {
    const __m128i narrow =
        _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i low = _mm_shufflelo_epi16(narrow, _MM_SHUFFLE(3, 1, 2, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_shufflehi_epi16(low, _MM_SHUFFLE(3, 1, 2, 0)));
}
// Codes, which fit 16 bits, in order.
SMOLRUN_INLINE void store_halves(int16_t* to, Words x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
SMOLRUN_INLINE __m256i narrow_to_bytes(const Words (&x)[4]) {
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
SMOLRUN_INLINE __m128i fold_sum(Words x) {
    return _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
SMOLRUN_INLINE __m128i fold_max(Words x) {
    return _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

}  // namespace
}  // namespace smolrun
