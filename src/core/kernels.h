// What an instruction set must provide: one table of functions, filled once per translation unit
// in kernels/. A kernel knows no threads, no program and no allocation, and it never looks outside
// the rows, tokens and heads it is given.
//
// The numeric contract binds every function here: what it computes for one (token, row) or one
// (token, head) does not depend on how many tokens or rows share the call, nor on where a caller
// cuts the ranges. Two instruction sets need not give the same bits. kernels/scalar*.cpp is the
// definition: the others may order sums differently, and keep to what follows.
//
// Products of quantized weights. A weight is scale * code + minimum, where scale = d * (integer
// scale of the sub-block) and minimum likewise; both products are exact in float, as d has 11 bits
// and an integer scale at most 8. Codes here are signed, after the offset or the table. With the
// activations of 32 neighbours as s * code, a sub-block (32 weights; 16 of Q2_K, Q3_K, Q6_K) adds
//
//     total = fma(scale * s, float(dot), total)        dot = sum of code * code, exact
//     total = fma(minimum, s * float(sum), total)      types with a minimum; sum of the codes
//
// in the order of the blocks. Where 32 weights have two scales, they may instead be added at once:
// fma(s, fma(second scale, second dot, first scale * first dot), total). An offset may be taken out
// of unsigned codes as offset * sum. Integer scales may instead be folded into the dot of 32
// weights, where it fits 32 bits. At most, with |activation code| <= 32767:
//
//     type           |code|   dot of its sub-block   dot * integer scale, over 32 weights
//     Q4_0, Q4_1      8, 15    15.8e6                 no integer scale
//     Q5_0, Q5_1     16, 31    32.6e6                 no integer scale
//     Q8_0          128         134e6                 no integer scale; of code + 128: 268e6
//     IQ4_NL        127         134e6                 no integer scale
//     Q2_K            3         1.6e6                   48e6, minimums 16e6: may be folded
//     Q3_K            4         2.1e6                  135e6 (code + 4: 235e6): may be folded
//     Q4_K           15        15.8e6                  991e6, minimums 67e6: may be folded
//     Q5_K           31        32.6e6                2.048e9, minimums 67e6: just fits 2.147e9
//     Q6_K           32        16.8e6                  4.3e9: does NOT fit
//     IQ4_XS        127         134e6                  4.3e9: does NOT fit
//
// Fast products of quantized weights. The same, of activations rounded to 8 bits, s * f * 2^k *
// code: s of the token, f of 32 neighbours, k of each half of them (BytePiece). With dot = sum of
// code * code << k of the half, exact, they add
//
//     total = fma(scale * f, float(first dot + second dot), total)
//     total = fma(minimum, f * float(first sum + second sum), total)
//
// or, where the weights have a scale for each 16, the same for one half, then the other. scale * f
// is exact. In the end the product is s * total.
//
// Products of float weights take any number of columns. They are summed in parts of 512, each in
// the order of its columns, and then the sums of the parts in order.
//
// Products of I16 weights likewise take any number of columns, of inputs rounded to 16 bits with a
// scale for each run of 128 columns. Norms of codes are bounded so that their products, summed over
// a run, fit 32 bits. In the order of the runs is added
//
//     scale of the weights * scale of the inputs * float(dot)      dot = sum of code * code, exact
//
// Packed weights start at a multiple of 64 bytes. Vectors are aligned for their element, no more.
//
// A value that is not finite must reach the output as one. Only a slot of the KV cache at or past
// `length` is never looked at.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace smolrun {

// Tokens in a block of the KV cache; also the step in which attention sums.
inline constexpr int64_t kBlockTokens = 32;

// What the scale of a piece may be, times a power of two and the scale of its token.
inline constexpr int kByteFactors = 4;
inline constexpr float kByteFactor[kByteFactors] = {1.0f, 1.25f, 1.5f, 1.75f};
inline constexpr float kInverseByteFactor[kByteFactors] = {1.0f, 1 / 1.25f, 1 / 1.5f, 1 / 1.75f};
// A half whose largest number is below 2^-10 of its token's has the scale of one where it is that.
inline constexpr int kMostByteShift = 10;

// 32 inputs of one token, rounded to 8 bits: value = scale of the token * kByteFactor[factor] *
// 2^shift * code. Codes stand in order, so that four of them meet a quad. At most 127, they and
// their shifts keep sums of 32 products with bytes within 32 bits. A cache line, at a multiple of
// 64 bytes.
struct alignas(64) BytePiece {
    int8_t codes[32];
    int32_t shifts[2];      // of each half, 0 to kMostByteShift
    int32_t starts[2];      // -128 times the sum of the codes of each half
    int32_t eightfold_sum;  // 8 times the sum of the codes << the shift of their half
    float scaled_first;     // kByteFactor[factor] times the sum of the first half's codes << shift
    float scaled_sum;       // of both halves
    int32_t factor;
};

