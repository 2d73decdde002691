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

// Four rows, of which the last ones are only read where row + 3 is past the end.
template <WeightType type, int tokens>
void multiply_float_tile(const Matrix& weights, const float* x, int64_t row, int64_t rows,
                         float* out, int64_t out_stride) {
    constexpr int tile = 4;
    const int64_t columns = weights.columns;
    const std::byte* from[tile];
    for (int r = 0; r < tile; ++r) {
        from[r] = weights.data + (row + smaller(r, rows - 1)) * columns * weight_bytes(type);
    }
    Floats totals[tokens][tile];
    for (auto& of_token : totals) {
        for (Floats& total : of_token) total = broadcast(0.0f);
    }
    const auto step = [&](int64_t column, int64_t count) SMOLRUN_INLINE_LAMBDA {
        Floats inputs[tokens];
        for (int t = 0; t < tokens; ++t) inputs[t] = load_up_to(x + t * columns + column, count);
        for (int r = 0; r < tile; ++r) {
            const Floats w = load_weights<type>(from[r] + column * weight_bytes(type), count);
            for (int t = 0; t < tokens; ++t) totals[t][r] = fma(w, inputs[t], totals[t][r]);
        }
    };
    each_vector(columns, step);
    for (int t = 0; t < tokens; ++t) {
        const __m128 sums = sum_lanes(totals[t][0], totals[t][1], totals[t][2], totals[t][3]);
        float* const to = out + t * out_stride;
        if (rows >= tile) {
            _mm_storeu_ps(to, sums);
            continue;
        }
        float copy[tile];
        _mm_storeu_ps(copy, sums);
        for (int64_t r = 0; r < rows; ++r) to[r] = copy[r];
    }
}

// All rows of a range, by tiles of tokens.
template <WeightType type, int tokens = kFloatTileTokens>
void multiply_float_tiles(const Matrix& weights, const float* x, int64_t count, int64_t row_begin,
                          int64_t row_end, float* out, int64_t out_stride) {
    for (; count >= tokens; count -= tokens) {
        for (int64_t row = row_begin; row < row_end; row += 4) {
            multiply_float_tile<type, tokens>(weights, x, row, row_end - row, out + row - row_begin,
                                              out_stride);
        }
        x += tokens * weights.columns;
        out += tokens * out_stride;
    }
    if constexpr (tokens > 1) {
        if (count > 0) {
            multiply_float_tiles<type, tokens - 1>(weights, x, count, row_begin, row_end, out,
                                                   out_stride);
        }
    }
}

template <WeightType type>
void multiply_floats(const Matrix& weights, const Activations& input, int64_t tokens,
                     int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                     std::byte*) {
    // Rows that stay in the second-level cache while the tokens pass.
    constexpr int64_t cached_bytes = 256 * 1024;
    const int64_t fitting = cached_bytes / (weights.columns * weight_bytes(type)) / 4 * 4;
    const int64_t rows =
        tokens <= kFloatTileTokens ? row_end - row_begin : (fitting < 4 ? int64_t{4} : fitting);
    for (int64_t row = row_begin; row < row_end; row += rows) {
        multiply_float_tiles<type>(weights, input.values, tokens, row, smaller(row + rows, row_end),
                                   out + row - row_begin, out_stride);
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
