#include "sampling.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <functional>
#include <limits>
#include <stdexcept>
#include <vector>

namespace smolrun {
namespace {

constexpr int64_t kChains = 8;    // of additions side by side
constexpr int64_t kPiece = 512;   // weights summed at a time when a draw looks for its place
constexpr int64_t kStretch = 32;  // numbers looked at together
constexpr int64_t kRows = 64;     // of a table of logits, each column of which has a highest one
constexpr int64_t kSorted = 64;   // weights that are sorted rather than parted
constexpr float kLikely = 3.3546263e-4f;  // e^-8 of the likeliest: few tokens reach that

// Kept from call to call: a vocabulary of numbers for each.
struct Scratch {
    std::vector<float> weights;   // [count] relative to the likeliest token
    std::vector<int32_t> tokens;  // kept, rising
    std::vector<float> kept;      // their weights
    std::vector<float> some;      // numbers that are parted or sorted
};

double sum(const float* x, int64_t count) {
    double chains[kChains] = {};
    int64_t i = 0;
    for (; i + kChains <= count; i += kChains) {
        for (int64_t j = 0; j < kChains; ++j) chains[j] += double{x[i + j]};
    }
    for (; i < count; ++i) chains[i % kChains] += double{x[i]};
    double total = 0;
    for (const double chain : chains) total += chain;
    return total;
}

double sum(const std::vector<float>& x) { return sum(x.data(), static_cast<int64_t>(x.size())); }

float greatest(const float* x, int64_t count) {
    float chains[16];
    std::fill_n(chains, 16, -std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        for (int64_t j = 0; j < 16; ++j) chains[j] = x[i + j] > chains[j] ? x[i + j] : chains[j];
    }
    for (; i < count; ++i) chains[0] = std::max(chains[0], x[i]);
    return *std::max_element(chains, chains + 16);
}

// Numbers at least as large as `value` are kept, but of those equal to it only the first `equal`.
struct Edge {
    float value;
    int64_t equal;
};

// The edge with which the sum of the highest of `numbers` reaches `mass`; `numbers` is reordered.
Edge edge_of(std::vector<float>& numbers, double mass) {
    auto begin = numbers.begin(), end = numbers.end();
    double above = 0;  // sum of the numbers before `begin`, all higher
    while (end - begin > kSorted) {
        const float ends[3] = {*begin, begin[(end - begin) / 2], end[-1]};
        const float pivot =
            std::max(std::min(ends[0], ends[1]), std::min(std::max(ends[0], ends[1]), ends[2]));
        const auto equal = std::partition(begin, end, [=](float x) { return x > pivot; });
        const auto lower = std::partition(equal, end, [=](float x) { return x == pivot; });
        const double higher = above + sum(&*begin, equal - begin);
        if (higher >= mass && equal != begin) {
            end = equal;
        } else if (const double both = higher + double{pivot} * static_cast<double>(lower - equal);
                   both >= mass) {
            begin = equal, end = lower, above = higher;
            break;
        } else if (lower == end) {
            begin = equal, above = higher;  // the mass is missed by a rounding
            break;
        } else {
            begin = lower, above = both;
        }
    }
    std::sort(begin, end, std::greater<>());
    auto last = begin;
    double total = above + double{*last};
    while (total < mass && last + 1 != end) total += double{*++last};
    const auto first = std::find(begin, last, *last);
    return {*last, last - first + 1};
}

// Leaves what is within the edge, of weights that rise in token ids.
void cut(Scratch& scratch, Edge edge) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < scratch.kept.size(); ++i) {
        const float weight = scratch.kept[i];
        if (weight < edge.value || (weight == edge.value && --edge.equal < 0)) continue;
        scratch.tokens[count] = scratch.tokens[i];
        scratch.kept[count++] = weight;
    }
    scratch.tokens.resize(count);
    scratch.kept.resize(count);
}

// Calls take(i) for every x[i] of x[count] that is at least `least`, in order.
template <class Take>
void each_above(const float* x, int64_t count, float least, Take&& take) {
    int64_t i = 0;
    for (; i + kStretch <= count; i += kStretch) {
        int32_t found = 0;
        for (int64_t j = 0; j < kStretch; ++j) found |= x[i + j] >= least ? 1 : 0;
        if (found == 0) continue;
        for (int64_t j = i; j < i + kStretch; ++j) {
            if (x[j] >= least) take(j);
        }
    }
    for (; i < count; ++i) {
        if (x[i] >= least) take(i);
    }
}

