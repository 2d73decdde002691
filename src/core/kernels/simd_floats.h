// Products of F32, F16 and BF16 weights, and the tiles of I16: a lane owns a row of a group
// (blocks.h).
//
// A (token, row) has one sum for each part of the columns (kFloatPartColumns), to which products
// are added in the order of the columns, and a total of these sums. Tiles only decide what shares a
// load.
#pragma once

#include "kernels.h"
#include "kernels/numbers.h"
#include "kernels/simd_common.h"
#include "packed.h"

namespace smolrun {
namespace {

// How weights meet inputs. A step has one column, or two where a word holds two. It is taken in
// `parts`, each of one input of four bytes.
template <WeightType type>
struct FloatProduct {
    using Sum = Floats;
    static constexpr int tile_tokens = kFloatTileTokens;
    // Steps in a sum, of which a part has one here; scales of its inputs.
    static constexpr int64_t run_steps = kFloatPartColumns;
    static constexpr int64_t scales = 0;
    static constexpr int step_columns = type == WeightType::BF16 ? 2 : 1;
    static constexpr int64_t step_bytes = kGroupRows * step_columns * layout(type).bytes;
    static constexpr int parts = step_columns;

    // The weights of one part, of the rows from lane `lane` on.
    template <int part>
    SMOLRUN_INLINE static Floats weights(const std::byte* step, int lane) {
        if constexpr (type == WeightType::F16) {
            return load_f16(step + 2 * lane);
        } else if constexpr (type == WeightType::F32) {
            return load(reinterpret_cast<const float*>(step) + lane);
        } else {
            const Words both = load_words(step + 4 * lane);
            return as_floats(part == 0 ? shift_right<-16>(both)
                                       : bit_and(both, broadcast_word(-0x10000)));
        }
    }
    SMOLRUN_INLINE static Floats input(const std::byte* at) {
        return broadcast(*reinterpret_cast<const float*>(at));
    }
    SMOLRUN_INLINE static Sum zero() { return broadcast(0.0f); }
    SMOLRUN_INLINE static Sum add(Floats weights, Floats input, Sum sum) {
        return fma(weights, input, sum);
    }
    // What a sum counts.
    SMOLRUN_INLINE static Floats value(Sum sum, const std::byte*, int, const float*) { return sum; }
};

// Some columns of some groups of rows, for some tokens.
struct FloatPart {
    const std::byte* weights;   // of the first group, from the first column on
    int64_t group_bytes;        // from one group to the next
    const std::byte* inputs;    // of the first token, from the first column on
    int64_t input_bytes;        // from one token to the next
    int64_t input_count;        // of four bytes
    const float* input_scales;  // [tokens][Product::scales]
    int64_t ahead;              // bytes to the weights that come next, to be asked for; 0: none
    int64_t rows;               // how many there are
    bool first;                 // else what is in `out` is added to
    float* out;                 // [tokens][out_stride]
    int64_t out_stride;
};

template <class Product, int vectors, int tokens>
void multiply_float_tile(const FloatPart& part) {
    constexpr int parts = Product::parts;
    const std::byte* weights[vectors];
    for (int v = 0; v < vectors; ++v) {
        weights[v] = part.weights + v / kGroupVectors * part.group_bytes;
    }
    // Every third token has a pointer, from which addresses reach the next two.
    const std::byte* inputs[(tokens + 2) / 3];
    for (int t = 0; t < tokens; t += 3) inputs[t / 3] = part.inputs + t * part.input_bytes;
    const int64_t steps = part.input_count / parts;
    int64_t step = 0;
    for (int run = 0; run == 0 || step < steps; ++run) {
        typename Product::Sum sums[tokens][vectors];
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sums[t][v] = Product::zero();
        }
        const auto multiply = [&]<int i>(int64_t at) SMOLRUN_INLINE_LAMBDA {
            decltype(Product::template weights<i>(nullptr, 0)) w[vectors];
            for (int v = 0; v < vectors; ++v) {
                w[v] = Product::template weights<i>(weights[v] + at * Product::step_bytes,
                                                    v % kGroupVectors * kLanes);
            }
#pragma GCC unroll 16
            for (int t = 0; t < tokens; ++t) {
                const std::byte* const of_token = inputs[t / 3] + t % 3 * part.input_bytes;
                const auto x = Product::input(of_token + 4 * (at * parts + i));
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v) sums[t][v] = Product::add(w[v], x, sums[t][v]);
            }
        };
        const int64_t end = smaller(steps, step + Product::run_steps);
#pragma GCC unroll 4
        for (; step < end; ++step) {
            multiply.template operator()<0>(step);
            if constexpr (parts == 2) multiply.template operator()<1>(step);
        }
        if (steps * parts < part.input_count) multiply.template operator()<0>(steps);
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
                const int64_t lanes = smaller(kLanes, part.rows - v * kLanes);
                if (lanes <= 0) break;
                float* const to = part.out + t * part.out_stride + v * kLanes;
                const Floats value =
                    Product::value(sums[t][v], weights[v], v % kGroupVectors * kLanes,
                                   part.input_scales + t * Product::scales + run);
                const bool first = part.first && run == 0;
                store_up_to(to, first ? value : add(load_up_to(to, lanes), value), lanes);
            }
        }
    }
}

