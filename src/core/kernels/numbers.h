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

}  // namespace smolrun
