// Weights as scale * level, where levels are integers around 0 (Q4_0, Q5_0, Q3_K, Q6_K) or those
// of a table (IQ4_NL, IQ4_XS).
#pragma once

#include "kernels/quantize_lanes.h"

namespace smolrun {
namespace {

// The integers from -kReach to kReach - 1; code = level + kReach.
template <int kReach>
struct Integers {
    static constexpr float kLow = -kReach, kHigh = kReach - 1;
    // Where the largest weight may come to lie, of the last level; beyond it where clipping pays.
    static constexpr float kPlaces[] = {1.0f, 0.97f, 0.94f, 0.88f, 0.8f, 0.7f, 1.06f, 1.12f};

    static SMOLRUN_ALWAYS Lanes nearest(Lanes x) {
        return round_lanes(clamp_lanes(x, kLow, kHigh));
    }
    // From 0 up.
    static SMOLRUN_ALWAYS Lanes code(Lanes x) { return nearest(x) + float{kReach}; }
};

// The levels of IQ4_NL and IQ4_XS.
struct Nonlinear {
    static constexpr float kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};
    static constexpr float kLow = -127, kHigh = 113;
    static constexpr float kPlaces[] = {1.0f, 0.97f, 0.94f, 0.9f, 0.85f, 1.03f, 1.06f, 1.1f};

    static SMOLRUN_ALWAYS Lanes nearest(Lanes x) {
        Lanes level = all(kLevels[0]);
#pragma GCC unroll 15
        for (int i = 1; i < 16; ++i) {
            level = x > (kLevels[i - 1] + kLevels[i]) / 2 ? all(kLevels[i]) : level;
        }
        return level;
    }
    static SMOLRUN_ALWAYS Lanes code(Lanes x) {
        Lanes code{};
        for (int i = 1; i < 16; ++i) {
            code += x > (kLevels[i - 1] + kLevels[i]) / 2 ? all(1) : Lanes{};
        }
        return code;
    }
};

struct LevelSums {
    Lanes vv, xv;  // sums of w v^2, w x v over levels v
};

template <class Levels, int kSize>
SMOLRUN_ALWAYS LevelSums level_sums(const Tile<kSize>& tile, int lane, Lanes steps) {
    LevelSums sums{};
    for (int i = 0; i < kSize; ++i) {
        const Lanes x = load_lanes(tile.x[i] + lane), w = load_lanes(tile.w[i] + lane);
        const Lanes v = Levels::nearest(x * steps);
        const Lanes wv = w * v;
        sums.vv += wv * v;
        sums.xv += wv * x;
    }
    return sums;
}

template <class Levels, int kSize>
SMOLRUN_ALWAYS Lanes level_error(const Tile<kSize>& tile, int lane, Lanes scale) {
    const Lanes steps = inverse(scale);
    Lanes error{};
    for (int i = 0; i < kSize; ++i) {
        const Lanes x = load_lanes(tile.x[i] + lane);
        const Lanes rest = x - Levels::nearest(x * steps) * scale;
        error += load_lanes(tile.w[i] + lane) * (rest * rest);
    }
    return error;
}

// The scale, of either sign, that leaves the least error: the largest weight is put near the lowest
// level and near the highest, scales are fitted to the levels, and levels and scale follow.
template <class Levels, int kSize>
Lanes search_scale(const Tile<kSize>& tile, int lane) {
    Lanes largest{}, size{};
    for (int i = 0; i < kSize; ++i) {
        const Lanes x = load_lanes(tile.x[i] + lane);
        const auto beyond = magnitude(x) > size;
        largest = beyond ? x : largest;
        size = beyond ? magnitude(x) : size;
    }
    const Lanes unit_steps = inverse(largest);
    Lanes best{}, best_gain{};
    const auto take = [&](Lanes steps) {
        const LevelSums s = level_sums<Levels>(tile, lane, steps);
        const Lanes scale = s.xv * inverse(s.vv), gain = scale * s.xv;
        const auto better = gain > best_gain * kClearly;
        best = better ? scale : best;
        best_gain = better ? gain : best_gain;
    };
    for (const float place : Levels::kPlaces) {
        take(unit_steps * (place * Levels::kLow));
        take(unit_steps * (place * Levels::kHigh));
    }
    for (int i = 0; i < 3; ++i) take(inverse(best));
    return best;
}

// A tile of blocks with an integer scale for each sub-block, times one float16.
template <int kParts>
struct ScaledBlocks {
    static constexpr int kBlocks = kTileLanes / kParts;
    HalfScale d[kBlocks];
    float scales[kTileLanes];  // integers
    double error[kBlocks];
};

// Finds d and the integers, from kLow to kHigh.
template <class Levels, int kSize, int kParts, int kLow, int kHigh, int kWindow>
class ScaledSearch {
  public:
    static constexpr int kBlocks = kTileLanes / kParts;
    using Blocks = ScaledBlocks<kParts>;

