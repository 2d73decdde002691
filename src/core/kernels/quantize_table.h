// The table of one instruction set, filled from what the quantize_*.h say of each type.
#pragma once

#include "kernels/quantize_affine.h"
#include "kernels/quantize_pack.h"
#include "kernels/quantize_plain.h"
#include "kernels/quantize_scaled.h"
#include "quantize.h"

namespace smolrun {
namespace {

// Codes of a tile, block after block, each in the order of its weights.
template <int kSize>
struct TileCodes {
    uint8_t codes[kTileLanes * kSize];

    void put(int i, int lane, Lanes levels) {
        for (int j = 0; j < kQuantizeLanes; ++j) {
            codes[(lane + j) * kSize + i] = static_cast<uint8_t>(static_cast<int>(levels[j]));
        }
    }
};

// For each lane the float16 of its block.
template <int kParts>
Lanes spread(const HalfScale* scales, int lane) {
    Lanes spread{};
    for (int i = 0; i < kQuantizeLanes; ++i) spread[i] = scales[(lane + i) / kParts].value;
    return spread;
}

// By how much blocks shrink: products of their weights with the weights and with what is read back.
//
// The codes and scales of least error shrink a block, as what they lose is at right angles to what
// they keep. All blocks of a matrix shrink, and its outputs with them, which harms a model more
// than errors of any direction (docs/decisions.md). So once its codes are found, a block's scales
// are multiplied by what makes both products equal.
template <int kParts>
struct Shrinkage {
    alignas(64) float whole[kTileLanes];  // sums of importance x^2
    alignas(64) float kept[kTileLanes];   // sums of importance x y, where y is read back

