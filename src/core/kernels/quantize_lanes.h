// What the quantize_*.h share: vectors in which every lane owns a sub-block, and tiles of them.
//
// A sum over the weights of a sub-block then runs down a lane, in the order of the weights, so that
// every instruction set gives the same bytes and a loop over candidates needs no horizontal sum.
// Vectors are the compiler's own, as wide as the flags of the file allow. Everything is in an
// unnamed namespace, as files of several instruction sets include it.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "blocks.h"
#include "kernels/numbers.h"

#define SMOLRUN_ALWAYS inline __attribute__((always_inline))

namespace smolrun {
namespace {

#if defined(__AVX512F__)
constexpr int kQuantizeLanes = 16;
#elif defined(__AVX2__)
constexpr int kQuantizeLanes = 8;
#else
constexpr int kQuantizeLanes = 4;
#endif
constexpr int kTileLanes = 16;  // sub-blocks in a tile

using Lanes = float __attribute__((vector_size(kQuantizeLanes * sizeof(float))));

SMOLRUN_ALWAYS Lanes all(float x) { return Lanes{} + x; }
SMOLRUN_ALWAYS Lanes load_lanes(const float* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
SMOLRUN_ALWAYS void store_lanes(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }
SMOLRUN_ALWAYS Lanes lower(Lanes a, Lanes b) { return a < b ? a : b; }
SMOLRUN_ALWAYS Lanes higher(Lanes a, Lanes b) { return a > b ? a : b; }
SMOLRUN_ALWAYS Lanes magnitude(Lanes x) { return higher(x, -x); }

// To the nearest integer, halves to even; |x| < 2^22.
SMOLRUN_ALWAYS Lanes round_lanes(Lanes x) {
    constexpr float kInteger = 12582912.0f;  // 1.5 * 2^23: the unit of the last place is 1
    return (x + kInteger) - kInteger;
}
SMOLRUN_ALWAYS Lanes clamp_lanes(Lanes x, float low, float high) {
    return lower(higher(x, all(low)), all(high));
}
// 1/x, and 0 for 0.
SMOLRUN_ALWAYS Lanes inverse(Lanes x) { return x != 0.0f ? 1.0f / x : Lanes{}; }

// A gain must grow by more than rounding does, so that of equals the first is kept.
constexpr float kClearly = 1 + 1e-6f;

// Sixteen sub-blocks of kSize weights, transposed: values, importances of their columns, and what
// their errors count in a search, each [kSize][16 sub-blocks].
//
// The values of a block are divided by a power of two near the largest, so that no square of a
// huge or tiny weight leaves the range of a float. `unit` is that power, for each sub-block.
template <int kSize>
struct Tile {
    alignas(64) float x[kSize][kTileLanes];
    alignas(64) float importance[kSize][kTileLanes];
    alignas(64) float w[kSize][kTileLanes];
    float unit[kTileLanes];
};

// What of a row of blocks goes into a tile: `count` blocks from block `first` on.
struct BlockRange {
    const float* x;           // [blocks][weights in a block]
    const float* importance;  // [blocks in a row][weights in a block], or null: all 1
    int64_t row_blocks;
    int64_t first;
    int64_t count;
};

// What <algorithm> offers, local to the file: of its templates the linker would keep one copy for
// all files, which might be the one that this CPU can not run.
inline float largest_of(const float* x, int64_t count) {
    float largest = x[0];
    for (int64_t i = 1; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
}
// The first of largest magnitude, with its sign; 0 where all are.
inline float farthest_of(const float* x, int64_t count) {
    float farthest = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (std::fabs(x[i]) > std::fabs(farthest)) farthest = x[i];
    }
    return farthest;
}

// Sums of sub-blocks, added up for each of their blocks.
template <int kParts>
void sum_blocks(const float* parts, double* blocks) {
    for (int block = 0; block < kTileLanes / kParts; ++block) {
        blocks[block] = 0;
        for (int part = 0; part < kParts; ++part) {
            blocks[block] += double{parts[block * kParts + part]};
        }
    }
}

inline bool all_finite(const double* x, int64_t count) {
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) finite &= std::fabs(x[i]) < HUGE_VAL;
    return finite;
}

// A power of two near the largest magnitude, 1 for zeros. Nothing below 2^-60 reaches a code, as
// the smallest scale that a float16 holds is 2^-24.
inline float unit_of(const float* x, int64_t size) {
    const float largest = std::fabs(farthest_of(x, size));
    if (largest == 0) return 1;
    const auto exponent = static_cast<int>(std::bit_cast<uint32_t>(largest) >> 23) - 127;
    const int kept = exponent < -60 ? -60 : exponent > 120 ? 120 : exponent;
    return std::bit_cast<float>(static_cast<uint32_t>(kept + 127) << 23);
}

// How much more errors of large weights count than those of small ones. Where codes are few, the
// least squared error alone takes too much from the large weights for the sake of the many small
// ones, and a model suffers (docs/decisions.md).
enum class Emphasis {
    none,
    some,  // by the deviation of a sub-block + the weight's magnitude
};

template <Emphasis kEmphasis, int kSize>
void emphasize(Tile<kSize>& tile, int64_t lane) {
    if constexpr (kEmphasis == Emphasis::none) return;
    float squares = 0;
    for (int i = 0; i < kSize; ++i) squares += tile.x[i][lane] * tile.x[i][lane];
    // And a little of the unit, so that the smallest are not without importance.
    const float base = 0.03f + std::sqrt(squares / kSize);
    for (int i = 0; i < kSize; ++i) tile.w[i][lane] *= base + std::fabs(tile.x[i][lane]);
}

// Sub-blocks past the end are zeros of importance 1.
template <Emphasis kAlone, Emphasis kWithImportance, int kSize>
void load_tile(const BlockRange& from, int64_t block_size, Tile<kSize>& tile) {
    const int64_t parts = block_size / kSize;  // sub-blocks in a block
    for (int64_t lane = 0; lane < kTileLanes; ++lane) {
        const int64_t block = from.first + lane / parts;
        if (lane / parts >= from.count) {
            tile.unit[lane] = 1;
            for (int i = 0; i < kSize; ++i) {
                tile.x[i][lane] = 0;
                tile.importance[i][lane] = tile.w[i][lane] = 1;
            }
            continue;
        }
        const int64_t part = lane % parts * kSize;
        const float* const x = from.x + block * block_size;
        tile.unit[lane] = part == 0 ? unit_of(x, block_size) : tile.unit[lane - 1];
        const float scale = 1 / tile.unit[lane];
        for (int i = 0; i < kSize; ++i) tile.x[i][lane] = x[part + i] * scale;
        const float* const w = from.importance == nullptr
                                   ? nullptr
                                   : from.importance + block % from.row_blocks * block_size + part;
        for (int i = 0; i < kSize; ++i) {
            tile.importance[i][lane] = tile.w[i][lane] = w == nullptr ? 1 : w[i];
        }
        if (w == nullptr) {
            emphasize<kAlone>(tile, lane);
        } else {
            emphasize<kWithImportance>(tile, lane);
        }
    }
}

// A scale as a block stores it: float16 in the unit of the weights.
struct HalfScale {
    uint16_t bits;
    float value;  // divided by the unit, as the values of a tile are
};
inline HalfScale half_scale(float value, float unit) {
    const uint16_t bits = half_from_float(value * unit);
    return {bits, float_from_half(bits) / unit};
}
// Rounded to the 11 bits of a float16, unless it is subnormal or too large as one.
SMOLRUN_ALWAYS Lanes half_precision(Lanes x) {
    const Lanes shifted = x * 8193.0f;  // 2^13 + 1
    return shifted - (shifted - x);
}
// At least as large in magnitude, so that `value` stays within reach of the largest integer scale.
// Rounding to nearest does for normal numbers; a subnormal one would lose too much.
inline HalfScale covering_half_scale(float value, float unit) {
    HalfScale scale = half_scale(value, unit);
    if (std::fabs(scale.value) < std::fabs(value) * 0.999f && (scale.bits & 0x7fff) < 0x7bff) {
        const auto bits = static_cast<uint16_t>(scale.bits + 1);
        scale = {bits, float_from_half(bits) / unit};
    }
    return scale;
}

}  // namespace
}  // namespace smolrun
