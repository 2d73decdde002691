// Codes and integer scales into the bytes of a block, as files store it (quant/blocks.py reads it).
#pragma once

#include "kernels/quantize_lanes.h"

namespace smolrun {
namespace {

inline void put_half(uint16_t bits, uint8_t* out) { std::memcpy(out, &bits, sizeof bits); }

// Bytes of `half` low nibbles from the first half of the codes, high nibbles from the second.
inline void put_nibbles(const uint8_t* codes, int half, uint8_t* out) {
    for (int i = 0; i < half; ++i) {
        out[i] = static_cast<uint8_t>((codes[i] & 15) | codes[i + half] << 4);
    }
}

// The fifth bits of 32 codes, in one word.
inline void put_fifth_bits(const uint8_t* codes, uint8_t* out) {
    uint32_t word = 0;
    for (int i = 0; i < 32; ++i) word |= static_cast<uint32_t>(codes[i] >> 4 & 1) << i;
    std::memcpy(out, &word, sizeof word);
}

// The low two bits of 256 codes, [64].
inline void put_two_bits(const uint8_t* codes, uint8_t* out) {
    for (int half = 0; half < 2; ++half) {
        const uint8_t* const from = codes + 128 * half;
        for (int l = 0; l < 32; ++l) {
            out[32 * half + l] =
                static_cast<uint8_t>((from[l] & 3) | (from[32 + l] & 3) << 2 |
                                     (from[64 + l] & 3) << 4 | (from[96 + l] & 3) << 6);
        }
    }
}

// Bit `bit` of 256 codes, [32]: weight 32j+l is bit j of byte l.
inline void put_bit_planes(const uint8_t* codes, int bit, uint8_t* out) {
    for (int l = 0; l < 32; ++l) {
        int byte = 0;
        for (int j = 0; j < 8; ++j) byte |= (codes[32 * j + l] >> bit & 1) << j;
        out[l] = static_cast<uint8_t>(byte);
    }
}

// Eight scales and eight minimums of 6 bits, [12].
inline void put_scales_and_minimums(const float* scales, const float* minimums, uint8_t* out) {
    for (int j = 0; j < 4; ++j) {
        const int low_scale = static_cast<int>(scales[j]);
        const int low_minimum = static_cast<int>(minimums[j]);
        const int high_scale = static_cast<int>(scales[j + 4]);
        const int high_minimum = static_cast<int>(minimums[j + 4]);
        out[j] = static_cast<uint8_t>(low_scale | (high_scale >> 4) << 6);
        out[j + 4] = static_cast<uint8_t>(low_minimum | (high_minimum >> 4) << 6);
        out[j + 8] = static_cast<uint8_t>((high_scale & 15) | (high_minimum & 15) << 4);
    }
}

// Sixteen scales from -32 to 31 in 6 bits, [12].
inline void put_q3_k_scales(const float* scales, uint8_t* out) {
    for (int i = 0; i < 12; ++i) out[i] = 0;
    for (int i = 0; i < 16; ++i) {
        const int scale = static_cast<int>(scales[i]) + 32;
        out[i % 8] = static_cast<uint8_t>(out[i % 8] | (scale & 15) << (i / 8 * 4));
        out[8 + i % 4] = static_cast<uint8_t>(out[8 + i % 4] | (scale >> 4) << (i / 4 * 2));
    }
}

struct PackQ2K {
    static void put(const uint8_t* codes, const float* scales, const float* minimums, uint16_t d,
                    uint16_t m, uint8_t* out) {
        for (int i = 0; i < 16; ++i) {
            out[i] = static_cast<uint8_t>(static_cast<int>(scales[i]) |
                                          static_cast<int>(minimums[i]) << 4);
        }
        put_two_bits(codes, out + 16);
        put_half(d, out + 80);
        put_half(m, out + 82);
    }
};

struct PackQ4K {
    static void put(const uint8_t* codes, const float* scales, const float* minimums, uint16_t d,
                    uint16_t m, uint8_t* out) {
        put_half(d, out);
        put_half(m, out + 2);
        put_scales_and_minimums(scales, minimums, out + 4);
        for (int c = 0; c < 4; ++c) put_nibbles(codes + 64 * c, 32, out + 16 + 32 * c);
    }
};

struct PackQ5K {
    static void put(const uint8_t* codes, const float* scales, const float* minimums, uint16_t d,
                    uint16_t m, uint8_t* out) {
        put_half(d, out);
        put_half(m, out + 2);
        put_scales_and_minimums(scales, minimums, out + 4);
        put_bit_planes(codes, 4, out + 16);
        for (int c = 0; c < 4; ++c) put_nibbles(codes + 64 * c, 32, out + 48 + 32 * c);
    }
};

struct PackQ3K {
    static void put(const uint8_t* codes, const float* scales, uint16_t d, uint8_t* out) {
        put_bit_planes(codes, 2, out);
        put_two_bits(codes, out + 32);
        put_q3_k_scales(scales, out + 96);
        put_half(d, out + 108);
    }
};

struct PackQ6K {
    static void put(const uint8_t* codes, const float* scales, uint16_t d, uint8_t* out) {
        uint8_t high[256];
        for (int i = 0; i < 256; ++i) high[i] = static_cast<uint8_t>(codes[i] >> 4);
        for (int half = 0; half < 2; ++half) {
            put_nibbles(codes + 128 * half, 64, out + 64 * half);
        }
        put_two_bits(high, out + 128);
        for (int i = 0; i < 16; ++i) {
            out[192 + i] = static_cast<uint8_t>(static_cast<int>(scales[i]));
        }
        put_half(d, out + 208);
    }
};

struct PackIQ4XS {
    static void put(const uint8_t* codes, const float* scales, uint16_t d, uint8_t* out) {
        put_half(d, out);
        uint32_t high = 0;
        for (int i = 4; i < 8; ++i) out[i] = 0;
        for (int i = 0; i < 8; ++i) {
            const int scale = static_cast<int>(scales[i]) + 32;
            out[4 + i / 2] = static_cast<uint8_t>(out[4 + i / 2] | (scale & 15) << (i % 2 * 4));
            high |= static_cast<uint32_t>(scale >> 4) << (2 * i);
        }
        put_half(static_cast<uint16_t>(high), out + 2);
        for (int i = 0; i < 8; ++i) put_nibbles(codes + 32 * i, 16, out + 8 + 16 * i);
    }
};

// Blocks of 32 with one scale: Q4_0, IQ4_NL, Q5_0, whose integer scale is always 1.
struct PackNibbles {
    static void put(const uint8_t* codes, const float*, uint16_t d, uint8_t* out) {
        put_half(d, out);
        put_nibbles(codes, 16, out + 2);
    }
};

struct PackQ5_0 {
    static void put(const uint8_t* codes, const float*, uint16_t d, uint8_t* out) {
        put_half(d, out);
        put_fifth_bits(codes, out + 2);
        put_nibbles(codes, 16, out + 6);
    }
};

struct PackQ4_1 {
    static void put(const uint8_t* codes, uint16_t d, uint16_t m, uint8_t* out) {
        put_half(d, out);
        put_half(m, out + 2);
        put_nibbles(codes, 16, out + 4);
    }
};

struct PackQ5_1 {
    static void put(const uint8_t* codes, uint16_t d, uint16_t m, uint8_t* out) {
        put_half(d, out);
        put_half(m, out + 2);
        put_fifth_bits(codes, out + 4);
        put_nibbles(codes, 16, out + 8);
    }
};

}  // namespace
}  // namespace smolrun