// 32 inputs of one token, rounded to 16 bits: value = scale * code. Codes stand in quad order,
// ready to be multiplied in pairs: weights 4i, 4i+2, 4i+1, 4i+3. A cache line, at a multiple of 64
// bytes.
struct alignas(64) WordPiece {
    int16_t codes[32];
};

// What goes with a WordPiece.
struct WordScale {
    float scale;
    float scaled_sum;      // scale * (sums[0] + sums[1])
    float scaled_sums[2];  // scale * sums[0], scale * sums[1]
    int32_t sums[2];       // of the codes of each half
};

// Inputs of a product.
//
// Products of float weights read `values`. Products of quantized weights read the same numbers
// rounded to 16 bits, in panels: the same piece of all tokens of a panel stands together. Then a
// tile of tokens reads one stretch of memory, where rows of a power of two, one after the other,
// would all want the same few lines of the cache.
struct Activations {
    int64_t columns;
    const float* values;       // [tokens][columns]
    int64_t panel;             // tokens in a panel, 1 to kPanelTokens; the last may have fewer
    const WordPiece* words;    // [panels][columns/32][panel]
    const WordScale* scales;   // [panels][columns/32][panel]
    const BytePiece* bytes;    // [panels][columns/32][panel], for fast products only
    const float* byte_scales;  // [tokens], what goes with them
    const int16_t* codes;      // [parts][code_stride][512], for products of I16 weights
    const float* code_scales;  // [parts][code_stride][4], of their runs
    int64_t code_stride;       // tokens between two parts
};

inline constexpr int64_t kPanelTokens = 32;  // at most

// Attention sums block by block within a segment, and then segment by segment: segments of one
// token may be computed by several threads.
inline constexpr int64_t kSegmentTokens = 256;
// Successive tokens of a sequence that may share a task, and with it each load of K and V.
inline constexpr int64_t kAttentionTokens = 12;

// K or V of a KV head in a block of the cache: codes of 16 bits, value = scale * code, then a float
// scale for each token.
//     K: codes [head_dim/2][32 tokens][2]           scales [32]
//     V: codes [16 pairs of tokens][head_dim][2]    scales [32]
// Neighbours whose products are summed stand together in a 32-bit word. The scale of v is
// max|v| / 32767; that of k is max(max|k| / 32767, |k| / 46300), so that the product of two vectors
// rounded in this way fits 32 bits: |q . k| <= |q| |k|.
constexpr int64_t kv_codes(int64_t head_dim) { return kBlockTokens * head_dim; }
constexpr int64_t kv_elements(int64_t head_dim) { return kv_codes(head_dim) + 2 * kBlockTokens; }

// What one head has of a segment, [head_dim + 16]: the weighted sum of V, then the largest score
// (as the kernel counts it) and the sum of the weights.
inline constexpr int64_t kPartialExtra = 16;

// Some successive tokens of a sequence, one KV head, and the query heads that share it.
struct AttentionTask {
    const float* q;  // [tokens][group][head_dim], rotated, not scaled
    float* out;      // [tokens][group][head_dim]
    int64_t tokens;  // 1 to kAttentionTokens
    int64_t stride;  // floats between two tokens of q, and of out
    int64_t group;   // query heads per KV head
    int64_t head_dim;
    int64_t length;              // tokens that the first one looks at: its position + 1
    float scale;                 // 1/sqrt(head_dim)
    const int16_t* pool;         // the KV cache
    const int32_t* block_table;  // [ceil((length + tokens - 1)/32)], block numbers of the sequence
    int64_t block_stride;        // elements between two blocks of the pool
    int64_t k_offset;            // of K of this layer and head in a block
    int64_t v_offset;            // likewise V
    float* scratch;              // attention_scratch() floats, the caller's
};

// For a tile of 12 rows values, codes of weights, sums of a vector each and reference; for all
// rows queries and their scale, maximum and sum; and what rounding each to vectors takes.
constexpr int64_t attention_scratch(int64_t group, int64_t head_dim) {
    return 12 * (head_dim + kBlockTokens / 2 + 16) + kAttentionTokens * group * (head_dim / 2 + 3) +
           5 * 16;
}

struct Kernels {
    const char* name;      // "scalar", "avx2", "avx512"
    int64_t panel_tokens;  // in a panel of inputs, where there are as many

    // out[t*out_stride + r - row_begin] = dot(weights row r, input t) for row_begin <= r < row_end.
    // row_begin is a multiple of 16; row_end too, or the number of rows.
    // scratch: kLinearScratch bytes, 64-byte aligned, the caller's.
    using Linear = void (*)(const Matrix& weights, const Activations& input, int64_t tokens,
                            int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                            std::byte* scratch);
    Linear linear[kWeightTypes];
    // The fast product. Null for float types and I16, and where it would be no faster.
    Linear fast_linear[kWeightTypes];