    // For each block, a share of it.
    void undo(float share, const float* unit, HalfScale* scales) const {
        constexpr int kBlocks = kTileLanes / kParts;
        double wholes[kBlocks], kepts[kBlocks];
        sum_blocks<kParts>(whole, wholes);
        sum_blocks<kParts>(kept, kepts);
        for (int block = 0; block < kBlocks; ++block) {
            if (!(kepts[block] > 0)) continue;
            // Beyond this a block is nearly lost, and no scale brings it back.
            const auto wanted = static_cast<float>(wholes[block] / kepts[block]);
            const float within = wanted < 0.9f ? 0.9f : wanted > 1.2f ? 1.2f : wanted;
            const float factor = 1 + share * (within - 1);
            const HalfScale grown = half_scale(scales[block].value * factor, unit[block * kParts]);
            if (finite_half(grown.bits)) scales[block] = grown;
        }
    }
};

// How much of that is undone: where codes are few, as only there a block shrinks by much. All would
// leave Q3_K a larger error by importance than the usual search leaves.
constexpr float undone(WeightType type, bool importance) {
    switch (type) {
        case WeightType::Q2_K:
            return 1;
        case WeightType::Q3_K:
            return importance ? 0.4f : 1;
        default:
            return 0;
    }
}

// Of errors of large weights, where the importance of columns is given, and where it is not.
constexpr Emphasis emphasis(WeightType type, bool importance) {
    switch (type) {
        case WeightType::Q2_K:
        case WeightType::Q4_1:
            return Emphasis::some;
        case WeightType::Q3_K:
        case WeightType::IQ4_NL:
        case WeightType::IQ4_XS:
            return importance ? Emphasis::none : Emphasis::some;
        default:
            return Emphasis::none;
    }
}

// Calls work(tile, out of its first block, count) for every tile of the rows.
template <WeightType kType, int kSize, int kParts, class Work>
void each_tile(const QuantizeRows& rows, Work&& work) {
    constexpr int64_t kBlocks = kTileLanes / kParts;
    const int64_t row_blocks = rows.columns / (kSize * kParts);
    const int64_t blocks = rows.rows * row_blocks;
    Tile<kSize> tile;
    for (int64_t first = 0; first < blocks; first += kBlocks) {
        const int64_t count = blocks - first < kBlocks ? blocks - first : kBlocks;
        load_tile<emphasis(kType, false), emphasis(kType, true)>(
            BlockRange{rows.x, rows.importance, row_blocks, first, count}, kSize * kParts, tile);
        work(tile, reinterpret_cast<uint8_t*>(rows.out) + first * layout(kType).bytes, count);
    }
}

template <WeightType kType, class Pack, class Levels, int kSize, int kParts, int kLow, int kHigh,
          int kWindow>
bool quantize_scaled(const QuantizeRows& rows) {
    bool finite = true;
    const float share = undone(kType, rows.importance != nullptr);
    each_tile<kType, kSize, kParts>(
        rows, [&](const Tile<kSize>& tile, uint8_t* out, int64_t count) {
            auto found = ScaledSearch<Levels, kSize, kParts, kLow, kHigh, kWindow>(tile).run();
            TileCodes<kSize> codes;
            Shrinkage<kParts> shrinkage;
            for (int lane = 0; lane < kTileLanes; lane += kQuantizeLanes) {
                const Lanes scale = spread<kParts>(found.d, lane) * load_lanes(found.scales + lane);
                const Lanes steps = inverse(scale);
                Lanes whole{}, kept{};
                for (int i = 0; i < kSize; ++i) {
                    const Lanes x = load_lanes(tile.x[i] + lane);
                    const Lanes wx = load_lanes(tile.importance[i] + lane) * x;
                    codes.put(i, lane, Levels::code(x * steps));
                    whole += wx * x;
                    kept += wx * (scale * Levels::nearest(x * steps));
                }
                store_lanes(shrinkage.whole + lane, whole);
                store_lanes(shrinkage.kept + lane, kept);
            }
            if (share > 0) shrinkage.undo(share, tile.unit, found.d);
            for (int64_t block = 0; block < count; ++block) {
                finite &= found.error[block] < HUGE_VAL;
                Pack::put(codes.codes + block * kSize * kParts, found.scales + block * kParts,
                          found.d[block].bits, out + block * layout(kType).bytes);
            }
        });
    return finite;
}

template <WeightType kType, class Pack, int kSize, int kTop, int kParts, int kMost, int kWindow>
bool quantize_affine(const QuantizeRows& rows) {
    bool finite = true;
    const float share = undone(kType, rows.importance != nullptr);
    each_tile<kType, kSize, kParts>(
        rows, [&](const Tile<kSize>& tile, uint8_t* out, int64_t count) {
            auto found = AffineSearch<kSize, kTop, kParts, kMost, kWindow>(tile).run();
            TileCodes<kSize> codes;
            Shrinkage<kParts> shrinkage;
            for (int lane = 0; lane < kTileLanes; lane += kQuantizeLanes) {
                const Lanes scale = spread<kParts>(found.d, lane) * load_lanes(found.scales + lane);
                const Lanes steps = inverse(scale);
                const Lanes offset =
                    -(spread<kParts>(found.m, lane) * load_lanes(found.minimums + lane));
                Lanes whole{}, kept{};
                for (int i = 0; i < kSize; ++i) {
                    const Lanes x = load_lanes(tile.x[i] + lane);
                    const Lanes wx = load_lanes(tile.importance[i] + lane) * x;
                    const Lanes q = affine_code<kTop>(x, offset, steps);
                    codes.put(i, lane, q);
                    whole += wx * x;
                    kept += wx * (scale * q + offset);
                }
                store_lanes(shrinkage.whole + lane, whole);
                store_lanes(shrinkage.kept + lane, kept);
            }
            if (share > 0) {
                shrinkage.undo(share, tile.unit, found.d);
                shrinkage.undo(share, tile.unit, found.m);
            }
            for (int64_t block = 0; block < count; ++block) {
                finite &= found.error[block] < HUGE_VAL;
                Pack::put(codes.codes + block * kSize * kParts, found.scales + block * kParts,
                          found.minimums + block * kParts, found.d[block].bits, found.m[block].bits,
                          out + block * layout(kType).bytes);
            }
        });
    return finite;
}

// Q4_1 and Q5_1: a line for each block of 32.
template <WeightType kType, class Pack, int kTop>
bool quantize_lines(const QuantizeRows& rows) {
    bool finite = true;
    each_tile<kType, 32, 1>(rows, [&](const Tile<32>& tile, uint8_t* out, int64_t count) {
        HalfScale d[kTileLanes], m[kTileLanes];
        TileCodes<32> codes;
        for (int lane = 0; lane < kTileLanes; lane += kQuantizeLanes) {
            const Line line = search_line<kTop, true>(tile, lane);
            for (int i = 0; i < kQuantizeLanes; ++i) {
                d[lane + i] = half_scale(line.scale[i], tile.unit[lane + i]);
                m[lane + i] = half_scale(line.offset[i], tile.unit[lane + i]);
            }
            const Lanes offset = spread<1>(m, lane), steps = inverse(spread<1>(d, lane));
            for (int i = 0; i < 32; ++i) {
                codes.put(i, lane, affine_code<kTop>(load_lanes(tile.x[i] + lane), offset, steps));
            }
        }
        for (int64_t block = 0; block < count; ++block) {
            finite &= finite_half(d[block].bits) && finite_half(m[block].bits);
            Pack::put(codes.codes + block * 32, d[block].bits, m[block].bits,
                      out + block * layout(kType).bytes);
        }
    });
    return finite;
}

template <WeightType kType, PlainBlock kBlock>
bool quantize_plain(const QuantizeRows& rows) {
    bool finite = true;
    const int64_t blocks = rows.rows * rows.columns / 32;
    auto* const out = reinterpret_cast<uint8_t*>(rows.out);
    for (int64_t i = 0; i < blocks; ++i) {
        finite &= kBlock(rows.x + 32 * i, out + layout(kType).bytes * i);
    }
    return finite;
}

using FloatValues = bool (*)(const float* x, int64_t count, uint8_t* out);
template <FloatValues kValues>
bool convert_floats(const QuantizeRows& rows) {
    return kValues(rows.x, rows.rows * rows.columns, reinterpret_cast<uint8_t*>(rows.out));
}

// `plain` where nothing is said of the columns, `searched` where they have an importance.
template <Quantize kPlain, Quantize kSearched>
bool quantize_either(const QuantizeRows& rows) {
    return rows.importance == nullptr ? kPlain(rows) : kSearched(rows);
}

constexpr Quantize quantize_of(WeightType type) {
    using enum WeightType;
    switch (type) {
        case F32:
            return convert_floats<float_values>;
        case F16:
            return convert_floats<half_values>;
        case BF16:
            return convert_floats<bfloat16_values>;
        case Q8_0:
            return quantize_plain<Q8_0, plain_q8_0_block>;
        case Q4_0:
            return quantize_either<quantize_plain<Q4_0, plain_scaled_block<PackNibbles, 8>>,
                                   quantize_scaled<Q4_0, PackNibbles, Integers<8>, 32, 1, 1, 1, 0>>;
        case Q5_0:
            return quantize_either<quantize_plain<Q5_0, plain_scaled_block<PackQ5_0, 16>>,
                                   quantize_scaled<Q5_0, PackQ5_0, Integers<16>, 32, 1, 1, 1, 0>>;
        case Q4_1:
            return quantize_either<quantize_plain<Q4_1, plain_affine_block<PackQ4_1, 15>>,
                                   quantize_lines<Q4_1, PackQ4_1, 15>>;
        case Q5_1:
            return quantize_either<quantize_plain<Q5_1, plain_affine_block<PackQ5_1, 31>>,
                                   quantize_lines<Q5_1, PackQ5_1, 31>>;
        case IQ4_NL:
            return quantize_scaled<IQ4_NL, PackNibbles, Nonlinear, 32, 1, 1, 1, 0>;
        case IQ4_XS:
            return quantize_scaled<IQ4_XS, PackIQ4XS, Nonlinear, 32, 8, -32, 31, 2>;
        case Q3_K:
            return quantize_scaled<Q3_K, PackQ3K, Integers<4>, 16, 16, -32, 31, 2>;
        case Q6_K:
            return quantize_scaled<Q6_K, PackQ6K, Integers<32>, 16, 16, -128, 127, 4>;
        case Q2_K:
            return quantize_affine<Q2_K, PackQ2K, 16, 3, 16, 15, 1>;
        case Q4_K:
            return quantize_affine<Q4_K, PackQ4K, 32, 15, 8, 63, 1>;
        case Q5_K:
            return quantize_affine<Q5_K, PackQ5K, 32, 31, 8, 63, 1>;
        case I16:
        case count:
            break;
    }
    return nullptr;
}

constexpr Quantizers quantizer_table(const char* name) {
    Quantizers table{name, {}};
    for (int i = 0; i < kWeightTypes; ++i) {
        table.quantize[i] = quantize_of(static_cast<WeightType>(i));
    }
    return table;
}

}  // namespace
}  // namespace smolrun
