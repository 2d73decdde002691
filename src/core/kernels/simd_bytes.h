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

// What a fast product needs to know of a weight type once codes are unpacked.
template <int bits_, int offset_, bool sub_blocks_, int minimums_>
struct ByteSteps {
    static constexpr int bits = bits_, offset = offset_, minimums = minimums_;
    static constexpr bool sub_blocks = sub_blocks_;
};
template <WeightType type>
using ByteStepsOf = ByteSteps<bits_of_code<type>, Format<type>::offset, Format<type>::sub_blocks,
                              Format<type>::minimums>;

// Adds one piece to the total of a vector of rows. `dots`: of each half, offset taken out.
template <class Steps>
SMOLRUN_INLINE Floats add_bytes(Floats total, const Words (&dots)[2], const Floats (&scale)[2],
                                const Floats (&minimum)[2], const BytePiece& input) {
    const Floats first = broadcast(input.scales[0]), second = broadcast(input.scales[1]);
    if constexpr (Steps::sub_blocks) {
        total = fma(mul(scale[0], first), to_floats(dots[0]), total);
        total = fma(mul(scale[1], second), to_floats(dots[1]), total);
    } else {
        const Floats sum = fma(second, to_floats(dots[1]), mul(first, to_floats(dots[0])));
        total = fma(scale[0], sum, total);
    }
    if constexpr (Steps::minimums == 1) {
        total = fma(minimum[0], broadcast(input.scaled_sum), total);
    } else if constexpr (Steps::minimums == 2) {
        for (int half = 0; half < 2; ++half) {
            const float sum = input.scales[half] * static_cast<float>(input.sums[half]);
            total = fma(minimum[half], broadcast(sum), total);
        }
    }
    return total;
}

// The sums of half a piece: four words of codes, times the inputs.
template <class Steps>
SMOLRUN_INLINE Words half_dot(const Words& a, const Words& b, const Words& c, const Words& d,
                              const BytePiece& input, int half) {
    const Words dot = dot_16<Steps::bits>(a, b, c, d, input.codes + 16 * half);
    if constexpr (Steps::offset == 0) {
        return dot;
    } else {
        constexpr int shift = __builtin_ctz(static_cast<unsigned>(Steps::offset));
        static_assert(Steps::offset == 1 << shift);
        return sub(dot, shift_right<-shift>(broadcast_word(input.sums[half])));
    }
}

// weight = scale * code + minimum in each half of a piece.
struct HalfScales {
    Floats scale[2];
    Floats minimum[2];
};
template <WeightType type>
SMOLRUN_INLINE HalfScales half_scales(const std::byte* block, int piece, int lane) {
    using F = Format<type>;
    const Scales scales = read_scales<type>(block, piece, lane);
    HalfScales halves;
    for (int half = 0; half < 2; ++half) {
        halves.scale[half] = scales.scale;
        if constexpr (F::sub_blocks) {
            halves.scale[half] = mul(scales.scale, to_floats(scales.sub_scale[half]));
        }
        halves.minimum[half] = scales.minimum[F::minimums == 2 ? half : 0];
    }
    return halves;
}

// ---- products

template <WeightType type, int quad = 0>
SMOLRUN_INLINE void read_quads(const std::byte* low, const std::byte* high,
                               Words (&out)[kPieceQuads]) {
    out[quad] = read_quad<type, quad>(low, high);
    if constexpr (quad + 1 < kPieceQuads) read_quads<type, quad + 1>(low, high, out);
}

// Some tokens and one group of rows, of which there are `rows`.
template <WeightType type, int tokens>
void multiply_byte_tile(const Matrix& weights, const BytePiece* input, int64_t row, int64_t rows,
                        float* out, int64_t out_stride) {
    using F = Format<type>;
    using Steps = ByteStepsOf<type>;
    const int64_t pieces = weights.columns / kPieceWeights;
    const int64_t blocks = pieces / F::block_pieces;
    const std::byte* block = weights.data + row / kGroupRows * blocks * F::block_bytes;
    Floats totals[kGroupVectors][tokens];
    for (auto& of_vector : totals) {
        for (Floats& total : of_vector) total = broadcast(0.0f);
    }
    for (int64_t b = 0; b < blocks; ++b, block += F::block_bytes) {
        for (int piece = 0; piece < F::block_pieces; ++piece, ++input) {
            prefetch_ahead<type>(block, piece);
            for (int v = 0; v < kGroupVectors; ++v) {
                const int lane = v * kLanes;
                Words codes[kPieceQuads];
                read_quads<type>(low_plane<type>(block, piece, lane),
                                 high_plane<type>(block, piece, lane), codes);
                const HalfScales scales = half_scales<type>(block, piece, lane);
                for (int t = 0; t < tokens; ++t) {
                    const BytePiece& of_token = input[t * pieces];
                    const Words dots[2] = {
                        half_dot<Steps>(codes[0], codes[1], codes[2], codes[3], of_token, 0),
                        half_dot<Steps>(codes[4], codes[5], codes[6], codes[7], of_token, 1)};
                    totals[v][t] = add_bytes<Steps>(totals[v][t], dots, scales.scale,
                                                    scales.minimum, of_token);
                }
            }
        }
    }
    for (int v = 0; v < kGroupVectors && v * kLanes < rows; ++v) {
        const int64_t count = smaller(kLanes, rows - v * kLanes);
        for (int t = 0; t < tokens; ++t) {
            store_up_to(out + t * out_stride + v * kLanes, totals[v][t], count);
        }
    }
}

// A tile of `count` tokens, at most `most`.
template <WeightType type, int most = kByteTileTokens>
void multiply_byte_tile_of(int64_t count, const Matrix& weights, const BytePiece* input,
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
    // As equal as can be: a tile costs one unpacking, however few tokens it has.
    const int64_t tiles = (tokens + kByteTileTokens - 1) / kByteTileTokens;
    for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
        const int64_t rows = smaller(kGroupRows, row_end - row);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = tile * tokens / tiles;
            const int64_t count = (tile + 1) * tokens / tiles - first;
            multiply_byte_tile_of<type>(count, weights, input.bytes + first * pieces, row, rows,
                                        out + first * out_stride + row - row_begin, out_stride);
        }
    }
}

}  // namespace
}  // namespace smolrun