    explicit ScaledSearch(const Tile<kSize>& tile) : tile_(tile) {
        for (int lane = 0; lane < kTileLanes; lane += kQuantizeLanes) {
            store_lanes(scales_ + lane, search_scale<Levels>(tile, lane));
        }
    }

    Blocks run() {
        for (int block = 0; block < kBlocks; ++block) best_.error[block] = HUGE_VAL;
        // The largest scale as one of the largest integers, of either sign.
        for (const int reach : {kLow, kHigh, kLow + 1, kHigh - 1, kLow + 2}) {
            if (reach == 0) break;
            Blocks next;
            for (int block = 0; block < kBlocks; ++block) {
                const float largest = farthest_of(scales_ + block * kParts, kParts);
                next.d[block] = covering_half_scale(largest / static_cast<float>(reach),
                                                    tile_.unit[block * kParts]);
            }
            assign<0>(next, scales_);
            keep(next);
            if (kLow == kHigh) break;
        }
        if (!all_finite(best_.error, kBlocks)) return best_;  // a scale too large for a float16
        Blocks next = best_;
        assign<kWindow>(next, scales_);
        keep(next);
        for (int i = 0; i < 2; ++i) {
            next = refitted();
            alignas(64) float scales[kTileLanes];
            for (int lane = 0; lane < kTileLanes; ++lane) {
                scales[lane] = best_.scales[lane] * best_.d[lane / kParts].value;
            }
            assign<kLow == kHigh ? 0 : 1>(next, scales);
            keep(next);
        }
        return best_;
    }

  private:
    // The integers within kNear of wanted scales that leave the least error under next.d. Where d
    // is not finite, the error is not.
    template <int kNear>
    void assign(Blocks& next, const float* scales) {
        alignas(64) float d[kTileLanes], errors[kTileLanes];
        for (int lane = 0; lane < kTileLanes; ++lane) d[lane] = next.d[lane / kParts].value;
        for (int lane = 0; lane < kTileLanes; lane += kQuantizeLanes) {
            const Lanes ds = load_lanes(d + lane);
            const Lanes scale =
                round_lanes(clamp_lanes(load_lanes(scales + lane) * inverse(ds), kLow, kHigh));
            Lanes best_scale{}, best_error = all(HUGE_VALF);
            for (int i = -kNear; i <= kNear; ++i) {
                const Lanes s = clamp_lanes(scale + static_cast<float>(i), kLow, kHigh);
                const Lanes error = level_error<Levels>(tile_, lane, ds * s);
                const auto better = error < best_error;
                best_scale = better ? s : best_scale;
                best_error = better ? error : best_error;
            }
            store_lanes(next.scales + lane, best_scale);
            store_lanes(errors + lane, best_error);
        }
        sum_blocks<kParts>(errors, next.error);
    }

    void keep(const Blocks& next) {
        for (int block = 0; block < kBlocks; ++block) {
            if (!(next.error[block] < best_.error[block])) continue;
            best_.d[block] = next.d[block];
            best_.error[block] = next.error[block];
            for (int lane = block * kParts; lane < (block + 1) * kParts; ++lane) {
                best_.scales[lane] = next.scales[lane];
            }
        }
    }

    // d by least squares for the integers and levels of the best so far.
    Blocks refitted() {
        alignas(64) float vv[kTileLanes], xv[kTileLanes];
        for (int lane = 0; lane < kTileLanes; lane += kQuantizeLanes) {
            Lanes d{};
            for (int i = 0; i < kQuantizeLanes; ++i) d[i] = best_.d[(lane + i) / kParts].value;
            const LevelSums s =
                level_sums<Levels>(tile_, lane, inverse(d * load_lanes(best_.scales + lane)));
            store_lanes(vv + lane, s.vv);
            store_lanes(xv + lane, s.xv);
        }
        Blocks next;
        for (int block = 0; block < kBlocks; ++block) {
            double xs = 0, ss = 0;
            for (int lane = block * kParts; lane < (block + 1) * kParts; ++lane) {
                const double scale = best_.scales[lane];
                xs += scale * xv[lane];
                ss += scale * scale * vv[lane];
            }
            const float d = ss > 0 ? static_cast<float>(xs / ss) : 0.0f;
            next.d[block] = half_scale(d, tile_.unit[block * kParts]);
        }
        return next;
    }

    const Tile<kSize>& tile_;
    alignas(64) float scales_[kTileLanes];
    Blocks best_{};
};

}  // namespace
}  // namespace smolrun
