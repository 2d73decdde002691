// Exact products of many tokens, where registers are too few for the tiles of simd_quantized.h:
// codes are unpacked once for all tokens, and tiles have two vectors of rows, which share the
// loading of an input. Sums are added in the same steps as there, so they give the same bits.
#pragma once

#include "kernels.h"
#include "kernels/simd_pieces.h"

namespace smolrun {
namespace {

// What a product needs to know of a weight type once codes are unpacked.
template <bool two_scales_, int minimums_>
struct UnpackedSteps {
    static constexpr int parts = two_scales_ ? 2 : 1;
    static constexpr int minimums = minimums_;
};

// A piece of a group of rows: signed codes, and weight = scale * code + minimum.
struct Unpacked {
    Words codes[kPieceWords][kGroupVectors];
    Floats scale[2][kGroupVectors];
    Floats minimum[2][kGroupVectors];
};

template <WeightType type>
SMOLRUN_INLINE void unpack(const std::byte* block, int piece, int vector, Unpacked& out) {
    using F = Format<type>;
    const int lane = vector * kLanes;
    auto keep = [&]<int quad>(Pairs pairs) SMOLRUN_INLINE_LAMBDA {
        pairs = without_offset<type>(pairs);
        store_words(&out.codes[2 * quad][vector], pairs.even);
        store_words(&out.codes[2 * quad + 1][vector], pairs.odd);
    };
    each_quad<type>(block, piece, lane, keep);
    const Scales scales = read_scales<type>(block, piece, lane);
    out.scale[0][vector] = scales.scale;
    if constexpr (F::sub_blocks) {
        for (int part = 0; part < 2; ++part) {
            out.scale[part][vector] = mul(scales.scale, to_floats(scales.sub_scale[part]));
        }
    }
    for (int i = 0; i < F::minimums; ++i) out.minimum[i][vector] = scales.minimum[i];
}

// Pieces that are unpacked at a time: few enough that they stay in the first-level cache.
constexpr int kUnpackedPieces = 8;

// Some pieces of a group of rows; `out` holds the totals of the pieces before, none of which there
// are where `fresh`.
struct UnpackedPart {
    const Unpacked* pieces;
    int64_t count;
    bool fresh;
    int64_t rows;  // how many of the group's there are
};

template <class Steps, int tokens>
void multiply_unpacked_tile(const UnpackedPart& part, const WordPiece* words,
                            const WordScale* scales, int64_t panel, float* out,
                            int64_t out_stride) {
    constexpr int vectors = kGroupVectors, parts = Steps::parts;
    const auto lanes = [&](int v) { return smaller(kLanes, part.rows - v * kLanes); };
    Floats totals[tokens][vectors];
    for (int t = 0; t < tokens; ++t) {
        for (int v = 0; v < vectors; ++v) {
            totals[t][v] = part.fresh || lanes(v) <= 0
                               ? broadcast(0.0f)
                               : load_up_to(out + t * out_stride + v * kLanes, lanes(v));
        }
    }
    for (const Unpacked *piece = part.pieces, *end = piece + part.count; piece < end;
         ++piece, words += panel, scales += panel) {
        Floats scaled[tokens][vectors];
        for (int half = 0; half < parts; ++half) {
            Words dots[tokens][vectors];
            for (auto& of_token : dots) {
                for (Words& one : of_token) one = zero_words();
            }
            const int first = half * kPieceWords / 2;
#pragma GCC unroll 16
            for (int i = 0; i < kPieceWords / parts; ++i) {
                for (int t = 0; t < tokens; ++t) {
                    const Words pair = broadcast_pair(words[t].codes + 2 * (first + i));
                    for (int v = 0; v < vectors; ++v) {
                        dots[t][v] = dot(dots[t][v], piece->codes[first + i][v], pair);
                    }
                }
            }
            for (int t = 0; t < tokens; ++t) {
                const Floats of_input = broadcast(scales[t].scale);
                for (int v = 0; v < vectors; ++v) {
                    const Floats scale = piece->scale[half][v], sum = to_floats(dots[t][v]);
                    if constexpr (parts == 1) {
                        totals[t][v] = fma(mul(scale, of_input), sum, totals[t][v]);
                    } else if (half == 0) {
                        scaled[t][v] = mul(scale, sum);
                    } else {
                        totals[t][v] = fma(of_input, fma(scale, sum, scaled[t][v]), totals[t][v]);
                    }
                }
            }
        }
        for (int i = 0; i < Steps::minimums; ++i) {
            for (int t = 0; t < tokens; ++t) {
                const Floats sum = broadcast(Steps::minimums == 1 ? scales[t].scaled_sum
                                                                  : scales[t].scaled_sums[i]);
                for (int v = 0; v < vectors; ++v) {
                    totals[t][v] = fma(piece->minimum[i][v], sum, totals[t][v]);
                }
            }
        }
    }
    for (int t = 0; t < tokens; ++t) {
        for (int v = 0; v < vectors; ++v) {
            if (lanes(v) <= 0) break;
            store_up_to(out + t * out_stride + v * kLanes, totals[t][v], lanes(v));
        }
    }
}

// What is left of a panel, from `token` on.
template <class Steps, int tokens = kUnpackedTileTokens>
SMOLRUN_INLINE void multiply_unpacked_panel(const UnpackedPart& part, const WordPiece* words,
                                            const WordScale* scales, int64_t panel, int64_t token,
                                            int64_t end, float* out, int64_t out_stride) {
    for (; token + tokens <= end; token += tokens) {
        multiply_unpacked_tile<Steps, tokens>(part, words + token, scales + token, panel,
                                              out + token * out_stride, out_stride);
    }
    if constexpr (tokens > 1) {
        if (token < end) {
            multiply_unpacked_panel<Steps, tokens - 1>(part, words, scales, panel, token, end, out,
                                                       out_stride);
        }
    }
}

// A group of rows.
template <WeightType type>
void multiply_unpacked(const std::byte* group, const Activations& input, int64_t tokens,
                       int64_t rows, float* out, int64_t out_stride, std::byte* scratch) {
    using F = Format<type>;
    static_assert(sizeof(Unpacked) * kUnpackedPieces <= kLinearScratch);
    auto* const unpacked = reinterpret_cast<Unpacked*>(scratch);
    const int64_t pieces = input.columns / kPieceWeights;
    for (int64_t first = 0; first < pieces; first += kUnpackedPieces) {
        const UnpackedPart part{unpacked, smaller(kUnpackedPieces, pieces - first), first == 0,
                                rows};
        for (int64_t i = 0; i < part.count; ++i) {
            const std::byte* const block = group + (first + i) / F::block_pieces * F::block_bytes;
            const int piece = static_cast<int>((first + i) % F::block_pieces);
            prefetch_ahead<type, Stretch::brief>(block, piece);
            for (int v = 0; v < kGroupVectors; ++v) unpack<type>(block, piece, v, unpacked[i]);
        }
        for (int64_t token = 0; token < tokens; token += input.panel) {
            const int64_t at = token * pieces + first * input.panel;
            multiply_unpacked_panel<UnpackedSteps<F::sub_blocks, F::minimums>>(
                part, input.words + at, input.scales + at, input.panel, 0,
                smaller(input.panel, tokens - token), out + token * out_stride, out_stride);
        }
    }
}

}  // namespace
}  // namespace smolrun
