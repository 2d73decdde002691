// AVX-512 (F, BW, DQ, VL, VNNI): sixteen 32-bit lanes, one for each row of a group.
//
// avx2_vector.h offers the same names for eight lanes; simd_*.h are written on them. Everything is
// in an unnamed namespace and nothing here or there calls an inline function of a shared header at
// run time: of such a function the linker keeps one copy, which might be the one this CPU lacks.
#pragma once

// GCC before 13 takes the undefined operands inside its own intrinsics for a mistake (bug 105593).
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define SMOLRUN_INLINE inline __attribute__((always_inline))
#define SMOLRUN_INLINE_LAMBDA __attribute__((always_inline))

namespace smolrun {
namespace {

constexpr int kLanes = 16;
// Tokens in a tile of an exact product: 12 integer and 12 float totals leave 8 of the 32 registers
// for codes and scales. Weights with two scales in a piece take another total for each token.
constexpr int kTileTokens = 12;
constexpr int kSubBlockTileTokens = 8;
// Codes are never unpacked beforehand (simd_unpacked.h).
constexpr int kUnpackedTileTokens = 0;
// Tokens in a tile of a fast product: as many float totals, beside the 8 words of codes of a piece.
// And the most bits of weights' codes for which it is faster.
constexpr int kByteTileTokens = 16;
// How many of them are unrolled, so that totals are in registers.
constexpr int kByteTileUnrolled = 16;
// Two tiles: a thread's half of a step of 256 tokens is whole panels.
constexpr int64_t kTilePanelTokens = 32;
constexpr int kByteProductBits = 8;
// Codes with an offset stand at the top of their byte, so that all have the same offset.
constexpr bool kTopmostBits = true;
// Whether one token asks for a long stretch of weights nearer than others (simd_pieces.h).
constexpr bool kExtendedNear = true;
// Tiles of a product of float weights: vectors of rows x tokens, 2 x 12 totals. And so many tokens
// that one group of rows at a time does.
constexpr int kTileVectors = 2;
constexpr int kFloatTileTokens = 12;
constexpr int kCodeTileTokens = 8;  // likewise, of I16: panels are whole tiles
constexpr int kFewFloatTokens = 6;
// And so many that a block of F16 or BF16 weights is converted to float32 once for all; 0: never.
constexpr int kConvertedF16Tokens = 128;
constexpr int kConvertedBf16Tokens = 0;
// Tiles of attention: rows that share a load of K or V, and totals in registers.
constexpr int kTileRowsOfAttention = 12;
constexpr int kAttentionTotals = 24;

using Floats = __m512;
using Words = __m512i;  // 32-bit integers, or pairs of 16-bit ones

SMOLRUN_INLINE Floats broadcast(float x) { return _mm512_set1_ps(x); }
SMOLRUN_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
SMOLRUN_INLINE void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }

SMOLRUN_INLINE __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1);
}
// The first `count` lanes (0 to 16); the others are 0 and their memory is not touched.
SMOLRUN_INLINE Floats load_part(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
SMOLRUN_INLINE void store_part(float* to, Floats x, int64_t count) {
    _mm512_mask_storeu_ps(to, first_lanes(count), x);
}
// x in the first `count` lanes (any number), `other` in the rest.
SMOLRUN_INLINE Floats select_first(Floats x, Floats other, int64_t count) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 mask =
        _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(static_cast<int>(count)));
    return _mm512_mask_blend_ps(mask, other, x);
}

