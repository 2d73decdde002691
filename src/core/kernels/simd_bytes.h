// Fast products of quantized weights: with inputs of 8 bits.
//
// For one token and for many alike, the codes of a vector of rows are unpacked into registers,
// where a tile of tokens meets them; the next tile unpacks them anew. So all add to a (token, row)
// the same exact integer sums in the same steps (add_bytes), and give the same bits.
#pragma once

#include "kernels.h"
#include "kernels/simd_pieces.h"

namespace smolrun {
namespace {

template <WeightType type>
constexpr int bits_of_code =
    packed_layout(type).lookup ? 8 : packed_layout(type).low_bits + packed_layout(type).high_bits;

// How far to the left they stand in their byte, and the offset they then have. (Types whose codes
// have no offset are left as they are.)
template <WeightType type>
constexpr int byte_shift = kTopmostBits && Format<type>::offset != 0 ? 8 - bits_of_code<type> : 0;
template <WeightType type>
constexpr int byte_offset = Format<type>::offset << byte_shift<type>;
// Whether the offset is taken out from the start, of each half, or in the end.
template <WeightType type>
constexpr bool offset_from_start =
    byte_offset<type> != 0 && (kTopmostBits || Format<type>::sub_blocks);

// The scales of a vector of rows in a piece, one for each half where the weights have two, times
// each factor that inputs may have: for many tokens multiplied once, for few when asked for.
template <WeightType type, bool few>
struct FactoredScales {
    static constexpr int parts = Format<type>::sub_blocks ? 2 : 1;
    static constexpr int factors = few ? 1 : kByteFactors;
    alignas(64) float products[parts][factors][kLanes];

