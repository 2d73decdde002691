// Products of F32, F16 and BF16 weights: row-major, vectors along the row.
//
// A (token, row) has one vector of totals, to which the row's vectors are added in order; in the
// end its lanes are added as sum_lanes does. Tiles only decide which of them share loads.
#pragma once

#include "kernels.h"
#include "kernels/simd_common.h"

namespace smolrun {
namespace {

constexpr int64_t weight_bytes(WeightType type) { return type == WeightType::F32 ? 4 : 2; }

template <WeightType type>
SMOLRUN_INLINE Floats load_weights(const std::byte* from, int64_t count) {
    if constexpr (type == WeightType::F32) {
        return load_up_to(reinterpret_cast<const float*>(from), count);
    } else if constexpr (type == WeightType::F16) {
        return count == kLanes ? load_f16(from) : load_f16_part(from, count);
    } else {
        return count == kLanes ? load_bf16(from) : load_bf16_part(from, count);
    }
}

constexpr int kTileRows = 4;

// Rows are short, and each is a fresh start to the CPU's own prefetching: the next rows are asked
// for while these are used.
SMOLRUN_INLINE int64_t prefetch_distance(int64_t row_bytes) {
    return smaller(kTileRows * row_bytes, 16384);
}

// Some columns of a product of four rows and a tile of tokens. Totals between two parts of a row
// are in memory.
struct FloatPart {
    int64_t first_column, count;
    bool first, last;
};

// Rows past the end are read as the last one there is, and not written.
template <WeightType type, int tokens>
void multiply_float_tile(const Matrix& weights, const float* x, const FloatPart& part, int64_t row,
                         int64_t rows, Floats (*kept)[kTileRows], float* out, int64_t out_stride) {
    const int64_t columns = weights.columns;
    const std::byte* from[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
        from[r] = weights.data +
                  ((row + smaller(r, rows - 1)) * columns + part.first_column) * weight_bytes(type);
    }
    const int64_t ahead = prefetch_distance(columns * weight_bytes(type));
    Floats totals[tokens][kTileRows];
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < kTileRows; ++r) {
            totals[t][r] = part.first ? broadcast(0.0f) : kept[t][r];
        }
    }
    each_vector(part.count, [&](int64_t column, int64_t count) SMOLRUN_INLINE_LAMBDA {
        Floats inputs[tokens];
        for (int t = 0; t < tokens; ++t) {
            inputs[t] = load_up_to(x + t * columns + part.first_column + column, count);
        }
        for (int r = 0; r < kTileRows; ++r) {
            const std::byte* const at = from[r] + column * weight_bytes(type);
            if constexpr (tokens < kFloatTileTokens) prefetch(at + ahead, 1);
            const Floats w = load_weights<type>(at, count);
            for (int t = 0; t < tokens; ++t) totals[t][r] = fma(w, inputs[t], totals[t][r]);
        }
    });
    for (int t = 0; t < tokens; ++t) {
        if (!part.last) {
            for (int r = 0; r < kTileRows; ++r) kept[t][r] = totals[t][r];
            continue;
        }
        const __m128 sums = sum_lanes(totals[t][0], totals[t][1], totals[t][2], totals[t][3]);
        float* const to = out + t * out_stride;
        if (rows >= kTileRows) {
            _mm_storeu_ps(to, sums);
            continue;
        }
        float copy[kTileRows];
        _mm_storeu_ps(copy, sums);
        for (int64_t r = 0; r < rows; ++r) to[r] = copy[r];
    }
}

// Some columns of a range of rows, by tiles of tokens.
template <WeightType type, int tokens = kFloatTileTokens>
void multiply_float_tiles(const Matrix& weights, const float* x, const FloatPart& part,
                          int64_t count, int64_t row_begin, int64_t row_end,
                          Floats (*kept)[kTileRows], float* out, int64_t out_stride) {
    for (; count >= tokens; count -= tokens) {
        for (int64_t row = row_begin; row < row_end; row += kTileRows) {
            multiply_float_tile<type, tokens>(weights, x, part, row, row_end - row, kept,
                                              out + row - row_begin, out_stride);
            // Where totals are not kept, there is no room for them either.
            if (!part.first || !part.last) kept += tokens;
        }
        x += tokens * weights.columns;
        out += tokens * out_stride;
    }
    if constexpr (tokens > 1) {
        if (count > 0) {
            multiply_float_tiles<type, tokens - 1>(weights, x, part, count, row_begin, row_end,
                                                   kept, out, out_stride);
        }
    }
}