SMOLRUN_INLINE Floats load_f16(const void* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

SMOLRUN_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
SMOLRUN_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
SMOLRUN_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
SMOLRUN_INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
// a * b + c, a * b - c, and c - a * b.
SMOLRUN_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
SMOLRUN_INLINE Floats fmsub(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
SMOLRUN_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
// b where either is NaN.
SMOLRUN_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
SMOLRUN_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
// False where either is NaN.
SMOLRUN_INLINE bool any_less(Floats a, Floats b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0;
}
SMOLRUN_INLINE Floats select_less(Floats a, Floats b, Floats if_less, Floats otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, if_less);
}
SMOLRUN_INLINE Floats round(Floats x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x * 2^n, n a whole number in a float; overflows to infinity, underflows gradually.
SMOLRUN_INLINE Floats scale_by_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

// x - floor(x), 0 of infinity; and x * 2^floor(n), for x from 1 to 2 and n up to 126: below 2^-126
// something from 0 to there.
SMOLRUN_INLINE Floats fraction(Floats x) {
    return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
SMOLRUN_INLINE Floats scale_by_whole_part(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

SMOLRUN_INLINE __m256 low_half(__m512 x) { return _mm512_castps512_ps256(x); }
SMOLRUN_INLINE __m256 high_half(__m512 x) { return _mm512_extractf32x8_ps(x, 1); }
SMOLRUN_INLINE __m128 fold(__m512 x) {
    const __m256 y = _mm256_add_ps(low_half(x), high_half(x));
    return _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
}
SMOLRUN_INLINE __m128 fold_max(__m512 x) {
    const __m256 y = _mm256_max_ps(low_half(x), high_half(x));
    return _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
}
// In each 128 bits: a0 b0 a1 b1, and a2 b2 a3 b3.
SMOLRUN_INLINE Floats interleave_low(Floats a, Floats b) { return _mm512_unpacklo_ps(a, b); }
SMOLRUN_INLINE Floats interleave_high(Floats a, Floats b) { return _mm512_unpackhi_ps(a, b); }
// a0 a1 b0 b1, and a2 a3 b2 b3.
SMOLRUN_INLINE Floats join_low(Floats a, Floats b) {
    return _mm512_shuffle_ps(a, b, _MM_SHUFFLE(1, 0, 1, 0));
}
SMOLRUN_INLINE Floats join_high(Floats a, Floats b) {
    return _mm512_shuffle_ps(a, b, _MM_SHUFFLE(3, 2, 3, 2));
}
// total += squares of x, in double.
struct Doubles {
    __m512d low, high;
};
SMOLRUN_INLINE void add_squares(Floats x, Doubles& total) {
    const __m512d low = _mm512_cvtps_pd(low_half(x));
    const __m512d high = _mm512_cvtps_pd(high_half(x));
    total.low = _mm512_fmadd_pd(low, low, total.low);
    total.high = _mm512_fmadd_pd(high, high, total.high);
}
SMOLRUN_INLINE void add_values(Floats x, Doubles& total) {
    total.low = _mm512_add_pd(total.low, _mm512_cvtps_pd(low_half(x)));
    total.high = _mm512_add_pd(total.high, _mm512_cvtps_pd(high_half(x)));
}
SMOLRUN_INLINE double sum_lanes(const Doubles& x) {
    const __m512d y = _mm512_add_pd(x.low, x.high);
    const __m256d z = _mm256_add_pd(_mm512_castpd512_pd256(y), _mm512_extractf64x4_pd(y, 1));
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(z), _mm256_extractf128_pd(z, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}

SMOLRUN_INLINE Words zero_words() { return _mm512_setzero_si512(); }
SMOLRUN_INLINE Words broadcast_word(int32_t x) { return _mm512_set1_epi32(x); }
SMOLRUN_INLINE Words load_words(const void* from) { return _mm512_loadu_si512(from); }
SMOLRUN_INLINE Words load_words_part(const void* from, int64_t count) {
    return _mm512_maskz_loadu_epi32(first_lanes(count), from);
}
SMOLRUN_INLINE void store_words(void* to, Words x) { _mm512_storeu_si512(to, x); }
// Two neighbouring 16-bit codes in every lane.
SMOLRUN_INLINE Words broadcast_pair(const int16_t* from) {
    int32_t pair;
    __builtin_memcpy(&pair, from, sizeof pair);
    return _mm512_set1_epi32(pair);
}
SMOLRUN_INLINE Words broadcast_quad(const int8_t* from) {
    int32_t quad;
    __builtin_memcpy(&quad, from, sizeof quad);
    return _mm512_set1_epi32(quad);
}
// total + the two products of 16-bit codes in each lane.
SMOLRUN_INLINE Words dot(Words total, Words codes, Words pair) {
    // Not the intrinsic: around it GCC 12 copies each total, and spills it, at every step.
    __asm__("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(codes), "v"(pair));
    return total;
}
// The same with a pair in memory, for all lanes.
SMOLRUN_INLINE Words dot_pair(Words total, Words codes, const int16_t* pair) {
    __asm__("vpdpwssd %2%{1to16%}, %1, %0"
            : "+v"(total)
            : "v"(codes), "m"(*reinterpret_cast<const int16_t (*)[2]>(pair)));
    return total;
}
// total + the four products of bytes, unsigned times signed, in each lane. Again not the intrinsic,
// around which GCC 12 also loads the quad to a register first.
// Volatile keeps the order, in which two sums take turns: else the CPU runs out of places for what
// waits.
SMOLRUN_INLINE Words dot_quad(Words total, Words bytes, const int8_t* quad) {
    __asm__ volatile("vpdpbusd %2%{1to16%}, %1, %0"
                     : "+v"(total)
                     : "v"(bytes), "m"(*reinterpret_cast<const int8_t (*)[4]>(quad)));
    return total;
}
// Adds 16 products to each lane of either total: four words each of unsigned bytes, below 2^bits,
// times 16 codes from -127 to 127, which are the same for all lanes.
template <int bits>
SMOLRUN_INLINE void dot_halves(const Words (&words)[8], const int8_t* codes, Words (&totals)[2]) {
    for (int i = 0; i < 4; ++i) {
        totals[0] = dot_quad(totals[0], words[i], codes + 4 * i);
        totals[1] = dot_quad(totals[1], words[4 + i], codes + 16 + 4 * i);
    }
}
SMOLRUN_INLINE Words bit_and(Words a, Words b) { return _mm512_and_si512(a, b); }
SMOLRUN_INLINE Words bit_or(Words a, Words b) { return _mm512_or_si512(a, b); }
// Lanes moved to the right by `count` bits; to the left where it is negative.
template <int count>
SMOLRUN_INLINE Words shift_right(Words x) {
    if constexpr (count > 0) {
        return _mm512_srli_epi32(x, count);
    } else if constexpr (count < 0) {
        return _mm512_slli_epi32(x, -count);
    } else {
        return x;
    }
}
// Of signed numbers.
template <int count>
SMOLRUN_INLINE Words shift_right_signed(Words x) {
    return count == 0 ? x : _mm512_srai_epi32(x, count);
}
SMOLRUN_INLINE Words shift_right_by(Words x, int count) {
    return _mm512_srl_epi32(x, _mm_cvtsi32_si128(count));
}
SMOLRUN_INLINE Words shift_left_by(Words x, int32_t count) {
    return _mm512_sllv_epi32(x, broadcast_word(count));
}
template <int count>
SMOLRUN_INLINE Words shift_right_16(Words x) {
    return _mm512_srli_epi16(x, count);
}
SMOLRUN_INLINE Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
SMOLRUN_INLINE Words sub(Words a, Words b) { return _mm512_sub_epi32(a, b); }
SMOLRUN_INLINE Words mul(Words a, Words b) { return _mm512_mullo_epi32(a, b); }
SMOLRUN_INLINE Words sub_16(Words a, Words b) { return _mm512_sub_epi16(a, b); }
SMOLRUN_INLINE Words mul_16(Words a, Words b) { return _mm512_mullo_epi16(a, b); }
SMOLRUN_INLINE Words max(Words a, Words b) { return _mm512_max_epi32(a, b); }
SMOLRUN_INLINE Words bits_of(Floats x) { return _mm512_castps_si512(x); }
SMOLRUN_INLINE Floats as_floats(Words bits) { return _mm512_castsi512_ps(bits); }
SMOLRUN_INLINE Floats to_floats(Words x) { return _mm512_cvtepi32_ps(x); }
SMOLRUN_INLINE Words round_to_words(Floats x) { return _mm512_cvtps_epi32(x); }
// Bytes of each 32-bit word replaced by table[byte], byte < 16.
SMOLRUN_INLINE Words look_up(const int8_t* table, Words bytes) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), bytes);
}
SMOLRUN_INLINE Words widen_u8(const std::byte* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
SMOLRUN_INLINE Words widen_i8(const std::byte* from) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
SMOLRUN_INLINE Words widen_u16(const std::byte* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// Codes, which fit 16 bits, in quad order: 0, 2, 1, 3 of each four.
SMOLRUN_INLINE void store_codes(int16_t* to, Words x) {
    const __m256i narrow = _mm512_cvtepi32_epi16(x);
    const __m256i low = _mm256_shufflelo_epi16(narrow, _MM_SHUFFLE(3, 1, 2, 0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_shufflehi_epi16(low, _MM_SHUFFLE(3, 1, 2, 0)));
}
// Codes, which fit 16 bits, in order.
SMOLRUN_INLINE void store_halves(int16_t* to, Words x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(x));
}
// 32 codes, which fit 8 bits, in order.
SMOLRUN_INLINE __m256i narrow_to_bytes(const Words (&x)[2]) {
    // Four of one and four of the other in turn; then 0, 16, 8, 24 and so on from the two halves.
    const __m512i words = _mm512_packs_epi32(x[0], x[1]);
    const __m256i bytes =
        _mm256_packs_epi16(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
}
SMOLRUN_INLINE __m128i fold_sum(Words x) {
    const __m256i y = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}
SMOLRUN_INLINE __m128i fold_max(Words x) {
    const __m256i y = _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}

}  // namespace
}  // namespace smolrun