    SMOLRUN_INLINE explicit FactoredScales(const Scales& scales) {
        constexpr float unit = 1.0f / (1 << byte_shift<type>);
        for (int part = 0; part < parts; ++part) {
            Floats scale = scales.scale;
            if constexpr (parts == 2) scale = mul(scale, to_floats(scales.sub_scale[part]));
            for (int i = 0; i < factors; ++i) {
                const float factor = kByteFactor[i] * unit;
                store(products[part][i], factor == 1 ? scale : mul(scale, broadcast(factor)));
            }
        }
    }
    SMOLRUN_INLINE Floats at(int part, int32_t factor) const {
        if constexpr (few) return mul(load(products[part][0]), broadcast(kByteFactor[factor]));
        return load(products[part][factor]);
    }
};

// What the sum over half a piece starts with.
template <WeightType type>
SMOLRUN_INLINE Words start_of_half(const BytePiece& input, int half) {
    if constexpr (!offset_from_start<type>) return zero_words();
    constexpr int smaller_by = 7 - __builtin_ctz(byte_offset<type> | 128);
    return shift_right_signed<smaller_by>(broadcast_word(input.starts[half]));
}

// Takes the offset out of a sum over a piece.
template <int offset>
SMOLRUN_INLINE Words without_offset(Words dot, const BytePiece& input) {
    static_assert(offset % 8 == 0);
    for (int i = 0; i < offset / 8; ++i) dot = sub(dot, broadcast_word(input.eightfold_sum));
    return dot;
}

// Adds one piece to the total of a vector of rows, which counts in scales of the token.
template <WeightType type, bool few>
SMOLRUN_INLINE Floats add_bytes(Floats total, const Words (&codes)[kPieceQuads],
                                const FactoredScales<type, few>& scales, const Floats (&minimum)[2],
                                const BytePiece& input) {
    using F = Format<type>;
    Words dots[2] = {start_of_half<type>(input, 0), start_of_half<type>(input, 1)};
    dot_halves<bits_of_code<type>>(codes, input.codes, dots);
    for (int half = 0; half < 2; ++half) dots[half] = shift_left_by(dots[half], input.shifts[half]);
    if constexpr (F::sub_blocks) {
        for (int half = 0; half < 2; ++half) {
            total = fma(scales.at(half, input.factor), to_floats(dots[half]), total);
            if constexpr (F::minimums == 2) {
                const float sum =
                    half == 0 ? input.scaled_first : input.scaled_sum - input.scaled_first;
                total = fma(minimum[half], broadcast(sum), total);
            }
        }
    } else {
        Words dot = add(dots[0], dots[1]);
        if constexpr (!offset_from_start<type>) dot = without_offset<byte_offset<type>>(dot, input);
        total = fma(scales.at(0, input.factor), to_floats(dot), total);
        if constexpr (F::minimums == 1) {
            total = fma(minimum[0], broadcast(input.scaled_sum), total);
        }
    }
    return total;
}

// ---- products

template <WeightType type, int quad = 0>
SMOLRUN_INLINE void read_quads(const std::byte* low, const std::byte* high,
                               Words (&out)[kPieceQuads]) {
    out[quad] = read_quad<type, quad, byte_shift<type>>(low, high);
    if constexpr (quad + 1 < kPieceQuads) read_quads<type, quad + 1>(low, high, out);
}

// Some tokens of a panel, from the first of a tile on.
struct BytePanel {
    const BytePiece* pieces;  // [pieces][panel]
    const float* scales;      // [tokens]
    int64_t panel;
};

// A tile of tokens and one group of rows, of which there are `rows`.
template <WeightType type, int tokens, Stretch stretch = Stretch::brief>
void multiply_byte_tile(const Matrix& weights, const BytePanel& input, int64_t row, int64_t rows,
                        float* out, int64_t out_stride) {
    using F = Format<type>;
    const int64_t blocks = weights.columns / kPieceWeights / F::block_pieces;
    const std::byte* block = weights.data + row / kGroupRows * blocks * F::block_bytes;
    const BytePiece* pieces = input.pieces;
    Floats totals[kGroupVectors][tokens];
    for (auto& of_vector : totals) {
        for (Floats& total : of_vector) total = broadcast(0.0f);
    }
    for (int64_t b = 0; b < blocks; ++b, block += F::block_bytes) {
        for (int piece = 0; piece < F::block_pieces; ++piece, pieces += input.panel) {
            prefetch_ahead<type, stretch>(block, piece);
            for (int v = 0; v < kGroupVectors; ++v) {
                const int lane = v * kLanes;
                Words codes[kPieceQuads];
                read_quads<type>(low_plane<type>(block, piece, lane),
                                 high_plane<type>(block, piece, lane), codes);
                const Scales of_piece = read_scales<type>(block, piece, lane);
                const FactoredScales<type, (tokens <= kByteFactors)> scales(of_piece);
#pragma GCC unroll kByteTileUnrolled
                for (int t = 0; t < tokens; ++t) {
                    totals[v][t] =
                        add_bytes(totals[v][t], codes, scales, of_piece.minimum, pieces[t]);
                }
            }
        }
    }
    for (int v = 0; v < kGroupVectors && v * kLanes < rows; ++v) {
        const int64_t count = smaller(kLanes, rows - v * kLanes);
        for (int t = 0; t < tokens; ++t) {
            store_up_to(out + t * out_stride + v * kLanes,
                        mul(totals[v][t], broadcast(input.scales[t])), count);
        }
    }
}

// A tile of `count` tokens, at most `most`.
template <WeightType type, int most = kByteTileTokens>
void multiply_byte_tile_of(int64_t count, const Matrix& weights, const BytePanel& input,
                           int64_t row, int64_t rows, float* out, int64_t out_stride) {
    if constexpr (most > 1) {
        if (count < most) {
            multiply_byte_tile_of<type, most - 1>(count, weights, input, row, rows, out,
                                                  out_stride);
            return;
        }
    }
    multiply_byte_tile<type, most>(weights, input, row, rows, out, out_stride);
}

// One group of rows at a time, which the tiles after the first find in the cache.
template <WeightType type>
void multiply_bytes(const Matrix& weights, const Activations& input, int64_t tokens,
                    int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                    std::byte* /*scratch*/) {
    const int64_t pieces = weights.columns / kPieceWeights;
    if (tokens == 1 && is_extended<type>(weights.columns, row_end - row_begin)) {
        const BytePanel panel{input.bytes, input.byte_scales, input.panel};
        for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
            multiply_byte_tile<type, 1, Stretch::extended>(weights, panel, row,
                                                           smaller(kGroupRows, row_end - row),
                                                           out + row - row_begin, out_stride);
        }
        return;
    }
    for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
        const int64_t rows = smaller(kGroupRows, row_end - row);
        for (int64_t begin = 0; begin < tokens; begin += input.panel) {
            // As equal as can be: a tile costs one unpacking, however few tokens it has.
            const int64_t in_panel = smaller(input.panel, tokens - begin);
            const int64_t tiles = (in_panel + kByteTileTokens - 1) / kByteTileTokens;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = tile * in_panel / tiles;
                const int64_t count = (tile + 1) * in_panel / tiles - first;
                const int64_t token = begin + first;
                multiply_byte_tile_of<type>(
                    count, weights,
                    {input.bytes + begin * pieces + first, input.byte_scales + token, input.panel},
                    row, rows, out + token * out_stride + row - row_begin, out_stride);
            }
        }
    }
}

}  // namespace
}  // namespace smolrun