    // x[columns] -> words[columns/32], scales[columns/32], each `panel` apart.
    // columns is a multiple of 32. scale = max|x| / 32767; code = x * (32767 / max|x|), rounded to
    // nearest even, so never -32768. A block whose scale would be below the smallest normal float
    // (max|x| < 3.9e-34) counts as zero: scale and codes 0. A block that holds a non-finite value
    // gets a NaN scale and codes 0, so that whatever is computed from it is NaN too and is caught
    // at the logits.
    void (*quantize)(const float* x, int64_t columns, int64_t panel, WordPiece* words,
                     WordScale* scales);

    // x[columns] -> pieces[columns/32], `panel` apart, and the scale of all. With largest = max|x|
    // of the row, in float: scale = largest / (127 * 1024); each half counts as
    // at_least = clamp(max|x| of the half * (1024 / largest), 1, 1024); the factor of a piece is
    // the one that brings factor * 2^k nearest above its larger half, and the shift of a half the
    // least that does not fall below it; code = x * (127 * 1024 / largest * inverse factor *
    // 2^-shift), rounded to nearest even. A row whose scale would be below the smallest normal
    // float counts as zero; one that holds a non-finite value gets a NaN scale. Codes, shifts and
    // factors are then 0.
    void (*quantize_bytes)(const float* x, int64_t columns, int64_t panel, BytePiece* pieces,
                           float* scale);

    // x[columns] -> codes[parts][stride][512], with a zero after an odd number of them, and scales
    // [parts][stride][4]: scale = max(max|x| / 32767, |x| / 46300) of a run, |x| its norm; code =
    // x / scale, rounded to nearest even. Zeros and what is not finite are as of `quantize`.
    void (*quantize_runs)(const float* x, int64_t columns, int64_t stride, int16_t* codes,
                          float* scales);

    // Up to 512 weights, at any address -> codes of I16, with a zero after an odd number of them.
    // Returns their scale: the least power of two, from 2^-126 up, with max|w| <= 32767 * scale
    // and, in each run of 128, |w| <= 46300 * scale. code = w / scale, rounded to nearest even: so
    // most numbers of as few bits as these keep their value. Where one is not finite, the scale is
    // NaN and codes are 0. All instruction sets give the same.
    using Encode = float (*)(const std::byte* weights, int64_t count, int16_t* codes);
    Encode encode_f16, encode_bf16;

    // out = x / sqrt(mean(x^2) + epsilon) * weight, all [columns]. Squares are summed in double: a
    // finite input, however large, does not overflow into zeros.
    void (*rms_norm)(const float* x, const float* weight, int64_t columns, float epsilon,
                     float* out);

    // Rotates [heads][head_dim] in place, halves i and i + head_dim/2 by cosine/sine [head_dim/2].
    void (*rope)(float* heads, int64_t head_count, int64_t head_dim, const float* cosine,
                 const float* sine);

    // out = gate / (1 + exp(-gate)) * up, all [columns].
    void (*swiglu)(const float* gate, const float* up, int64_t columns, float* out);

    // out = exp((x - greatest) * factor), all [columns]; returns their sum. x is nowhere above
    // greatest, and may be -infinity; factor is above 0.
    double (*weigh)(const float* x, int64_t columns, float greatest, float factor, float* out);

    // out += x, both [columns].
    void (*add)(const float* x, int64_t columns, float* out);

    // Softmax(q k^T * scale) v over the blocks of one sequence. In a segment, blocks of 32 tokens
    // follow each other. The reference of a row is a score that none so far is above by more than a
    // factor of 256 in weight; segments start afresh and are merged in order. q is rounded as k is,
    // and the weights of a block, times the scales of V, to 16 bits with a common scale: their sums
    // are exact. (Scalar kernels round neither.) Of a token's last block only the first (length -
    // 1) % 32 + 1 slots count; what the others hold, NaN included, has no influence on it, so they
    // are skipped or selected away, never multiplied by zero.
    void (*attention)(const AttentionTask& task);

    // The same in two parts, for one token: one segment, partial[group][head_dim + 16]; and, for
    // one head, the merging of all segments: partial[segments], `stride` floats apart.
    void (*attend_segment)(const AttentionTask& task, int64_t segment, float* partial);
    void (*merge_segments)(const float* partial, int64_t segments, int64_t stride, int64_t head_dim,
                           float* out);

    // Stores one token's k and v [head_dim] of one KV head into slot `slot` (0..31) of a block,
    // each [kv_elements], rounded to nearest even. A vector whose scale would be below the smallest
    // normal float counts as zero; one that holds a non-finite value gets a NaN scale and codes 0.
    void (*store_kv)(const float* k, const float* v, int64_t head_dim, int64_t slot,
                     int16_t* k_block, int16_t* v_block);

    // One row of a weight as float32 [columns].
    using Dequantize = void (*)(const Matrix& weights, int64_t row, float* out);
    Dequantize dequantize[kWeightTypes];
};

inline constexpr int64_t kLinearScratch = 256 * 1024;  // bytes

extern const Kernels kScalarKernels;
#ifdef SMOLRUN_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace smolrun
