// Quantizing of inputs, norm, rotation, activation: what works along one row.
#pragma once

#include "kernels.h"
#include "kernels/simd_common.h"

namespace smolrun {
namespace {

// What 16 or 32 numbers are rounded with.
struct Rounding {
    float scale, inverse;
};
SMOLRUN_INLINE Rounding rounding(Words magnitudes, float max_code) {
    constexpr float smallest_normal = 0x1p-126f;
    const int32_t largest_bits = max_lane(magnitudes);
    float largest;
    __builtin_memcpy(&largest, &largest_bits, sizeof largest);
    if (largest_bits >= 0x7f800000) return {__builtin_nanf(""), 0};
    const float scale = largest / max_code;
    if (scale < smallest_normal) return {0, 0};
    return {scale, max_code / largest};
}
// As bits: NaN is above infinity, which is above the rest.
SMOLRUN_INLINE Words magnitude(Floats x) { return bit_and(bits_of(x), broadcast_word(0x7fffffff)); }
SMOLRUN_INLINE Words rounded(Floats x, const Rounding& with) {
    // 0 times infinity or NaN is NaN, which would round to a code.
    if (with.inverse == 0) return zero_words();
    return round_to_words(mul(x, broadcast(with.inverse)));
}

void quantize(const float* x, int64_t columns, int64_t panel, WordPiece* words, WordScale* scales) {
    constexpr int vectors = 32 / kLanes;
    for (int64_t piece = 0; piece < columns / 32;
         ++piece, x += 32, words += panel, scales += panel) {
        Words magnitudes = zero_words();
        for (int v = 0; v < vectors; ++v) {
            magnitudes = max(magnitudes, magnitude(load(x + v * kLanes)));
        }
        const Rounding with = rounding(magnitudes, 32767.0f);
        scales->scale = with.scale;
        Words totals[2] = {zero_words(), zero_words()};
        for (int v = 0; v < vectors; ++v) {
            const Words some = rounded(load(x + v * kLanes), with);
            store_codes(words->codes + v * kLanes, some);
            Words& total = totals[v * kLanes / 16];
            total = add(total, some);
        }
        scales->sums[0] = sum_lanes(totals[0]);
        scales->sums[1] = sum_lanes(totals[1]);
        for (int half = 0; half < 2; ++half) {
            scales->scaled_sums[half] = with.scale * static_cast<float>(scales->sums[half]);
        }
        scales->scaled_sum = with.scale * static_cast<float>(scales->sums[0] + scales->sums[1]);
    }
}

void rms_norm(const float* x, const float* weight, int64_t columns, float epsilon, float* out) {
    Doubles total{};
    each_vector(columns,
                [&](int64_t i, int64_t count) { add_squares(load_up_to(x + i, count), total); });
    const double mean = sum_lanes(total) / static_cast<double>(columns);
    const Floats inverse =
        broadcast(static_cast<float>(1.0 / __builtin_sqrt(mean + double{epsilon})));
    each_vector(columns, [&](int64_t i, int64_t count) {
        const Floats normalized = mul(load_up_to(x + i, count), inverse);
        store_up_to(out + i, mul(normalized, load_up_to(weight + i, count)), count);
    });
}

void rope(float* heads, int64_t head_count, int64_t head_dim, const float* cosine,
          const float* sine) {
    const int64_t half = head_dim / 2;
    for (int64_t head = 0; head < head_count; ++head) {
        float* const first = heads + head * head_dim;
        float* const second = first + half;
        each_vector(half, [&](int64_t i, int64_t count) {
            const Floats c = load_up_to(cosine + i, count), s = load_up_to(sine + i, count);
            const Floats a = load_up_to(first + i, count), b = load_up_to(second + i, count);
            store_up_to(first + i, fnma(b, s, mul(a, c)), count);
            store_up_to(second + i, fma(a, s, mul(b, c)), count);
        });
    }
}

void swiglu(const float* gate, const float* up, int64_t columns, float* out) {
    const Floats one = broadcast(1.0f);
    each_vector(columns, [&](int64_t i, int64_t count) {
        const Floats g = load_up_to(gate + i, count);
        const Floats silu = div(g, add(one, exponential(sub(broadcast(0.0f), g))));
        store_up_to(out + i, mul(silu, load_up_to(up + i, count)), count);
    });
}

double weigh(const float* x, int64_t columns, float greatest, float factor, float* out) {
    const Floats subtracted = broadcast(greatest), by = broadcast(factor);
    Doubles total{};
    each_vector(columns, [&](int64_t i, int64_t count) {
        const Floats below = sub(load_up_to(x + i, count), subtracted);
        const Floats weights = exponential(mul(below, by));
        store_up_to(out + i, weights, count);
        add_values(count == kLanes ? weights : load_up_to(out + i, count), total);
    });
    return sum_lanes(total);
}

void add_to(const float* x, int64_t columns, float* out) {
    each_vector(columns, [&](int64_t i, int64_t count) {
        store_up_to(out + i, add(load_up_to(out + i, count), load_up_to(x + i, count)), count);
    });
}

}  // namespace
}  // namespace smolrun