// One token waits for memory alone, and the less there is between two loads, the further the CPU
// looks ahead. The same sums as in a tile.
template <WeightType type>
void multiply_one_token(const Matrix& weights, const float* x, int64_t row_begin, int64_t row_end,
                        float* out) {
    constexpr int64_t bytes = weight_bytes(type), line_columns = 64 / bytes;
    const int64_t columns = weights.columns, row_bytes = columns * bytes;
    const int64_t whole = columns / line_columns * line_columns;
    const int64_t ahead = prefetch_distance(row_bytes);
    int64_t row = row_begin;
    for (; row + kTileRows <= row_end; row += kTileRows) {
        const std::byte* from[kTileRows];
        for (int r = 0; r < kTileRows; ++r) from[r] = weights.data + (row + r) * row_bytes;
        Floats totals[kTileRows];
        for (Floats& total : totals) total = broadcast(0.0f);
        for (int64_t column = 0; column < whole; column += line_columns) {
            if constexpr (type != WeightType::F32) {
                for (int r = 0; r < kTileRows; ++r) prefetch(from[r] + column * bytes + ahead, 1);
            }
#pragma GCC unroll 8
            for (int64_t i = column; i < column + line_columns; i += kLanes) {
                const Floats input = load(x + i);
                for (int r = 0; r < kTileRows; ++r) {
                    totals[r] =
                        fma(load_weights<type>(from[r] + i * bytes, kLanes), input, totals[r]);
                }
            }
        }
        for (int64_t i = whole; i < columns; i += kLanes) {
            const int64_t count = smaller(kLanes, columns - i);
            const Floats input = load_up_to(x + i, count);
            for (int r = 0; r < kTileRows; ++r) {
                totals[r] = fma(load_weights<type>(from[r] + i * bytes, count), input, totals[r]);
            }
        }
        _mm_storeu_ps(out + row - row_begin, sum_lanes(totals[0], totals[1], totals[2], totals[3]));
    }
    if (row < row_end) {
        multiply_float_tile<type, 1>(weights, x, {0, columns, true, true}, row, row_end - row,
                                     nullptr, out + row - row_begin, 0);
    }
}

template <WeightType type>
void multiply_floats(const Matrix& weights, const Activations& input, int64_t tokens,
                     int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                     std::byte* scratch) {
    if (tokens == 1) {
        multiply_one_token<type>(weights, input.values, row_begin, row_end, out);
        return;
    }
    // One tile of tokens streams whole rows. More of them take a part of the columns at a time, so
    // that a tile's inputs stay in the first-level cache and the weights in the second.
    constexpr int64_t part_columns = 1024, block_rows = 32;
    constexpr int64_t room = kLinearScratch / static_cast<int64_t>(sizeof(Floats)) / block_rows;
    static_assert(block_rows % kTileRows == 0 && part_columns % kLanes == 0);
    auto* const kept = reinterpret_cast<Floats(*)[kTileRows]>(scratch);
    const bool one_tile = tokens <= kFloatTileTokens;
    const int64_t columns = weights.columns;
    const int64_t step = one_tile ? columns : part_columns;
    const int64_t rows = one_tile ? row_end - row_begin : block_rows;
    for (int64_t row = row_begin; row < row_end; row += rows) {
        const int64_t end = smaller(row + rows, row_end);
        for (int64_t token = 0; token < tokens; token += room) {
            for (int64_t column = 0; column < columns; column += step) {
                const FloatPart part{column, smaller(step, columns - column), column == 0,
                                     column + step >= columns};
                multiply_float_tiles<type>(weights, input.values + token * columns, part,
                                           smaller(room, tokens - token), row, end, kept,
                                           out + token * out_stride + row - row_begin, out_stride);
            }
        }
    }
}

template <WeightType type>
void read_row(const Matrix& weights, int64_t row, float* out) {
    const std::byte* from = weights.data + row * weights.columns * weight_bytes(type);
    each_vector(weights.columns, [&](int64_t i, int64_t count) {
        store_up_to(out + i, load_weights<type>(from + i * weight_bytes(type), count), count);
    });
}

}  // namespace
}  // namespace smolrun
