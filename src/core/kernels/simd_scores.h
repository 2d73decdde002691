// Scores of some rows with a block of K, and the weights that a softmax makes of them.
#pragma once

#include "kernels.h"
#include "kernels/simd_kv.h"

namespace smolrun {
namespace {

// 2^x for x <= 8, relative error below 3e-6, exact where x is whole; NaN stays. From -126 down at
// most the smallest normal float.
SMOLRUN_INLINE Floats power_of_two(Floats x) {
    const Floats r = fraction(x);
    // The polynomial of 4th degree, 1 at 0, that is nearest to 2^r for 0 <= r < 1.
    Floats sum = broadcast(0.0134266847f);
    sum = fma(sum, r, broadcast(0.0522424735f));
    sum = fma(sum, r, broadcast(0.241280205f));
    sum = fma(sum, r, broadcast(0.693044845f));
    sum = fma(sum, r, broadcast(1.0f));
    return scale_by_whole_part(sum, x);
}

// The reference of a softmax is raised where a score is above it by more than this, as a power of
// two: seldom, and no weight overflows.
constexpr float kRaiseAbove = 8.0f;

// A row is a query head of a token. A tile of rows shares each load of K and V.
struct RowTile {
    const int16_t* q;      // [head_dim/2][q_stride][2], codes, the tile's rows side by side
    int64_t q_stride;      //
    const float* q_scale;  // [rows], of the codes, times the scale of scores and log2(e)
    int16_t* codes;        // [rows][32], of probability * scale of V
    float* values;         // [rows][head_dim], weighted sums of V
    float* sum;            // [rows][kLanes], of the probabilities
    float* reference;      // [rows], about the largest score so far, as a power of two
};

// Rows of the tile from `i` on.
SMOLRUN_INLINE RowTile part_of(const RowTile& tile, int64_t i, int64_t head_dim) {
    return {tile.q + 2 * i,
            tile.q_stride,
            tile.q_scale + i,
            tile.codes + i * kBlockTokens,
            tile.values + i * head_dim,
            tile.sum + i * kLanes,
            tile.reference + i};
}

// K and V of a block.
struct Block {
    const int16_t *k, *v;
};
SMOLRUN_INLINE Block block_at(const AttentionTask& task, int64_t token) {
    const int16_t* const block =
        task.pool + int64_t{task.block_table[token / kBlockTokens]} * task.block_stride;
    return {block + task.k_offset, block + task.v_offset};
}
SMOLRUN_INLINE Floats load_scales(const int16_t* block, int64_t head_dim, int64_t token) {
    return as_floats(load_words(block + head_dim * kBlockTokens + 2 * token));
}

// Blocks lie anywhere in memory. While K is used, K of a later block is asked for from memory, and
// while V is used, V. Many rows take long enough for what comes next, too, to be asked for from the
// second-level cache; few wait for memory, and have no slot of the first level to spare for that.
template <int rows>
constexpr bool kFewRows = rows <= 4;
template <int rows>
constexpr int64_t kBlocksAhead = kFewRows<rows> ? 1 : 2;
template <int rows>
struct Ahead {
    const int16_t *next, *far;  // what comes next, and what comes later
    SMOLRUN_INLINE void ask(int64_t element, int64_t bytes) const {
        if constexpr (!kFewRows<rows>) prefetch(next + element, bytes);
        prefetch_far(far + element, bytes);
    }
};

// What a block means to each row.
template <int rows>
struct BlockRows {
    int64_t count[rows];  // tokens that the row sees, 1 to 32, not falling
    float scale[kLanes];  // [rows], of the codes
};

// Calls work.operator()<first row, count>() for each four rows, and for what is left.
template <int rows, int first = 0, class Work>
SMOLRUN_INLINE void each_four_rows(Work& work) {
    constexpr int count = rows - first < 4 ? rows - first : 4;
    work.template operator()<first, count>();
    if constexpr (first + count < rows) each_four_rows<rows, first + count>(work);
}
// reduce(a vector of each of up to four rows), each in the same order.
template <int rows, class Reduce>
SMOLRUN_INLINE __m128 reduce_rows(const Floats (&of_row)[rows], Reduce&& reduce) {
    constexpr int last = rows - 1;
    return reduce(of_row[0], of_row[1 < rows ? 1 : last], of_row[2 < rows ? 2 : last],
                  of_row[last]);
}
SMOLRUN_INLINE __m128 sum_of_each(Floats a, Floats b, Floats c, Floats d) {
    return sum_lanes(a, b, c, d);
}

// Raises the references of rows whose scores are too far above.
template <int rows, int vectors>
SMOLRUN_INLINE void raise_references(const RowTile& tile, const Floats (&scores)[rows][vectors],
                                     int64_t head_dim) {
    Floats most[rows];
    for (int row = 0; row < rows; ++row) {
        // Minus infinity is left of a NaN, which comes back in the sum.
        most[row] = broadcast(-__builtin_inff());
        for (int j = 0; j < vectors; ++j) most[row] = max(scores[row][j], most[row]);
    }
    float largest[4];
    _mm_storeu_ps(largest,
                  reduce_rows(most, [](Floats a, Floats b, Floats c, Floats d)
                                        SMOLRUN_INLINE_LAMBDA { return max_lanes(a, b, c, d); }));
    const Floats scores_of_rows = load_part(largest, rows);
    const Floats before = load_part(tile.reference, rows);
    const Floats q_scale = load_part(tile.q_scale, rows);
    // The same test as for all: that a row is raised must not depend on those beside it.
    const Floats below = fnma(scores_of_rows, q_scale, before);
    const Floats after =
        select_less(below, broadcast(-kRaiseAbove), mul(scores_of_rows, q_scale), before);
    store_part(tile.reference, after, rows);
    float keep[kLanes];
    store(keep, power_of_two(sub(before, after)));
    for (int row = 0; row < rows; ++row) {
        const Floats factor = broadcast(keep[row]);
        float* const sum = tile.sum + row * kLanes;
        float* const values = tile.values + row * head_dim;
        store(sum, mul(load(sum), factor));
        each_vector(head_dim, [&](int64_t i, int64_t lanes) SMOLRUN_INLINE_LAMBDA {
            store_up_to(values + i, mul(load_up_to(values + i, lanes), factor), lanes);
        });
    }
}

// exp(score - reference) * scale of V for up to four rows, 0 past the row's count, and what makes
// codes of it; brings reference and sum up to date. dots: of q and k. first: the first row's place
// in the block.
template <int rows, int vectors, int of>
SMOLRUN_INLINE void weigh_rows(const AttentionTask& task, const RowTile& tile,
                               const Words (*dots)[vectors], const int16_t* k, const int16_t* v,
                               int first, Floats (*weighted)[vectors], float* inverse,
                               BlockRows<of>& block) {
    const int64_t head_dim = task.head_dim;
    const bool whole = block.count[0] == kBlockTokens;
    Floats scores[rows][vectors];  // without q_scale
    for (int j = 0; j < vectors; ++j) {
        const Floats scale = load_scales(k, head_dim, j * kLanes);
        for (int row = 0; row < rows; ++row) scores[row][j] = mul(to_floats(dots[row][j]), scale);
    }
    if (!whole) {
        for (int row = 0; row < rows; ++row) {
            for (int j = 0; j < vectors; ++j) {
                scores[row][j] = select_first(scores[row][j], broadcast(-__builtin_inff()),
                                              block.count[first + row] - j * kLanes);
            }
        }
    }
    // NaN is passed over.
    Floats below = broadcast(0.0f);
    for (int row = 0; row < rows; ++row) {
        const Floats q_scale = broadcast(tile.q_scale[row]);
        const Floats reference = broadcast(tile.reference[row]);
        for (int j = 0; j < vectors; ++j) {
            below = min(fnma(scores[row][j], q_scale, reference), below);
        }
    }
    if (any_less(below, broadcast(-kRaiseAbove))) raise_references(tile, scores, head_dim);

    Floats sums[rows];
    for (int row = 0; row < rows; ++row) {
        const Floats q_scale = broadcast(tile.q_scale[row]);
        const Floats reference = broadcast(tile.reference[row]);
        Floats total = load(tile.sum + row * kLanes);
        sums[row] = broadcast(0.0f);
        for (int j = 0; j < vectors; ++j) {
            Floats p = power_of_two(fmsub(scores[row][j], q_scale, reference));
            weighted[row][j] = mul(p, load_scales(v, head_dim, j * kLanes));
            if (!whole) {
                const int64_t count = block.count[first + row] - j * kLanes;
                p = select_first(p, broadcast(0.0f), count);
                weighted[row][j] = select_first(weighted[row][j], broadcast(0.0f), count);
            }
            total = add(total, p);
            sums[row] = add(sums[row], weighted[row][j]);
        }
        store(tile.sum + row * kLanes, total);
    }
    // Codes that add up to 32767 at most, so that their products with those of V fit 32 bits.
    const __m128 of_rows = reduce_rows(sums, sum_of_each);
    _mm_storeu_ps(inverse, _mm_div_ps(_mm_set1_ps(32767.0f), of_rows));
    _mm_storeu_ps(block.scale + first, _mm_mul_ps(of_rows, _mm_set1_ps(1.0f / 32767)));
}
template <int rows, int vectors>
SMOLRUN_INLINE void store_weights(const Floats (*weighted)[vectors], const float* inverse,
                                  int16_t* codes) {
    for (int row = 0; row < rows; ++row) {
        for (int j = 0; j < vectors; ++j) {
            store_halves(codes + row * kBlockTokens + j * kLanes,
                         round_to_words(mul(weighted[row][j], broadcast(inverse[row]))));
        }
    }
}

// codes[row][32] of exp(q . k - reference) * scale of V, 0 past the row's count.
template <int rows>
SMOLRUN_INLINE void score_block(const AttentionTask& task, const RowTile& tile, const int16_t* k,
                                const int16_t* v, const Ahead<rows>& ahead,
                                BlockRows<rows>& block) {
    constexpr int vectors = static_cast<int>(kBlockTokens) / kLanes;
    Words dots[rows][vectors];
    for (auto& of_row : dots) {
        for (Words& total : of_row) total = zero_words();
    }
    const int16_t* q = tile.q;
    for (int64_t i = 0; i < task.head_dim; i += 2) {
        const int64_t at = i * kBlockTokens;
        ahead.ask(at, kBlockTokens * 4);
        Words pairs[vectors];
        for (int j = 0; j < vectors; ++j) pairs[j] = load_words(k + at + 2 * j * kLanes);
        for (int row = 0; row < rows; ++row) {
            const Words query = broadcast_pair(q + 2 * row);
            for (int j = 0; j < vectors; ++j) dots[row][j] = dot(dots[row][j], pairs[j], query);
        }
        q += 2 * tile.q_stride;
    }
    // The codes of four rows wait for a sum; meanwhile the next four are weighed.
    Floats weighted[rows][vectors];
    float inverse[kLanes];
    const auto store_four = [&]<int first, int count>() SMOLRUN_INLINE_LAMBDA {
        store_weights<count, vectors>(weighted + first, inverse + first,
                                      tile.codes + first * kBlockTokens);
    };
    const auto weigh = [&]<int first, int count>() SMOLRUN_INLINE_LAMBDA {
        weigh_rows<count, vectors>(task, part_of(tile, first, task.head_dim), dots + first, k, v,
                                   first, weighted + first, inverse + first, block);
        if constexpr (first > 0) store_four.template operator()<first - 4, 4>();
        if constexpr (first + count == rows) store_four.template operator()<first, count>();
    };
    each_four_rows<rows>(weigh);
}

}  // namespace
}  // namespace smolrun
