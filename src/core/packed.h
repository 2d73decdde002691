// Where things stand in a packed block (blocks.h says what they are), and what its codes mean.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace smolrun {

// The weights that share one step of every kernel, and one scale of the activations.
inline constexpr int64_t kPieceWeights = 32;

// Products of float weights sum so many columns by themselves, then add these sums.
inline constexpr int64_t kFloatPartColumns = 512;

// Columns of I16 that share a scale of a row, and those whose products are summed in 32 bits.
inline constexpr int64_t kCodePartColumns = 512;
inline constexpr int64_t kCodeRunColumns = 128;
inline constexpr int64_t kCodePartRuns = kCodePartColumns / kCodeRunColumns;
inline constexpr int64_t kCodeScaleBytes = kGroupRows * int64_t{sizeof(float)};  // of a part
inline constexpr int64_t kCodePartBytes =
    kCodeScaleBytes + kGroupRows * kCodePartColumns * int64_t{sizeof(int16_t)};

// Scales for codes so large that neither one of them nor a sum of products leaves its bits:
// |w . x| <= |w| |x|, and 46300 + sqrt(1024) / 2 squared is below 2^31.
inline constexpr double kLargestCode = 32767, kLargestNorm = 46300;

struct PackedLayout {
    // Bits of a code in the first plane, and in the second one above it (0: there is none).
    int low_bits, high_bits;
    // What a code stands for: code - offset, or kNonlinearValues[code] where `lookup` is set.
    int offset;
    bool lookup;
    // Weights that share a scale: 16 or 32.
    int sub_block;
    // Byte offsets in a packed block; -1: the type has no such field.
    int64_t low, high, scales, scales_high, scale, minimum;
};

constexpr PackedLayout packed_layout(WeightType type) {
    constexpr int64_t rows = kGroupRows, none = -1;
    switch (type) {
        case WeightType::Q4_0:
            return {4, 0, 8, false, 32, 0, none, none, none, 16 * rows, none};
        case WeightType::Q4_1:
            return {4, 0, 0, false, 32, 0, none, none, none, 16 * rows, 18 * rows};
        case WeightType::Q5_0:
            return {4, 1, 16, false, 32, 0, 16 * rows, none, none, 20 * rows, none};
        case WeightType::Q5_1:
            return {4, 1, 0, false, 32, 0, 16 * rows, none, none, 20 * rows, 22 * rows};
        case WeightType::Q8_0:
            return {8, 0, 128, false, 32, 0, none, none, none, 32 * rows, none};
        case WeightType::Q2_K:
            return {2, 0, 0, false, 16, 0, none, 64 * rows, none, 80 * rows, 82 * rows};
        case WeightType::Q3_K:
            return {2, 1, 4, false, 16, 0, 64 * rows, 96 * rows, none, 108 * rows, none};
        case WeightType::Q4_K:
            return {4, 0, 0, false, 32, 0, none, 128 * rows, none, 140 * rows, 142 * rows};
        case WeightType::Q5_K:
            return {4, 1, 0, false, 32, 0, 128 * rows, 160 * rows, none, 172 * rows, 174 * rows};
        case WeightType::Q6_K:
            return {4, 2, 32, false, 16, 0, 128 * rows, 192 * rows, none, 208 * rows, none};
        case WeightType::IQ4_NL:
            return {4, 0, 0, true, 32, 0, none, none, none, 16 * rows, none};
        case WeightType::IQ4_XS:
            return {4, 0, 0, true, 32, 0, none, 128 * rows, 132 * rows, 134 * rows, none};
        default:  // float types have no fields
            return {0, 0, 0, false, 0, none, none, none, none, none, none};
    }
}

// What the codes of IQ4_NL and IQ4_XS stand for.
inline constexpr int8_t kNonlinearValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                1,    13,   25,  38,  53,  69,  89,  113};

}  // namespace smolrun
