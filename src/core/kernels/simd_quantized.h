// Products of quantized weights, and their rows as floats.
//
// Both products, for few and for many tokens, add to a (token, row) the same exact integer sums in
// the same steps (add_piece), so they give the same bits.
#pragma once

#include "kernels.h"
#include "kernels/simd_pieces.h"

namespace smolrun {
namespace {

// What a product needs to know of a weight type once codes are unpacked.
template <bool two_sums_, int minimums_>
struct Steps {
    static constexpr bool two_sums = two_sums_;
    static constexpr int minimums = minimums_;
};
template <WeightType type>
using StepsOf = Steps<Format<type>::two_sums, Format<type>::minimums>;

// The inputs of one token for one piece.
struct PieceInput {
    float scale;
    const int32_t* sums;  // [2]
};

// Adds one piece to the totals of a vector of rows: sums of codes times inputs, of which the second
// counts only where there are two, and minimums.
template <class Steps>
SMOLRUN_INLINE Floats add_piece(Floats total, const Words (&dots)[2], Floats scale,
                                const Floats (&minimum)[2], const PieceInput& input) {
    const Floats factor = mul(scale, broadcast(input.scale));
    total = fma(factor, to_floats(dots[0]), total);
    if constexpr (Steps::two_sums) total = fma(factor, to_floats(dots[1]), total);
    if constexpr (Steps::minimums == 1) {
        const float sum = input.scale * static_cast<float>(input.sums[0] + input.sums[1]);
        total = fma(minimum[0], broadcast(sum), total);
    } else if constexpr (Steps::minimums == 2) {
        for (int part = 0; part < 2; ++part) {
            const float sum = input.scale * static_cast<float>(input.sums[part]);
            total = fma(minimum[part], broadcast(sum), total);
        }
    }
    return total;
}

// ---- few tokens: straight from the packed weights

// Sums over the piece, offset and sub-block scales taken care of, from the sums over its two
// halves; or, for types without sub-blocks, over its even and odd words.
template <WeightType type>
SMOLRUN_INLINE void finish_dots(Words (&dots)[2], const Scales& scales, const int32_t* sums) {
    using F = Format<type>;
    if constexpr (F::sub_blocks) {
        for (int part = 0; part < 2; ++part) {
            if constexpr (F::offset != 0) {
                dots[part] = sub(dots[part], broadcast_word(F::offset * sums[part]));
            }
            dots[part] = mul(dots[part], scales.sub_scale[part]);
        }
        if constexpr (!F::two_sums) dots[0] = add(dots[0], dots[1]);
    } else {
        dots[0] = add(dots[0], dots[1]);
        if constexpr (F::offset != 0) {
            dots[0] = sub(dots[0], broadcast_word(F::offset * (sums[0] + sums[1])));
        }
    }
}

// One group of rows.
template <WeightType type, int tokens>
void multiply_directly(const Matrix& weights, const Activations& input, int64_t first_token,
                       int64_t row, int64_t row_end, float* out, int64_t out_stride) {
    using F = Format<type>;
    constexpr int halves = static_cast<int>(kGroupRows) / kLanes;
    const int64_t pieces = weights.columns / kPieceWeights;
    const int64_t blocks = pieces / F::block_pieces;
    const std::byte* block = weights.data + row / kGroupRows * blocks * F::block_bytes;
    const int16_t* codes = input.codes + first_token * weights.columns;
    const float* input_scale = input.scales + first_token * pieces;
    const int32_t* sums = input.sums + first_token * 2 * pieces;
    Floats totals[halves][tokens];
    for (auto& half : totals) {
        for (Floats& total : half) total = broadcast(0.0f);
    }
    for (int64_t b = 0; b < blocks; ++b, block += F::block_bytes) {
        prefetch(block + kPrefetchBytes, F::block_bytes);
        for (int piece = 0; piece < F::block_pieces; ++piece) {
            for (int half = 0; half < halves; ++half) {
                const int lane = half * kLanes;
                Words dots[tokens][2];
                for (auto& of_token : dots) of_token[0] = of_token[1] = zero_words();
                auto multiply = [&]<int quad>(Pairs pairs) SMOLRUN_INLINE_LAMBDA {
                    constexpr int first = F::sub_blocks ? quad / 4 : 0;
                    constexpr int second = F::sub_blocks ? quad / 4 : 1;
                    for (int t = 0; t < tokens; ++t) {
                        const int16_t* x = codes + t * weights.columns + 4 * quad;
                        dots[t][first] = dot(dots[t][first], pairs.even, broadcast_pair(x));
                        dots[t][second] = dot(dots[t][second], pairs.odd, broadcast_pair(x + 2));
                    }
                };
                each_quad<type>(block, piece, lane, multiply);
                const Scales scales = read_scales<type>(block, piece, lane);
                for (int t = 0; t < tokens; ++t) {
                    const PieceInput of_token{input_scale[t * pieces], sums + t * 2 * pieces};
                    finish_dots<type>(dots[t], scales, of_token.sums);
                    totals[half][t] = add_piece<StepsOf<type>>(
                        totals[half][t], dots[t], scales.scale, scales.minimum, of_token);
                }
            }
            codes += kPieceWeights;
            input_scale += 1;
            sums += 2;
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
struct Unpacked {
    Words codes[kPieceWords][vectors];
    Floats scale[vectors];
    Floats minimum[2][vectors];
};

// Unpacks the rows of one vector. Sub-block scales go into the codes.
template <WeightType type, int vectors>
SMOLRUN_INLINE void unpack(const std::byte* block, int piece, int lane, int vector,
                           Unpacked<vectors>& out) {
    using F = Format<type>;
    const Scales scales = read_scales<type>(block, piece, lane);
    Words factor[2] = {};
    if constexpr (F::sub_blocks) {
        for (int part = 0; part < 2; ++part) {
            const Words low = bit_and(scales.sub_scale[part], broadcast_word(0xffff));
            factor[part] = bit_or(low, shift_right<-16>(scales.sub_scale[part]));
        }
    }
    auto keep = [&]<int quad>(Pairs pairs) SMOLRUN_INLINE_LAMBDA {
        pairs = without_offset<type>(pairs);
        if constexpr (F::sub_blocks) {
            pairs.even = mul_16(pairs.even, factor[quad / 4]);
            pairs.odd = mul_16(pairs.odd, factor[quad / 4]);
        }
        store_words(&out.codes[2 * quad][vector], pairs.even);
        store_words(&out.codes[2 * quad + 1][vector], pairs.odd);
    };
    each_quad<type>(block, piece, lane, keep);
    out.scale[vector] = scales.scale;
    for (int i = 0; i < F::minimums; ++i) out.minimum[i][vector] = scales.minimum[i];
}

// Pieces that are unpacked at a time: few enough that they stay in the first-level cache.
constexpr int kUnpackedPieces = 8;

// Some pieces of a product, from `first_piece` of the row on; `out` holds the totals of the pieces
// before, none of which there are where `fresh`.
template <int vectors>
struct Part {
    const Unpacked<vectors>* pieces;
    int64_t first_piece, count;
    bool fresh;
    int64_t rows;  // how many of the vectors' rows there are
    float* out;    // [tokens][out_stride], from the first row
    int64_t out_stride;
};

template <class Steps, int vectors, int tokens>
void multiply_tile(const Part<vectors>& part, const Activations& input, int64_t first_token) {
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
    const int64_t first = first_token * row_pieces + part.first_piece;
    const int16_t* codes[tokens];
    for (int t = 0; t < tokens; ++t) {
        codes[t] = input.codes + first * kPieceWeights + t * input.columns;
    }
    const float* scale = input.scales + first;
    const int32_t* sums = input.sums + 2 * first;
    for (const Unpacked<vectors>*piece = part.pieces, *end = piece + part.count; piece < end;
         ++piece, ++scale, sums += 2) {
        constexpr int rounds = Steps::two_sums ? 2 : 1;
        for (int round = 0; round < rounds; ++round) {
            Words dots[tokens][vectors];
            for (auto& of_token : dots) {
                for (Words& one : of_token) one = zero_words();
            }
            constexpr int words = kPieceWords / rounds;
            // Hides where the pointers come from, so that the compiler addresses by them instead of
            // computing each address of the unrolled loop beforehand, more than it has registers.
            for (const int16_t*& of_token : codes) __asm__("" : "+r"(of_token));
            const auto* const rows = piece->codes + words * round;
#pragma GCC unroll 16
            for (int i = 0; i < words; ++i) {
                for (int t = 0; t < tokens; ++t) {
                    const Words pair = broadcast_pair(codes[t] + 2 * i);
                    for (int v = 0; v < vectors; ++v)
                        dots[t][v] = dot(dots[t][v], rows[i][v], pair);
                }
            }
            for (const int16_t*& of_token : codes) of_token += 2 * words;
            for (int t = 0; t < tokens; ++t) {
                const PieceInput of_token{scale[t * row_pieces], sums + 2 * t * row_pieces};
                for (int v = 0; v < vectors; ++v) {
                    // A round of two adds its own sum; minimums come with the last.
                    using Round = smolrun::Steps<false, Steps::two_sums ? 0 : Steps::minimums>;
                    const Floats minimum[2] = {piece->minimum[0][v], piece->minimum[1][v]};
                    totals[t][v] = add_piece<Round>(totals[t][v], {dots[t][v], dots[t][v]},
                                                    piece->scale[v], minimum, of_token);
                }
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

template <class Steps, int vectors, int tokens = kTileTokens>
void multiply_tiles(const Part<vectors>& part, const Activations& input, int64_t first_token,
                    int64_t end) {
    for (; first_token + tokens <= end; first_token += tokens) {
        multiply_tile<Steps, vectors, tokens>(part, input, first_token);
    }
    if constexpr (tokens > 1) {
        if (first_token < end) {
            multiply_tiles<Steps, vectors, tokens - 1>(part, input, first_token, end);
        }
    }
}

// A tile of `vectors` vectors of rows, from the start of a group on.
template <WeightType type, int vectors>
void multiply_rows(const Matrix& weights, const Activations& input, int64_t tokens, int64_t row,
                   int64_t row_end, float* out, int64_t out_stride, std::byte* scratch) {
    using F = Format<type>;
    constexpr int halves = static_cast<int>(kGroupRows) / kLanes;
    static_assert(sizeof(Unpacked<vectors>) * kUnpackedPieces <= kLinearScratch);
    auto* const unpacked = reinterpret_cast<Unpacked<vectors>*>(scratch);
    const int64_t pieces = weights.columns / kPieceWeights;
    const int64_t group_bytes = pieces / F::block_pieces * F::block_bytes;
    for (int64_t first = 0; first < pieces; first += kUnpackedPieces) {
        const int64_t count = smaller(kUnpackedPieces, pieces - first);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t block = (first + i) / F::block_pieces;
            const int piece = static_cast<int>((first + i) % F::block_pieces);
            for (int v = 0; v < vectors; ++v) {
                const int64_t group = row / kGroupRows + v / halves;
                const std::byte* const from =
                    weights.data + group * group_bytes + block * F::block_bytes;
                // What the next unpacking reads comes while this one is multiplied.
                if (piece == 0 && v % halves == 0) {
                    prefetch(from + kUnpackedPieces / F::block_pieces * F::block_bytes,
                             F::block_bytes);
                }
                unpack<type>(from, piece, v % halves * kLanes, v, unpacked[i]);
            }
        }
        const Part<vectors> part{unpacked,      first, count,     first == 0,
                                 row_end - row, out,   out_stride};
        multiply_tiles<StepsOf<type>, vectors>(part, input, 0, tokens);
    }
}

// Few tokens: one group of rows at a time, which the passes after the first find in the cache.
template <WeightType type, int tokens = kDirectTokens>
void multiply_few(const Matrix& weights, const Activations& input, int64_t first_token, int64_t end,
                  int64_t row, int64_t row_end, float* out, int64_t out_stride) {
    for (; first_token + tokens <= end; first_token += tokens) {
        multiply_directly<type, tokens>(weights, input, first_token, row, row_end, out, out_stride);
    }
    if constexpr (tokens > 1) {
        if (first_token < end) {
            multiply_few<type, tokens - 1>(weights, input, first_token, end, row, row_end, out,
                                           out_stride);
        }
    }
}

template <WeightType type>
void multiply_quantized(const Matrix& weights, const Activations& input, int64_t tokens,
                        int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                        std::byte* scratch) {
    constexpr int64_t tile_rows = kTileVectors * kLanes;
    constexpr int group_vectors = static_cast<int>(kGroupRows) / kLanes;
    const bool few = tokens <= kFewTokens;
    for (int64_t row = row_begin; row < row_end; row += few ? kGroupRows : tile_rows) {
        float* const to = out + row - row_begin;
        if (few) {
            multiply_few<type>(weights, input, 0, tokens, row, smaller(row + kGroupRows, row_end),
                               to, out_stride);
        } else if (group_vectors < kTileVectors && row + kGroupRows >= row_end) {
            multiply_rows<type, group_vectors>(weights, input, tokens, row, row_end, to, out_stride,
                                               scratch);
        } else {
            multiply_rows<type, kTileVectors>(weights, input, tokens, row, row_end, to, out_stride,
                                              scratch);
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
