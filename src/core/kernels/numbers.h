// float16 and bfloat16 in portable C++, and loads from memory of any alignment.
//
// All static: files of different instruction sets include this, and of an inline function the
// linker keeps one copy for all, which might be the one that this CPU can not run.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace smolrun {

template <class T>
static inline T load(const std::byte* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

static inline float float_from_bfloat16(uint16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

static inline float float_from_half(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t rest = bits & 0x7fffu;
    // The exponent is rebased by a multiplication with 2^112, which is exact and turns subnormal
    // numbers into normal ones; what was infinite or NaN gets its exponent back by hand.
    const float rebased = std::bit_cast<float>(rest << 13) * 0x1p112f;
    const uint32_t special = rest >= 0x7c00u ? 0x7f800000u : 0u;
    return std::bit_cast<float>(sign | special | std::bit_cast<uint32_t>(rebased));
}

// Rounds to nearest even; too large becomes infinite; NaN stays NaN.
static inline uint16_t half_from_float(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and up
    if (magnitude < 0x38800000u) {
        // Below 2^-14: adding 1/2 lets the addition round to multiples of 2^-24.
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
    }
    // A carry out of the mantissa moves into the exponent, up to infinity, as it should.
    const uint32_t odd = magnitude >> 13 & 1u;
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + odd;
    return static_cast<uint16_t>(sign | rounded >> 13);
}

// The least power of two from 2^-126 up that is no less than x, which is far below 2^127.
static inline float power_of_two_above(double x) {
    // Any bit of the fraction carries into the exponent, which is as it is of a power of two.
    const int64_t carry = (int64_t{1} << 52) - 1;
    const auto exponent = static_cast<int>((std::bit_cast<int64_t>(x) + carry) >> 52) - 1023;
    return std::bit_cast<float>((exponent > -126 ? exponent + 127 : 1) << 23);
}

}  // namespace smolrun
