// Fast products of quantized weights: with inputs of 8 bits.
//
// As in simd_quantized.h, the products for few and for many tokens add to a (token, row) the same
// exact integer sums in the same steps (add_bytes), so they give the same bits.
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

// ---- few tokens: straight from the packed weights

template <WeightType type, int half, int tokens>
SMOLRUN_INLINE void dot_half(const std::byte* low, const std::byte* high, const BytePiece* input,
                             int64_t pieces, Words (&dots)[tokens][2]) {
    const Words a = read_quad<type, 4 * half>(low, high);
    const Words b = read_quad<type, 4 * half + 1>(low, high);
    const Words c = read_quad<type, 4 * half + 2>(low, high);
    const Words d = read_quad<type, 4 * half + 3>(low, high);
    for (int t = 0; t < tokens; ++t) {
        dots[t][half] = half_dot<ByteStepsOf<type>>(a, b, c, d, input[t * pieces], half);
    }
}

// One group of rows.
template <WeightType type, int tokens>
void multiply_bytes_directly(const Matrix& weights, const Activations& input, int64_t first_token,
                             int64_t row, int64_t row_end, float* out, int64_t out_stride) {
    using F = Format<type>;
    constexpr int halves = static_cast<int>(kGroupRows) / kLanes;
    const int64_t pieces = weights.columns / kPieceWeights;
    const int64_t blocks = pieces / F::block_pieces;
    const std::byte* block = weights.data + row / kGroupRows * blocks * F::block_bytes;
    const BytePiece* from = input.bytes + first_token * pieces;
    Floats totals[halves][tokens];
    for (auto& half : totals) {
        for (Floats& total : half) total = broadcast(0.0f);
    }
    for (int64_t b = 0; b < blocks; ++b, block += F::block_bytes) {
        prefetch(block + kPrefetchBytes, F::block_bytes);
        for (int piece = 0; piece < F::block_pieces; ++piece, ++from) {
            for (int half = 0; half < halves; ++half) {
                const int lane = half * kLanes;
                const std::byte* const low = low_plane<type>(block, piece, lane);
                const std::byte* const high = high_plane<type>(block, piece, lane);
                Words dots[tokens][2];
                dot_half<type, 0>(low, high, from, pieces, dots);
                dot_half<type, 1>(low, high, from, pieces, dots);
                const HalfScales scales = half_scales<type>(block, piece, lane);
                for (int t = 0; t < tokens; ++t) {
                    totals[half][t] = add_bytes<ByteStepsOf<type>>(
                        totals[half][t], dots[t], scales.scale, scales.minimum, from[t * pieces]);
                }
            }
        }
    }
    for (int half = 0; half < halves; ++half) {
        const int64_t rows = row_end - row - half * kLanes;
        if (rows <= 0) break;
        for (int t = 0; t < tokens; ++t) {
            store_up_to(out + (first_token + t) * out_stride + half * kLanes, totals[half][t],
                        smaller(kLanes, rows));
        }
    }
}

// ---- many tokens: codes unpacked once for all of them

// A piece of `vectors` vectors of rows, ready to multiply.
template <int vectors>
struct UnpackedBytes {
    Words codes[vectors][kPieceQuads];
    HalfScales scales[vectors];
};

template <WeightType type, int quad = 0>
SMOLRUN_INLINE void unpack_quads(const std::byte* low, const std::byte* high,
                                 Words (&out)[kPieceQuads]) {
    store_words(&out[quad], read_quad<type, quad>(low, high));
    if constexpr (quad + 1 < kPieceQuads) unpack_quads<type, quad + 1>(low, high, out);
}

// Unpacks the rows of one vector.
template <WeightType type, int vectors>
SMOLRUN_INLINE void unpack_bytes(const std::byte* block, int piece, int lane, int vector,
                                 UnpackedBytes<vectors>& out) {
    unpack_quads<type>(low_plane<type>(block, piece, lane), high_plane<type>(block, piece, lane),
                       out.codes[vector]);
    out.scales[vector] = half_scales<type>(block, piece, lane);
}

// Pieces that are unpacked at a time: few enough that they stay in the first-level cache.
constexpr int kUnpackedBytePieces = 16;

// Some pieces of a product, from `first_piece` of the row on; `out` holds the totals of the pieces
// before, none of which there are where `fresh`.
template <int vectors>
struct BytePart {
    const UnpackedBytes<vectors>* pieces;
    int64_t first_piece, count;
    bool fresh;
    int64_t rows;  // how many of the vectors' rows there are
    float* out;    // [tokens][out_stride], from the first row
    int64_t out_stride;
};

