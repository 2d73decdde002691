// Rounding of q, k and v to codes of 16 bits, and the storing of K and V.
#pragma once

#include "kernels.h"
#include "kernels/simd_common.h"
#include "kernels/simd_vectors.h"
#include "packed.h"

namespace smolrun {
namespace {

// Rounding of a vector of q or k, or of the inputs of a run, so that neither a code nor a sum of
// products of two such vectors leaves its bits.
SMOLRUN_INLINE Rounding rounding_for_dot(const float* x, int64_t head_dim) {
    constexpr double largest_norm = kLargestNorm;
    Words magnitudes = zero_words();
    Doubles squares{};
    each_vector(head_dim, [&](int64_t i, int64_t count) SMOLRUN_INLINE_LAMBDA {
        const Floats some = load_up_to(x + i, count);
        magnitudes = max(magnitudes, magnitude(some));
        add_squares(some, squares);
    });
    const Rounding by_largest = rounding(magnitudes, 32767.0f);
    if (by_largest.inverse == 0) return by_largest;
    const double norm = __builtin_sqrt(sum_lanes(squares));
    if (norm <= largest_norm * double{by_largest.scale}) return by_largest;
    return {static_cast<float>(norm / largest_norm), static_cast<float>(largest_norm / norm)};
}
SMOLRUN_INLINE Rounding rounding_of_value(const float* x, int64_t head_dim) {
    Words magnitudes = zero_words();
    each_vector(head_dim, [&](int64_t i, int64_t count) SMOLRUN_INLINE_LAMBDA {
        magnitudes = max(magnitudes, magnitude(load_up_to(x + i, count)));
    });
    return rounding(magnitudes, 32767.0f);
}

// Stores the codes of x[head_dim], head_dim even: `together` (1 or 2) neighbours at to, the next
// ones `stride` codes further on.
template <int together>
SMOLRUN_INLINE void store_rounded(const float* x, int64_t head_dim, const Rounding& with,
                                  int16_t* to, int64_t stride) {
    each_vector(head_dim, [&](int64_t i, int64_t count) SMOLRUN_INLINE_LAMBDA {
        int16_t codes[kLanes];
        store_halves(codes, rounded(load_up_to(x + i, count), with));
        for (int64_t j = 0; j < count; j += together) {
            __builtin_memcpy(to + (i + j) / together * stride, codes + j, together * sizeof *to);
        }
    });
}

void store_kv(const float* k, const float* v, int64_t head_dim, int64_t slot, int16_t* k_block,
              int16_t* v_block) {
    const Rounding of_k = rounding_for_dot(k, head_dim), of_v = rounding_of_value(v, head_dim);
    store_rounded<2>(k, head_dim, of_k, k_block + 2 * slot, 2 * kBlockTokens);
    store_rounded<1>(v, head_dim, of_v, v_block + slot / 2 * head_dim * 2 + slot % 2, 2);
    const int64_t scale = head_dim * kBlockTokens + 2 * slot;
    __builtin_memcpy(k_block + scale, &of_k.scale, sizeof of_k.scale);
    __builtin_memcpy(v_block + scale, &of_v.scale, sizeof of_v.scale);
}

}  // namespace
}  // namespace smolrun