// A tile of rows, for `count` tokens.
template <class Product, int vectors, int tokens>
void multiply_float_tokens(FloatPart part, int64_t count) {
    for (; count >= tokens; count -= tokens) {
        multiply_float_tile<Product, vectors, tokens>(part);
        part.inputs += tokens * part.input_bytes;
        part.input_scales += tokens * Product::scales;
        part.out += tokens * part.out_stride;
    }
    if constexpr (tokens > 1) {
        constexpr int fewer = tokens > kFewFloatTokens ? kFewFloatTokens : tokens - 1;
        if (count > 0) multiply_float_tokens<Product, vectors, fewer>(part, count);
    }
}

// Asks for the share of a tile of tokens in the weights that a tile of rows meets next.
SMOLRUN_INLINE void ask_ahead(const FloatPart& part, int64_t tile, int64_t tiles) {
    const int64_t bytes = (kCodePartBytes / tiles + 63) / 64 * 64;
    const int64_t groups = part.rows <= kGroupRows ? 1 : kTileVectors / kGroupVectors;
    for (int64_t group = 0; group < groups; ++group) {
        prefetch_far(part.weights + group * part.group_bytes + part.ahead + tile * bytes, bytes);
    }
}

// A part of the columns, for the rows [0, rows) and all tokens.
template <class Product>
void multiply_float_part(FloatPart part, int64_t rows, int64_t tokens) {
    const FloatPart start = part;
    constexpr int tile_tokens = Product::tile_tokens;
    for (int64_t token = 0; token < tokens; token += tile_tokens) {
        const int64_t count = smaller(tile_tokens, tokens - token);
        part.inputs = start.inputs + token * start.input_bytes;
        part.input_scales = start.input_scales + token * Product::scales;
        for (int64_t row = 0; row < rows; row += kTileVectors * kLanes) {
            part.weights = start.weights + row / kGroupRows * start.group_bytes;
            part.rows = rows - row;
            part.out = start.out + token * start.out_stride + row;
            if (part.ahead != 0) ask_ahead(part, token / tile_tokens, tokens / tile_tokens);
            if (kGroupVectors < kTileVectors && part.rows <= kGroupRows) {
                multiply_float_tokens<Product, kGroupVectors, tile_tokens>(part, count);
            } else {
                multiply_float_tokens<Product, kTileVectors, tile_tokens>(part, count);
            }
        }
    }
}

// Few tokens: one stream through memory, which the CPU foresees better than several. More of them:
// a tile's inputs stay in the first-level cache, and the weights of a block in the second.
constexpr int64_t kFloatBlockRows = 128;

// `inputs`: [tokens][stride], of four bytes each.
template <class Product>
void multiply_float_rows(const Matrix& weights, const void* inputs, int64_t stride, int64_t tokens,
                         int64_t row_begin, int64_t row_end, float* out, int64_t out_stride) {
    const int64_t block_rows = tokens <= kFewFloatTokens ? kGroupRows : kFloatBlockRows;
    constexpr int64_t step_columns = Product::step_columns, step_bytes = Product::step_bytes;
    const int64_t columns = weights.columns;
    const int64_t group_bytes = (columns + step_columns - 1) / step_columns * step_bytes;
    for (int64_t row = row_begin; row < row_end; row += block_rows) {
        for (int64_t column = 0; column < columns; column += kFloatPartColumns) {
            const int64_t count = smaller(kFloatPartColumns, columns - column);
            const int64_t step = column / step_columns;
            FloatPart part{};
            part.weights = weights.data + row / kGroupRows * group_bytes + step * step_bytes;
            part.group_bytes = group_bytes;
            part.inputs = static_cast<const std::byte*>(inputs) + 4 * step * Product::parts;
            part.input_bytes = 4 * stride;
            part.input_count = (count * Product::parts + step_columns - 1) / step_columns;
            part.first = column == 0;
            part.out = out + row - row_begin;
            part.out_stride = out_stride;
            multiply_float_part<Product>(part, smaller(block_rows, row_end - row), tokens);
        }
    }
}

