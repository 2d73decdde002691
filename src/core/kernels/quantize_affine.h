// Weights as scale * code + minimum, with codes from 0 to kTop: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K.
#pragma once

#include "kernels/quantize_lanes.h"

namespace smolrun {
namespace {

// Weighted sums over the weights of a sub-block that no choice of codes changes.
struct Moments {
    Lanes w, x, xx;  // sums of w, w x, w x^2
    Lanes low, high;
};

// Weighted sums that depend on the codes q.
struct CodeSums {
    Lanes q, qq, xq;  // sums of w q, w q^2, w x q
};

// A line through the weights, x = scale * q + offset, and how much it takes off the sum of w x^2.
struct Line {
    Lanes scale, offset, gain;
};

template <int kSize>
Moments moments(const Tile<kSize>& tile, int lane) {
    Moments m{Lanes{}, Lanes{}, Lanes{}, load_lanes(tile.x[0] + lane), {}};
    m.high = m.low;
    for (int i = 0; i < kSize; ++i) {
        const Lanes x = load_lanes(tile.x[i] + lane), w = load_lanes(tile.w[i] + lane);
        const Lanes wx = w * x;
        m.w += w;
        m.x += wx;
        m.xx += wx * x;
        m.low = lower(m.low, x);
        m.high = higher(m.high, x);
    }
    return m;
}

template <int kTop>
SMOLRUN_ALWAYS Lanes affine_code(Lanes x, Lanes origin, Lanes steps) {
    return round_lanes(clamp_lanes((x - origin) * steps, 0, kTop));
}

template <int kTop, int kSize>
SMOLRUN_ALWAYS CodeSums code_sums(const Tile<kSize>& tile, int lane, Lanes origin, Lanes steps) {
    CodeSums sums{};
    for (int i = 0; i < kSize; ++i) {
        const Lanes x = load_lanes(tile.x[i] + lane), w = load_lanes(tile.w[i] + lane);
        const Lanes q = affine_code<kTop>(x, origin, steps);
        const Lanes wq = w * q;
        sums.q += wq;
        sums.qq += wq * q;
        sums.xq += wq * x;
    }
    return sums;
}

// The least-squares line for given codes; its offset is at most 0 where kNegative says so.
template <bool kNegative>
SMOLRUN_ALWAYS Line least_squares(const Moments& m, const CodeSums& s) {
    const Lanes determinant = m.w * s.qq - s.q * s.q;
    const auto sound = determinant > 1e-6f * (m.w * s.qq);
    const Lanes factor = sound ? 1.0f / determinant : Lanes{};
    Lanes scale = (m.w * s.xq - m.x * s.q) * factor;
    Lanes offset = sound ? (s.qq * m.x - s.q * s.xq) * factor : m.x * inverse(m.w);
    if constexpr (kNegative) {
        const auto positive = offset > 0.0f;
        offset = positive ? Lanes{} : offset;
        scale = positive ? higher(s.xq * inverse(s.qq), Lanes{}) : scale;
    }
    return {scale, offset, scale * s.xq + offset * m.x};
}

// The weighted squared error of a line as it will be read back.
template <int kTop, int kSize>
SMOLRUN_ALWAYS Lanes line_error(const Tile<kSize>& tile, int lane, Lanes scale, Lanes offset) {
    const Lanes steps = inverse(scale);
    Lanes error{};
    for (int i = 0; i < kSize; ++i) {
        const Lanes x = load_lanes(tile.x[i] + lane);
        const Lanes rest = (x - offset) - affine_code<kTop>(x, offset, steps) * scale;
        error += load_lanes(tile.w[i] + lane) * (rest * rest);
    }
    return error;
}

// Searches windows of several widths and places over the range of a sub-block, takes the line that
// fits its codes best, and lets codes and line follow each other from there.
//
// A line that is to be stored as it is (kStored: two float16, any sign) is judged by the error that
// it will have then. One that a block's scales will round again keeps its offset at most 0, and is
// judged by its gain, which takes half the work.
template <int kTop, bool kStored, int kSize>
Line search_line(const Tile<kSize>& tile, int lane) {
    // Window / range, narrowest last: the fewer codes, the more it pays to clip.
    static constexpr float kFew[] = {1.0f, 1.25f, 1.1f, 0.92f, 0.84f, 0.76f, 0.68f, 0.6f};
    static constexpr float kMany[] = {1.0f, 1.04f, 0.96f, 0.92f, 0.87f, 0.81f};
    const Moments m = moments(tile, lane);
    const Lanes low = kStored ? m.low : lower(m.low, Lanes{});
    const Lanes range = m.high - low;
    Line best{Lanes{}, m.x * inverse(m.w), {}};
    if constexpr (!kStored) best.offset = lower(best.offset, Lanes{});
    best.gain = kStored ? all(-HUGE_VALF) : best.offset * m.x;
    const auto judge = [&](Line line) {
        if constexpr (kStored) line.gain = -line_error<kTop>(tile, lane, line.scale, line.offset);
        const auto better = line.gain > best.gain * (kStored ? 1.0f : kClearly);
        best.scale = better ? line.scale : best.scale;
        best.offset = better ? line.offset : best.offset;
        best.gain = better ? line.gain : best.gain;
    };
    const auto take = [&](Lanes origin, Lanes steps) {
        const CodeSums sums = code_sums<kTop>(tile, lane, origin, steps);
        Line line = least_squares<!kStored>(m, sums);
        if constexpr (kStored) {
            line.scale = half_precision(line.scale);
            // What suits the scale as it is stored.
            line.offset = half_precision((m.x - line.scale * sums.q) * inverse(m.w));
        }
        judge(line);
    };
    // Weights that lay on such a grid before lie on it still, which a line through those of some
    // importance may miss by a little.
    if constexpr (kStored) {
        judge(Line{half_precision(range * (1.0f / kTop)), half_precision(low), {}});
    }
    constexpr int kWidths = kTop <= 3 ? 8 : 6;
    for (int i = 0; i < kWidths; ++i) {
        const float width = kTop <= 3 ? kFew[i] : kMany[i];
        const Lanes steps = float{kTop} * inverse(range * width);
        const Lanes slack = range * (1 - width);
        for (const float place : {0.0f, 0.5f, 1.0f}) {
            take(low + slack * place, steps);
            if (width == 1) break;
        }
    }
    for (int i = 0; i < 3; ++i) take(best.offset, inverse(best.scale));
    return best;
}

// A tile of blocks with a scale and a minimum for each sub-block, as integers times two float16.
template <int kParts>
struct AffineBlocks {
    static constexpr int kBlocks = kTileLanes / kParts;
    HalfScale d[kBlocks], m[kBlocks];
    float scales[kTileLanes], minimums[kTileLanes];  // integers
    double error[kBlocks];
};

// Finds d, m and the integers for lines as they were found for each sub-block by itself.
template <int kSize, int kTop, int kParts, int kMost, int kWindow>
class AffineSearch {
  public:
    static constexpr int kBlocks = kTileLanes / kParts;
    using Blocks = AffineBlocks<kParts>;

