// The types that everyone makes alike from the extremes of a block: Q8_0, and Q4_0, Q4_1, Q5_0,
// Q5_1 where no importance is given. Byte for byte as the `gguf` package writes them. And floats.
#pragma once

#include <bit>

#include "kernels/quantize_pack.h"

namespace smolrun {
namespace {

inline bool finite_half(uint16_t bits) { return (bits & 0x7c00) != 0x7c00; }

// 1/d; 0 where d is 0 or too small to have one.
inline float reciprocal(float d) {
    const float inverse = d == 0 ? 0.0f : 1 / d;
    return std::isinf(inverse) ? 0.0f : inverse;
}

// Codes as they come out of truncation, which may be one too large.
inline uint8_t truncated_code(float x, int top) {
    const int code = static_cast<int>(x);
    return static_cast<uint8_t>(code < top ? code : top);
}

// From the weight of largest magnitude, which becomes code 0; code = level + kReach.
template <class Pack, int kReach>
bool plain_scaled_block(const float* x, uint8_t* out) {
    const float d = farthest_of(x, 32) / -kReach, steps = reciprocal(d);
    uint8_t codes[32];
    for (int i = 0; i < 32; ++i) {
        codes[i] = truncated_code(x[i] * steps + (kReach + 0.5f), 2 * kReach - 1);
    }
    const uint16_t half = half_from_float(d);
    Pack::put(codes, nullptr, half, out);
    return finite_half(half);
}

// From the smallest weight, code 0, and the largest, code kTop.
template <class Pack, int kTop>
bool plain_affine_block(const float* x, uint8_t* out) {
    const float high = largest_of(x, 32);
    float low = x[0];
    for (int i = 1; i < 32; ++i) low = x[i] < low ? x[i] : low;
    const float d = (high - low) / kTop, steps = reciprocal(d);
    uint8_t codes[32];
    for (int i = 0; i < 32; ++i) codes[i] = truncated_code((x[i] - low) * steps + 0.5f, kTop);
    const uint16_t half_d = half_from_float(d), half_m = half_from_float(low);
    Pack::put(codes, half_d, half_m, out);
    return finite_half(half_d) && finite_half(half_m);
}

inline bool plain_q8_0_block(const float* x, uint8_t* out) {
    const float d = std::fabs(farthest_of(x, 32)) / 127, steps = reciprocal(d);
    const uint16_t half = half_from_float(d);
    put_half(half, out);
    for (int i = 0; i < 32; ++i) {
        // To nearest, halves away from zero.
        const float scaled = x[i] * steps, size = std::fabs(scaled);
        const float whole = static_cast<float>(static_cast<int>(size));
        const float rounded = whole + (size - whole >= 0.5f ? 1.0f : 0.0f);
        out[2 + i] = static_cast<uint8_t>(static_cast<int>(std::copysign(rounded, scaled)));
    }
    return finite_half(half);
}

using PlainBlock = bool (*)(const float* x, uint8_t* out);

inline bool float_values(const float* x, int64_t count, uint8_t* out) {
    std::memcpy(out, x, static_cast<std::size_t>(count) * sizeof *x);
    return true;
}

inline bool half_values(const float* x, int64_t count, uint8_t* out) {
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t half = half_from_float(x[i]);
        finite &= finite_half(half);
        put_half(half, out + 2 * i);
    }
    return finite;
}

// To nearest even; a carry may make it infinite.
inline bool bfloat16_values(const float* x, int64_t count, uint8_t* out) {
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
        const auto rounded = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
        finite &= (rounded & 0x7f80) != 0x7f80;
        put_half(rounded, out + 2 * i);
    }
    return finite;
}

}  // namespace
}  // namespace smolrun