// Some columns of a group of rows as float32: out[columns][16].
template <WeightType type>
void convert_group(const std::byte* weights, int64_t columns, float* out) {
    using Product = FloatProduct<type>;
    for (int64_t column = 0; column < columns; column += Product::step_columns) {
        for (int lane = 0; lane < kGroupRows; lane += kLanes) {
            store(out + lane, Product::template weights<0>(weights, lane));
            if (Product::parts == 2 && column + 1 < columns) {
                store(out + kGroupRows + lane,
                      Product::template weights<Product::parts - 1>(weights, lane));
            }
        }
        weights += Product::step_bytes;
        out += kGroupRows * Product::step_columns;
    }
}

// As multiply_float_rows, for so many tokens that a block is converted once for all of them.
template <WeightType type>
void multiply_converted_rows(const Matrix& weights, const float* inputs, int64_t tokens,
                             int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                             float* converted) {
    static_assert(kFloatBlockRows * kFloatPartColumns * int64_t{sizeof(float)} <= kLinearScratch);
    using Product = FloatProduct<type>;
    const int64_t columns = weights.columns;
    const int64_t group_bytes =
        (columns + Product::step_columns - 1) / Product::step_columns * Product::step_bytes;
    for (int64_t row = row_begin; row < row_end; row += kFloatBlockRows) {
        const int64_t rows = smaller(kFloatBlockRows, row_end - row);
        for (int64_t column = 0; column < columns; column += kFloatPartColumns) {
            const int64_t count = smaller(kFloatPartColumns, columns - column);
            const std::byte* group = weights.data + row / kGroupRows * group_bytes +
                                     column / Product::step_columns * Product::step_bytes;
            for (int64_t i = 0; i < rows; i += kGroupRows, group += group_bytes) {
                convert_group<type>(group, count, converted + i * count);
            }
            FloatPart part{};
            part.weights = reinterpret_cast<const std::byte*>(converted);
            part.group_bytes = kGroupRows * count * int64_t{sizeof(float)};
            part.inputs = reinterpret_cast<const std::byte*>(inputs + column);
            part.input_bytes = columns * int64_t{sizeof(float)};
            part.input_count = count;
            part.first = column == 0;
            part.out = out + row - row_begin;
            part.out_stride = out_stride;
            multiply_float_part<FloatProduct<WeightType::F32>>(part, rows, tokens);
        }
    }
}

template <WeightType type>
void multiply_floats(const Matrix& weights, const Activations& input, int64_t tokens,
                     int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                     [[maybe_unused]] std::byte* scratch) {
    constexpr int least = type == WeightType::F16    ? kConvertedF16Tokens
                          : type == WeightType::BF16 ? kConvertedBf16Tokens
                                                     : 0;
    if constexpr (least != 0) {
        if (tokens >= least) {
            multiply_converted_rows<type>(weights, input.values, tokens, row_begin, row_end, out,
                                          out_stride, reinterpret_cast<float*>(scratch));
            return;
        }
    }
    multiply_float_rows<FloatProduct<type>>(weights, input.values, weights.columns, tokens,
                                            row_begin, row_end, out, out_stride);
}

template <WeightType type>
void read_row(const Matrix& weights, int64_t row, float* out) {
    using Product = FloatProduct<type>;
    constexpr int64_t bytes = layout(type).bytes, together = Product::step_columns;
    const int64_t group_bytes = (weights.columns + together - 1) / together * Product::step_bytes;
    const std::byte* const from =
        weights.data + row / kGroupRows * group_bytes + row % kGroupRows * together * bytes;
    for (int64_t column = 0; column < weights.columns; ++column) {
        const std::byte* const at =
            from + column / together * Product::step_bytes + column % together * bytes;
        if constexpr (type == WeightType::F32) {
            out[column] = smolrun::load<float>(at);
        } else if constexpr (type == WeightType::F16) {
            out[column] = float_from_half(smolrun::load<uint16_t>(at));
        } else {
            out[column] = float_from_bfloat16(smolrun::load<uint16_t>(at));
        }
    }
}

}  // namespace
}  // namespace smolrun