    explicit AffineSearch(const Tile<kSize>& tile) : tile_(tile) {
        for (int lane = 0; lane < kTileLanes; lane += kQuantizeLanes) {
            const Line line = search_line<kTop, false>(tile, lane);
            store_lanes(scales_ + lane, line.scale);
            store_lanes(minimums_ + lane, -line.offset);
        }
    }

    Blocks run() {
        for (int block = 0; block < kBlocks; ++block) best_.error[block] = HUGE_VAL;
        // The largest scale and minimum as one of the largest integers; or beyond them, which makes
        // the others finer.
        static constexpr float kBeyond = kMost > 15 ? 1.01f : 1.12f;
        for (const float scale_top : {1.0f * kMost, kMost - 1.0f, kMost - 2.0f, kBeyond * kMost}) {
            for (const float minimum_top : {1.0f * kMost, kMost - 1.0f, kBeyond * kMost}) {
                Blocks next;
                for (int block = 0; block < kBlocks; ++block) {
                    const int first = block * kParts;
                    const float unit = tile_.unit[first];
                    const float s = largest_of(scales_ + first, kParts);
                    const float m = largest_of(minimums_ + first, kParts);
                    next.d[block] = covering_half_scale(s / scale_top, unit);
                    next.m[block] = covering_half_scale(m / minimum_top, unit);
                }
                assign<0>(next, scales_, minimums_);
                keep(next);
            }
        }
        if (!all_finite(best_.error, kBlocks)) return best_;  // a scale too large for a float16
        Blocks first = best_;
        assign<kWindow>(first, scales_, minimums_);
        keep(first);
        for (int i = 0; i < 2; ++i) {
            Blocks next = refitted();
            alignas(64) float scales[kTileLanes], minimums[kTileLanes];
            for (int lane = 0; lane < kTileLanes; ++lane) {
                const int block = lane / kParts;
                scales[lane] = best_.scales[lane] * best_.d[block].value;
                minimums[lane] = best_.minimums[lane] * best_.m[block].value;
            }
            assign<1>(next, scales, minimums);
            keep(next);
        }
        return best_;
    }

