// Fast products of BF16 weights: with inputs of bfloat16, by the instruction that multiplies pairs.
#pragma once

#include "kernels/simd_floats.h"

namespace smolrun {
namespace {

// A word of two weights meets a word of two inputs.
struct Bfloat16Product {
    static constexpr int step_columns = 2;
    static constexpr int64_t step_bytes = 4 * kGroupRows;
    static constexpr int parts = 1;

    template <int part>
    SMOLRUN_INLINE static Words weights(const std::byte* step, int lane) {
        return load_words(step + 4 * lane);
    }
    SMOLRUN_INLINE static Words input(const std::byte* at) {
        return broadcast_word(smolrun::load<int32_t>(at));
    }
    SMOLRUN_INLINE static Floats add(Words weights, Words input, Floats total) {
        return _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(weights),
                                reinterpret_cast<__m512bh>(input));
    }
};

void multiply_bfloat16(const Matrix& weights, const Activations& input, int64_t tokens,
                       int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                       std::byte*) {
    multiply_float_rows<Bfloat16Product>(weights, input.pairs, (weights.columns + 1) / 2, tokens,
                                         row_begin, row_end, out, out_stride);
}

void round_to_bfloat16(const float* x, int64_t columns, uint32_t* pairs) {
    auto* const out = reinterpret_cast<uint16_t*>(pairs);
    if (columns % 2 != 0) out[columns] = 0;
    each_vector(columns, [&](int64_t i, int64_t count) {
        const auto rounded =
            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load_up_to(x + i, count)));
        if (count == kLanes) {  // a store with a mask takes as long as twenty without
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), rounded);
        } else {
            _mm256_mask_storeu_epi16(out + i, first_lanes(count), rounded);
        }
    });
}

}  // namespace
}  // namespace smolrun
