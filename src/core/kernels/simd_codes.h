// Products of I16 weights, their rows as floats, and the rounding of weights and inputs to codes.
#pragma once

#include "kernels.h"
#include "kernels/numbers.h"
#include "kernels/simd_floats.h"
#include "kernels/simd_kv.h"
#include "packed.h"

namespace smolrun {
namespace {

// A word of two weights meets a word of two inputs, for simd_floats.h. Parts start at their
// columns, which the scales of the weights stand before.
struct CodeProduct {
    using Sum = Words;
    static constexpr int tile_tokens = kCodeTileTokens;
    static constexpr int64_t run_steps = kCodeRunColumns / 2;
    static constexpr int64_t scales = kCodePartRuns;
    static constexpr int64_t step_bytes = 4 * kGroupRows;
    static constexpr int parts = 1;

    template <int part>
    SMOLRUN_INLINE static Words weights(const std::byte* step, int lane) {
        return load_words(step + 4 * lane);
    }
    SMOLRUN_INLINE static Words input(const std::byte* at) {
        return broadcast_pair(reinterpret_cast<const int16_t*>(at));
    }
    SMOLRUN_INLINE static Sum zero() { return zero_words(); }
    SMOLRUN_INLINE static Sum add(Words weights, Words input, Sum sum) {
        return dot(sum, weights, input);
    }
    SMOLRUN_INLINE static Floats value(Sum sum, const std::byte* columns, int lane,
                                       const float* input_scale) {
        const auto* const scales = reinterpret_cast<const float*>(columns - kCodeScaleBytes);
        return mul(mul(load(scales + lane), broadcast(*input_scale)), to_floats(sum));
    }
};

// So many tokens that weights are asked for in good time while others are multiplied.
constexpr int64_t kAheadTokens = 32;

void multiply_codes(const Matrix& weights, const Activations& input, int64_t tokens,
                    int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                    std::byte*) {
    const int64_t block_rows = tokens <= kFewFloatTokens ? kGroupRows : kFloatBlockRows;
    const int64_t columns = weights.columns;
    const int64_t parts = (columns + kCodePartColumns - 1) / kCodePartColumns;
    const int64_t pairs = (columns + 1) / 2;
    const int64_t group_bytes = parts * kCodeScaleBytes + pairs * CodeProduct::step_bytes;
    for (int64_t row = row_begin; row < row_end; row += block_rows) {
        const std::byte* const group = weights.data + row / kGroupRows * group_bytes;
        for (int64_t i = 0; i < parts; ++i) {
            const int64_t first = i * input.code_stride;
            FloatPart part{};
            part.weights = group + i * kCodePartBytes + kCodeScaleBytes;
            part.group_bytes = group_bytes;
            part.inputs =
                reinterpret_cast<const std::byte*>(input.codes + first * kCodePartColumns);
            part.input_bytes = kCodePartColumns * int64_t{sizeof(int16_t)};
            part.input_count = smaller(kCodePartColumns / 2, pairs - i * (kCodePartColumns / 2));
            part.input_scales = input.code_scales + first * CodeProduct::scales;
            // The next part, or the first one of the next rows.
            const int64_t next = i + 1 < parts
                                     ? kCodePartBytes
                                     : block_rows / kGroupRows * group_bytes - i * kCodePartBytes;
            part.ahead = tokens >= kAheadTokens ? next : 0;
            part.first = i == 0;
            part.out = out + row - row_begin;
            part.out_stride = out_stride;
            multiply_float_part<CodeProduct>(part, smaller(block_rows, row_end - row), tokens);
        }
    }
}

void read_code_row(const Matrix& weights, int64_t row, float* out) {
    const int64_t columns = weights.columns, lane = row % kGroupRows;
    const int64_t parts = (columns + kCodePartColumns - 1) / kCodePartColumns;
    const std::byte* part =
        weights.data +
        row / kGroupRows * (parts * kCodeScaleBytes + (columns + 1) / 2 * CodeProduct::step_bytes);
    for (int64_t begin = 0; begin < columns; begin += kCodePartColumns, part += kCodePartBytes) {
        const float scale = smolrun::load<float>(part + 4 * lane);
        const std::byte* const codes = part + kCodeScaleBytes + 4 * lane;
        const int64_t count = smaller(kCodePartColumns, columns - begin);
        for (int64_t i = 0; i < count; ++i) {
            const std::byte* const at = codes + i / 2 * CodeProduct::step_bytes + i % 2 * 2;
            out[begin + i] = scale * static_cast<float>(smolrun::load<int16_t>(at));
        }
    }
}

// x[count] -> codes; what is past them and an even number is not written.
template <class Load>
SMOLRUN_INLINE void store_codes_in_order(Load&& load, int64_t count, const Rounding& with,
                                         int16_t* codes) {
    each_vector(count, [&](int64_t i, int64_t some) SMOLRUN_INLINE_LAMBDA {
        const Words rounds = rounded(load(i, some), with);
        if (some == kLanes) {
            store_halves(codes + i, rounds);
        } else {
            int16_t last[kLanes];
            store_halves(last, rounds);
            for (int64_t j = 0; j < some + some % 2; ++j) codes[i + j] = last[j];
        }
    });
}

void quantize_runs(const float* x, int64_t columns, int64_t stride, int16_t* codes, float* scales) {
    for (int64_t column = 0; column < columns; column += kCodeRunColumns) {
        const int64_t part = column / kCodePartColumns * stride;
        const int64_t in_part = column % kCodePartColumns;
        const int64_t count = smaller(kCodeRunColumns, columns - column);
        const Rounding with = rounding_for_dot(x + column, count);
        scales[part * CodeProduct::scales + in_part / kCodeRunColumns] = with.scale;
        store_codes_in_order([&](int64_t i, int64_t some)
                                 SMOLRUN_INLINE_LAMBDA { return load_up_to(x + column + i, some); },
                             count, with, codes + part * kCodePartColumns + in_part);
    }
}

// The first `count` of some weights, up to kLanes; the others are zero, and not read.
template <WeightType type>
SMOLRUN_INLINE Floats load_short_floats(const std::byte* from, int64_t count) {
    std::byte some[2 * kLanes]{};
    if (count < kLanes) {
        for (int64_t i = 0; i < 2 * count; ++i) some[i] = from[i];
        from = some;
    }
    if constexpr (type == WeightType::F16) return load_f16(from);
    return as_floats(shift_right<-16>(widen_u16(from)));
}

template <WeightType type>
float encode(const std::byte* weights, int64_t count, int16_t* codes) {
    const auto load = [&](int64_t i, int64_t some) SMOLRUN_INLINE_LAMBDA {
        return load_short_floats<type>(weights + 2 * i, some);
    };
    Words magnitudes = zero_words();
    double most_squares = 0;  // of a run
    for (int64_t run = 0; run < count; run += kCodeRunColumns) {
        Doubles squares{};
        each_vector(smaller(kCodeRunColumns, count - run),
                    [&](int64_t i, int64_t some) SMOLRUN_INLINE_LAMBDA {
                        const Floats values = load(run + i, some);
                        magnitudes = max(magnitudes, magnitude(values));
                        add_squares(values, squares);
                    });
        const double of_run = sum_lanes(squares);
        if (of_run > most_squares) most_squares = of_run;
    }
    const int32_t largest_bits = max_lane(magnitudes);
    Rounding with{__builtin_nanf(""), 0};
    if (largest_bits < 0x7f800000) {  // NaN is above infinity
        float largest;
        __builtin_memcpy(&largest, &largest_bits, sizeof largest);
        const double by_largest = double{largest} / kLargestCode;
        const double by_norm = __builtin_sqrt(most_squares) / kLargestNorm;
        with.scale = power_of_two_above(by_largest > by_norm ? by_largest : by_norm);
        with.inverse = 1 / with.scale;
    }
    store_codes_in_order(load, count, with, codes);
    return with.scale;
}

}  // namespace
}  // namespace smolrun