template <class Steps, int vectors, int tokens>
void multiply_byte_tile(const BytePart<vectors>& part, const Activations& input,
                        int64_t first_token) {
    const int64_t row_pieces = input.columns / kPieceWeights;
    const auto lanes = [&](int v) { return smaller(kLanes, part.rows - v * kLanes); };
    float* const out = part.out + first_token * part.out_stride;

    Floats totals[tokens][vectors];
    for (int t = 0; t < tokens; ++t) {
        for (int v = 0; v < vectors; ++v) {
            const float* from = out + t * part.out_stride + v * kLanes;
            totals[t][v] = part.fresh ? broadcast(0.0f) : load_up_to(from, lanes(v));
        }
    }
    const BytePiece* from = input.bytes + first_token * row_pieces + part.first_piece;
    for (int64_t i = 0; i < part.count; ++i, ++from) {
        const UnpackedBytes<vectors>& piece = part.pieces[i];
        for (int t = 0; t < tokens; ++t) {
            const BytePiece& of_token = from[t * row_pieces];
            for (int v = 0; v < vectors; ++v) {
                const Words(&codes)[kPieceQuads] = piece.codes[v];
                const Words dots[2] = {
                    half_dot<Steps>(codes[0], codes[1], codes[2], codes[3], of_token, 0),
                    half_dot<Steps>(codes[4], codes[5], codes[6], codes[7], of_token, 1)};
                totals[t][v] = add_bytes<Steps>(totals[t][v], dots, piece.scales[v].scale,
                                                piece.scales[v].minimum, of_token);
            }
        }
    }
    for (int t = 0; t < tokens; ++t) {
        for (int v = 0; v < vectors; ++v) {
            if (lanes(v) <= 0) break;
            store_up_to(out + t * part.out_stride + v * kLanes, totals[t][v], lanes(v));
        }
    }
}

template <class Steps, int vectors, int tokens = kByteTileTokens>
void multiply_byte_tiles(const BytePart<vectors>& part, const Activations& input,
                         int64_t first_token, int64_t end) {
    for (; first_token + tokens <= end; first_token += tokens) {
        multiply_byte_tile<Steps, vectors, tokens>(part, input, first_token);
    }
    if constexpr (tokens > 1) {
        if (first_token < end) {
            multiply_byte_tiles<Steps, vectors, tokens - 1>(part, input, first_token, end);
        }
    }
}

// A tile of `vectors` vectors of rows, from the start of a group on.
template <WeightType type, int vectors>
void multiply_byte_rows(const Matrix& weights, const Activations& input, int64_t tokens,
                        int64_t row, int64_t row_end, float* out, int64_t out_stride,
                        std::byte* scratch) {
    using F = Format<type>;
    constexpr int halves = static_cast<int>(kGroupRows) / kLanes;
    static_assert(sizeof(UnpackedBytes<vectors>) * kUnpackedBytePieces <= kLinearScratch);
    auto* const unpacked = reinterpret_cast<UnpackedBytes<vectors>*>(scratch);
    const int64_t pieces = weights.columns / kPieceWeights;
    const int64_t group_bytes = pieces / F::block_pieces * F::block_bytes;
    for (int64_t first = 0; first < pieces; first += kUnpackedBytePieces) {
        const int64_t count = smaller(kUnpackedBytePieces, pieces - first);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t block = (first + i) / F::block_pieces;
            const int piece = static_cast<int>((first + i) % F::block_pieces);
            for (int v = 0; v < vectors; ++v) {
                const int64_t group = row / kGroupRows + v / halves;
                const std::byte* const from =
                    weights.data + group * group_bytes + block * F::block_bytes;
                // What the next unpacking reads comes while this one is multiplied.
                if (piece == 0 && v % halves == 0) {
                    prefetch(from + kUnpackedBytePieces / F::block_pieces * F::block_bytes,
                             F::block_bytes);
                }
                unpack_bytes<type>(from, piece, v % halves * kLanes, v, unpacked[i]);
            }
        }
        const BytePart<vectors> part{unpacked,      first, count,     first == 0,
                                     row_end - row, out,   out_stride};
        multiply_byte_tiles<ByteStepsOf<type>, vectors>(part, input, 0, tokens);
    }
}

// Few tokens: one group of rows at a time, which the passes after the first find in the cache.
template <WeightType type, int tokens = kDirectTokens>
void multiply_few_bytes(const Matrix& weights, const Activations& input, int64_t first_token,
                        int64_t end, int64_t row, int64_t row_end, float* out, int64_t out_stride) {
    for (; first_token + tokens <= end; first_token += tokens) {
        multiply_bytes_directly<type, tokens>(weights, input, first_token, row, row_end, out,
                                              out_stride);
    }
    if constexpr (tokens > 1) {
        if (first_token < end) {
            multiply_few_bytes<type, tokens - 1>(weights, input, first_token, end, row, row_end,
                                                 out, out_stride);
        }
    }
}

template <WeightType type>
void multiply_bytes(const Matrix& weights, const Activations& input, int64_t tokens,
                    int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                    std::byte* scratch) {
    constexpr int64_t tile_rows = kTileVectors * kLanes;
    constexpr int group_vectors = static_cast<int>(kGroupRows) / kLanes;
    const bool few = tokens <= kFewTokens;
    for (int64_t row = row_begin; row < row_end; row += few ? kGroupRows : tile_rows) {
        float* const to = out + row - row_begin;
        if (few) {
            multiply_few_bytes<type>(weights, input, 0, tokens, row,
                                     smaller(row + kGroupRows, row_end), to, out_stride);
        } else if (group_vectors < kTileVectors && row + kGroupRows >= row_end) {
            multiply_byte_rows<type, group_vectors>(weights, input, tokens, row, row_end, to,
                                                    out_stride, scratch);
        } else {
            multiply_byte_rows<type, kTileVectors>(weights, input, tokens, row, row_end, to,
                                                   out_stride, scratch);
        }
    }
}

}  // namespace
}  // namespace smolrun
