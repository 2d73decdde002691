// Products of quantized weights, and their rows as floats.
//
// One template makes the product of any number of tokens, which adds to a (token, row) the same
// exact integer sums in the same steps whatever that number is, so they give the same bits. With
// AVX2 many tokens have another one, simd_unpacked.h.
#pragma once

#include "kernels.h"
#include "kernels/simd_pieces.h"
#include "kernels/simd_unpacked.h"

namespace smolrun {
namespace {

// The inputs of some tokens of a panel, from a piece on.
struct PanelInput {
    const WordPiece* words;   // [pieces][panel]
    const WordScale* scales;  // [pieces][panel]
};

// Sums of codes times codes: of a vector of rows with some tokens, over a piece, or over half of
// one where it has two scales.
template <WeightType type, int part, int tokens>
SMOLRUN_INLINE void dot_part(const std::byte* block, int piece, int lane, const PanelInput& input,
                             Words (&sums)[tokens]) {
    using F = Format<type>;
    constexpr int parts = F::sub_blocks ? 2 : 1;
    constexpr int quads = kPieceQuads / parts;
    // A second sum for each token where they are so few that one would wait for itself. And for so
    // few the offset is taken out of the sum; else out of the codes, once for all.
    constexpr bool few = tokens <= 2;
    constexpr int chains = few ? 2 : 1;
    Words dots[tokens][chains];
    for (auto& of_token : dots) {
        for (Words& one : of_token) one = zero_words();
    }
    auto multiply = [&]<int quad>(Pairs pairs) SMOLRUN_INLINE_LAMBDA {
        if constexpr (!few) pairs = without_offset<type>(pairs);
        for (int t = 0; t < tokens; ++t) {
            const int16_t* const codes = input.words[t].codes + 4 * quad;
            Words& last = dots[t][chains - 1];
            dots[t][0] = dot_pair(dots[t][0], pairs.even, codes);
            last = dot_pair(last, pairs.odd, codes + 2);
        }
    };
    each_quad<type, part * quads, (part + 1) * quads>(block, piece, lane, multiply);
    for (int t = 0; t < tokens; ++t) {
        sums[t] = dots[t][0];
        if constexpr (few) {
            sums[t] = add(sums[t], dots[t][1]);
            if constexpr (F::offset != 0) {
                constexpr int shift = __builtin_ctz(static_cast<unsigned>(F::offset));
                static_assert(F::offset == 1 << shift);
                const int32_t (&codes)[2] = input.scales[t].sums;
                const int32_t sum = parts == 2 ? codes[part] : codes[0] + codes[1];
                sums[t] = sub(sums[t], shift_right<-shift>(broadcast_word(sum)));
            }
        }
    }
}

// Adds a piece of a vector of rows to the totals of some tokens.
template <WeightType type, int tokens>
SMOLRUN_INLINE void add_piece(const std::byte* block, int piece, int lane, const PanelInput& input,
                              Floats (&totals)[tokens]) {
    using F = Format<type>;
    const Scales weights = read_scales<type>(block, piece, lane);
    Words sums[tokens];
    dot_part<type, 0>(block, piece, lane, input, sums);
    if constexpr (F::sub_blocks) {
        Floats scaled[tokens];
        const Floats first = mul(weights.scale, to_floats(weights.sub_scale[0]));
        for (int t = 0; t < tokens; ++t) scaled[t] = mul(first, to_floats(sums[t]));
        dot_part<type, 1>(block, piece, lane, input, sums);
        const Floats second = mul(weights.scale, to_floats(weights.sub_scale[1]));
        for (int t = 0; t < tokens; ++t) {
            scaled[t] = fma(second, to_floats(sums[t]), scaled[t]);
            totals[t] = fma(broadcast(input.scales[t].scale), scaled[t], totals[t]);
        }
    } else {
        for (int t = 0; t < tokens; ++t) {
            const Floats factor = mul(weights.scale, broadcast(input.scales[t].scale));
            totals[t] = fma(factor, to_floats(sums[t]), totals[t]);
        }
    }
    for (int t = 0; t < tokens; ++t) {
        const WordScale& with = input.scales[t];
        if constexpr (F::minimums == 1) {
            totals[t] = fma(weights.minimum[0], broadcast(with.scaled_sum), totals[t]);
        } else if constexpr (F::minimums == 2) {
            totals[t] = fma(weights.minimum[0], broadcast(with.scaled_sums[0]), totals[t]);
            totals[t] = fma(weights.minimum[1], broadcast(with.scaled_sums[1]), totals[t]);
        }
    }
}

// `vectors` vectors of rows, from row `lane` of a group on, times some tokens of a panel.
template <WeightType type, int vectors, int tokens, Stretch stretch = Stretch::brief>
void multiply_tile(const std::byte* block, int64_t blocks, int lane, PanelInput input,
                   int64_t panel, int64_t rows, float* out, int64_t out_stride) {
    using F = Format<type>;
    Floats totals[vectors][tokens];
    for (auto& of_vector : totals) {
        for (Floats& total : of_vector) total = broadcast(0.0f);
    }
    for (int64_t b = 0; b < blocks; ++b, block += F::block_bytes) {
        for (int piece = 0; piece < F::block_pieces; ++piece) {
            prefetch_ahead<type, stretch>(block, piece);
            for (int v = 0; v < vectors; ++v) {
                add_piece<type>(block, piece, lane + v * kLanes, input, totals[v]);
            }
            input.words += panel;
            input.scales += panel;
        }
    }
    for (int v = 0; v < vectors; ++v) {
        const int64_t left = rows - v * kLanes;
        if (left <= 0) break;
        for (int t = 0; t < tokens; ++t) {
            store_up_to(out + t * out_stride + v * kLanes, totals[v][t], smaller(kLanes, left));
        }
    }
}

// A group of rows times some tokens of a panel.
template <WeightType type, int tokens>
void multiply_group(const std::byte* group, int64_t blocks, const PanelInput& input, int64_t panel,
                    int64_t rows, float* out, int64_t out_stride) {
    // Many tokens leave registers for one vector only; few wait for the weights, which are then
    // better read in order.
    if constexpr (tokens <= 2) {
        multiply_tile<type, kGroupVectors, tokens>(group, blocks, 0, input, panel, rows, out,
                                                   out_stride);
    } else {
        for (int lane = 0; lane < smaller(kGroupRows, rows); lane += kLanes) {
            multiply_tile<type, 1, tokens>(group, blocks, lane, input, panel, rows - lane,
                                           out + lane, out_stride);
        }
    }
}

// A group of rows times what is left of a panel, from `token` on.
template <WeightType type,
          int tokens = Format<type>::sub_blocks ? kSubBlockTileTokens : kTileTokens>
SMOLRUN_INLINE void multiply_panel(const std::byte* group, int64_t blocks, const PanelInput& input,
                                   int64_t panel, int64_t token, int64_t end, int64_t rows,
                                   float* out, int64_t out_stride) {
    for (; token + tokens <= end; token += tokens) {
        multiply_group<type, tokens>(group, blocks, {input.words + token, input.scales + token},
                                     panel, rows, out + token * out_stride, out_stride);
    }
    if constexpr (tokens > 1) {
        if (token < end) {
            multiply_panel<type, tokens - 1>(group, blocks, input, panel, token, end, rows, out,
                                             out_stride);
        }
    }
}

template <WeightType type>
void multiply_quantized(const Matrix& weights, const Activations& input, int64_t tokens,
                        int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                        [[maybe_unused]] std::byte* scratch) {
    const int64_t pieces = weights.columns / kPieceWeights;
    const int64_t blocks = pieces / Format<type>::block_pieces;
    const bool extended = tokens == 1 && is_extended<type>(weights.columns, row_end - row_begin);
    for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
        const std::byte* const group =
            weights.data + row / kGroupRows * blocks * Format<type>::block_bytes;
        float* const to = out + row - row_begin;
        if (extended) {
            multiply_tile<type, kGroupVectors, 1, Stretch::extended>(
                group, blocks, 0, {input.words, input.scales}, input.panel, row_end - row, to,
                out_stride);
            continue;
        }
        if constexpr (kUnpackedTileTokens != 0) {
            if (tokens > 2 * kTileTokens) {
                multiply_unpacked<type>(group, input, tokens, row_end - row, to, out_stride,
                                        scratch);
                continue;
            }
        }
        for (int64_t token = 0; token < tokens; token += input.panel) {
            const PanelInput panel{input.words + token * pieces, input.scales + token * pieces};
            multiply_panel<type>(group, blocks, panel, input.panel, 0,
                                 smaller(input.panel, tokens - token), row_end - row,
                                 to + token * out_stride, out_stride);
        }
    }
}

// ---- rows as floats

template <WeightType type>
void dequantize_row(const Matrix& weights, int64_t row, float* out) {
    using F = Format<type>;
    const int64_t blocks = weights.columns / kPieceWeights / F::block_pieces;
    const std::byte* block = weights.data + row / kGroupRows * blocks * F::block_bytes;
    const int in_group = static_cast<int>(row % kGroupRows);
    const int lane = in_group / kLanes * kLanes;  // the first row of the vector
    const auto own = [&](Floats x) {
        float lanes[kLanes];
        store(lanes, x);
        return lanes[in_group - lane];
    };
    for (int64_t b = 0; b < blocks; ++b, block += F::block_bytes) {
        for (int piece = 0; piece < F::block_pieces; ++piece, out += kPieceWeights) {
            const Scales scales = read_scales<type>(block, piece, lane);
            float scale[2], minimum[2];
            for (int part = 0; part < 2; ++part) {
                scale[part] =
                    own(F::sub_blocks ? mul(scales.scale, to_floats(scales.sub_scale[part]))
                                      : scales.scale);
                minimum[part] = own(scales.minimum[F::sub_blocks ? part : 0]);
            }
            auto write = [&]<int quad>(Pairs pairs) SMOLRUN_INLINE_LAMBDA {
                pairs = without_offset<type>(pairs);
                int16_t even[kLanes][2], odd[kLanes][2];
                store_words(even, pairs.even);
                store_words(odd, pairs.odd);
                for (int i = 0; i < 4; ++i) {
                    const auto& codes = i % 2 == 0 ? even : odd;
                    float value =
                        scale[quad / 4] * static_cast<float>(codes[in_group - lane][i / 2]);
                    if constexpr (F::minimums != 0) value += minimum[quad / 4];
                    out[4 * quad + i] = value;
                }
            };
            each_quad<type>(block, piece, lane, write);
        }
    }
}

}  // namespace
}  // namespace smolrun