  private:
    // The integers within kNear of wanted scales and minimums that leave the least error under
    // next.d and next.m. Where those are not finite, the error is not.
    template <int kNear>
    void assign(Blocks& next, const float* scales, const float* minimums) {
        alignas(64) float d[kTileLanes], m[kTileLanes], errors[kTileLanes];
        for (int lane = 0; lane < kTileLanes; ++lane) {
            d[lane] = next.d[lane / kParts].value;
            m[lane] = next.m[lane / kParts].value;
        }
        for (int lane = 0; lane < kTileLanes; lane += kQuantizeLanes) {
            const Lanes ds = load_lanes(d + lane), ms = load_lanes(m + lane);
            const Lanes scale =
                round_lanes(clamp_lanes(load_lanes(scales + lane) * inverse(ds), 0, kMost));
            const Lanes minimum =
                round_lanes(clamp_lanes(load_lanes(minimums + lane) * inverse(ms), 0, kMost));
            Lanes best_scale{}, best_minimum{}, best_error = all(HUGE_VALF);
            for (int i = -kNear; i <= kNear; ++i) {
                const Lanes s = clamp_lanes(scale + static_cast<float>(i), 0, kMost);
                for (int j = -kNear; j <= kNear; ++j) {
                    const Lanes n = clamp_lanes(minimum + static_cast<float>(j), 0, kMost);
                    const Lanes error = line_error<kTop>(tile_, lane, ds * s, -(ms * n));
                    const auto better = error < best_error;
                    best_scale = better ? s : best_scale;
                    best_minimum = better ? n : best_minimum;
                    best_error = better ? error : best_error;
                }
            }
            store_lanes(next.scales + lane, best_scale);
            store_lanes(next.minimums + lane, best_minimum);
            store_lanes(errors + lane, best_error);
        }
        sum_blocks<kParts>(errors, next.error);
    }

    void keep(const Blocks& next) {
        for (int block = 0; block < kBlocks; ++block) {
            if (!(next.error[block] < best_.error[block])) continue;
            best_.d[block] = next.d[block];
            best_.m[block] = next.m[block];
            best_.error[block] = next.error[block];
            for (int lane = block * kParts; lane < (block + 1) * kParts; ++lane) {
                best_.scales[lane] = next.scales[lane];
                best_.minimums[lane] = next.minimums[lane];
            }
        }
    }

    // d and m by least squares for the integers and codes of the best so far.
    Blocks refitted() {
        alignas(64) float sums[6][kTileLanes];
        for (int lane = 0; lane < kTileLanes; lane += kQuantizeLanes) {
            Lanes d{}, m{};
            for (int i = 0; i < kQuantizeLanes; ++i) {
                d[i] = best_.d[(lane + i) / kParts].value;
                m[i] = best_.m[(lane + i) / kParts].value;
            }
            const Lanes scale = d * load_lanes(best_.scales + lane);
            const Lanes offset = -(m * load_lanes(best_.minimums + lane));
            const CodeSums s = code_sums<kTop>(tile_, lane, offset, inverse(scale));
            const Moments fixed = moments(tile_, lane);
            store_lanes(sums[0] + lane, s.q);
            store_lanes(sums[1] + lane, s.qq);
            store_lanes(sums[2] + lane, s.xq);
            store_lanes(sums[3] + lane, fixed.w);
            store_lanes(sums[4] + lane, fixed.x);
        }
        Blocks next;
        for (int block = 0; block < kBlocks; ++block) {
            double aa = 0, ab = 0, bb = 0, ax = 0, bx = 0;  // x = d a - m b
            for (int lane = block * kParts; lane < (block + 1) * kParts; ++lane) {
                const double s = best_.scales[lane], n = best_.minimums[lane];
                aa += s * s * sums[1][lane];
                ab += s * n * sums[0][lane];
                bb += n * n * sums[3][lane];
                ax += s * sums[2][lane];
                bx += n * sums[4][lane];
            }
            const double determinant = aa * bb - ab * ab;
            double d = aa > 0 ? ax / aa : 0, m = 0;
            if (determinant > 1e-9 * aa * bb) {
                d = (ax * bb - ab * bx) / determinant;
                m = (ab * ax - aa * bx) / determinant;
            }
            const float unit = tile_.unit[block * kParts];
            next.d[block] = half_scale(static_cast<float>(d), unit);
            next.m[block] = half_scale(static_cast<float>(m), unit);
        }
        return next;
    }

    const Tile<kSize>& tile_;
    alignas(64) float scales_[kTileLanes];
    alignas(64) float minimums_[kTileLanes];
    Blocks best_{};
};

}  // namespace
}  // namespace smolrun