// A number that at least `top_k` of logits[count] reach, and few more where these are few.
float reached_by(Scratch& scratch, const float* logits, int64_t count, int64_t top_k) {
    const int64_t columns = count / kRows;
    if (top_k > columns) return -std::numeric_limits<float>::infinity();
    scratch.some.assign(logits, logits + columns);
    for (int64_t row = 1; row < kRows; ++row) {
        const float* const values = logits + row * columns;
        for (int64_t i = 0; i < columns; ++i) {
            float& highest = scratch.some[static_cast<std::size_t>(i)];
            highest = values[i] > highest ? values[i] : highest;
        }
    }
    const auto nth = scratch.some.begin() + (top_k - 1);
    std::nth_element(scratch.some.begin(), nth, scratch.some.end(), std::greater<>());
    return *nth;
}

// The tokens of the highest `top_k` logits.
void keep_likeliest(Scratch& scratch, const float* logits, int64_t count, int64_t top_k) {
    const float least = reached_by(scratch, logits, count, top_k);
    scratch.some.clear();
    each_above(logits, count, least, [&](int64_t token) { scratch.some.push_back(logits[token]); });
    const auto nth = scratch.some.begin() + (top_k - 1);
    std::nth_element(scratch.some.begin(), nth, scratch.some.end(), std::greater<>());
    const float edge = *nth;
    int64_t equal =
        top_k - std::count_if(scratch.some.begin(), nth, [=](float x) { return x > edge; });
    each_above(logits, count, edge, [&](int64_t token) {
        if (logits[token] == edge && --equal < 0) return;
        scratch.tokens.push_back(static_cast<int32_t>(token));
        scratch.kept.push_back(scratch.weights[static_cast<std::size_t>(token)]);
    });
}

// The tokens whose weight is at least `least`.
void keep_above(Scratch& scratch, float least) {
    const auto count = static_cast<int64_t>(scratch.weights.size());
    each_above(scratch.weights.data(), count, least, [&](int64_t token) {
        scratch.tokens.push_back(static_cast<int32_t>(token));
        scratch.kept.push_back(scratch.weights[static_cast<std::size_t>(token)]);
    });
}

// The place at which the running sum of weights passes `random` of their total.
std::size_t pick(const std::vector<float>& weights, double total, double random) {
    const auto count = static_cast<int64_t>(weights.size());
    const double target = random * total;
    double before = 0;
    int64_t start = 0;
    // Pieces first: a running sum over a whole vocabulary takes as long as all the rest.
    for (; start + kPiece < count; start += kPiece) {
        const double after = before + sum(weights.data() + start, kPiece);
        if (after > target) break;
        before = after;
    }
    for (auto i = static_cast<std::size_t>(start); i < weights.size(); ++i) {
        before += double{weights[i]};
        if (before > target) return i;
    }
    // Sums in another order may end a hair below: the last one that could be drawn at all.
    std::size_t last = weights.size() - 1;
    while (weights[last] == 0) --last;
    return last;
}

}  // namespace

bool all_finite(const float* x, int64_t count) {
    uint32_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
        found |= (std::bit_cast<uint32_t>(x[i]) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
    }
    return found == 0;
}

int64_t draw(const Kernels& kernels, const float* logits, int64_t count, const Draw& how) {
    thread_local Scratch scratch;
    const float best = greatest(logits, count);
    if (best == -std::numeric_limits<float>::infinity()) {
        throw std::invalid_argument("logits: no token is left");
    }
    scratch.weights.resize(static_cast<std::size_t>(count));
    const double total =
        kernels.weigh(logits, count, best, how.inverse_temperature, scratch.weights.data());
    scratch.tokens.clear();
    scratch.kept.clear();

    const bool few = how.top_k > 0 && how.top_k < count;
    if (few) keep_likeliest(scratch, logits, count, how.top_k);
    if (how.top_p < 1) {
        const double mass = how.top_p * (few ? sum(scratch.kept) : total);
        if (!few) {
            // Nearly always the nucleus lies among few weights; only these are looked at.
            keep_above(scratch, kLikely);
            if (sum(scratch.kept) < mass) {
                scratch.tokens.clear();
                scratch.kept.clear();
                keep_above(scratch, 0);
            }
        }
        scratch.some = scratch.kept;
        cut(scratch, edge_of(scratch.some, mass));
    } else if (!few && how.min_p > 0) {
        keep_above(scratch, 0.999f * static_cast<float>(how.min_p));  // a few more; see below
    } else if (!few) {
        return static_cast<int64_t>(pick(scratch.weights, total, how.random));
    }
    if (how.min_p > 0) {
        std::size_t kept = 0;
        for (std::size_t i = 0; i < scratch.kept.size(); ++i) {
            if (double{scratch.kept[i]} < how.min_p) continue;
            scratch.tokens[kept] = scratch.tokens[i];
            scratch.kept[kept++] = scratch.kept[i];
        }
        scratch.tokens.resize(kept);
        scratch.kept.resize(kept);
    }
    return scratch.tokens[pick(scratch.kept, sum(scratch.kept), how.random)];
}

}  // namespace smolrun
