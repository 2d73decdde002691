// Attention of some tokens over their KV blocks, and the storing of K and V.
#pragma once

#include "kernels.h"
#include "kernels/simd_common.h"

namespace smolrun {
namespace {

void store_kv(const float* k, const float* v, int64_t head_dim, int64_t slot, uint16_t* k_block,
              uint16_t* v_block) {
    each_vector(head_dim, [&](int64_t i, int64_t count) {
        uint16_t halves[kLanes];
        store_f16(halves, load_up_to(k + i, count));
        for (int64_t j = 0; j < count; ++j) k_block[(i + j) * kBlockTokens + slot] = halves[j];
        store_f16(halves, load_up_to(v + i, count));
        for (int64_t j = 0; j < count; ++j) v_block[slot * head_dim + i + j] = halves[j];
    });
}

// A row is a query head of a token. A tile of rows shares each load of K and V.
struct RowTile {
    const float* q;        // [head_dim][q_stride], the tile's rows side by side, scaled
    int64_t q_stride;      //
    float* probabilities;  // [rows][32]
    float* values;         // [rows][head_dim], weighted sums of V
    float* maximum;        // [rows], largest score so far
    float* sum;            // [rows], of the weights
};

// K and V of a block.
struct Block {
    const uint16_t *k, *v;
};
SMOLRUN_INLINE Block block_at(const AttentionTask& task, int64_t token) {
    const uint16_t* const block =
        task.pool + int64_t{task.block_table[token / kBlockTokens]} * task.block_stride;
    return {block + task.k_offset, block + task.v_offset};
}

// What a block means to each row.
template <int rows>
struct BlockRows {
    int64_t count[rows];  // tokens that the row sees, 1 to 32, not falling
    float keep[kLanes];   // [rows], factor of what was there before
};

// results[row] = reduce(vector of the row): four rows at once, each in the same order.
template <int rows, class Vector, class Reduce>
SMOLRUN_INLINE void reduce_rows(Vector&& vector, Reduce&& reduce, float* results) {
    for (int row = 0; row < rows; row += 4) {
        const auto at = [&](int i) { return row + i < rows ? row + i : rows - 1; };
        float four[4];
        _mm_storeu_ps(four, reduce(vector(row), vector(at(1)), vector(at(2)), vector(at(3))));
        for (int i = 0; i < 4 && row + i < rows; ++i) results[row + i] = four[i];
    }
}

// probabilities[row][32] = exp(q . k - largest so far), 0 past the row's count; brings maximum and
// sum up to date.
template <int rows>
SMOLRUN_INLINE void score_block(const AttentionTask& task, const RowTile& tile, const uint16_t* k,
                                const uint16_t* next_k, BlockRows<rows>& block) {
    static_assert(rows <= kLanes);
    constexpr int vectors = static_cast<int>(kBlockTokens) / kLanes;
    Floats scores[rows][vectors];
    for (auto& of_row : scores) {
        for (Floats& score : of_row) score = broadcast(0.0f);
    }
    const float* q = tile.q;
    for (int64_t i = 0; i < task.head_dim; ++i) {
        prefetch(next_k, kBlockTokens * 2);
        Floats keys[vectors];
        for (int v = 0; v < vectors; ++v) keys[v] = load_f16(k + v * kLanes);
        for (int row = 0; row < rows; ++row) {
            const Floats query = broadcast(q[row]);
            for (int v = 0; v < vectors; ++v) scores[row][v] = fma(query, keys[v], scores[row][v]);
        }
        k += kBlockTokens;
        next_k += kBlockTokens;
        q += tile.q_stride;
    }
    const bool whole = block.count[0] == kBlockTokens;
    const Floats none = broadcast(-__builtin_inff());
    if (!whole) {
        for (int row = 0; row < rows; ++row) {
            for (int v = 0; v < vectors; ++v) {
                scores[row][v] = select_first(scores[row][v], none, block.count[row] - v * kLanes);
            }
        }
    }
    float maximum[kLanes] = {};
    reduce_rows<rows>(
        [&](int row) SMOLRUN_INLINE_LAMBDA {
            // `none` is what is left of a NaN, which comes back in the sum.
            Floats largest = none;
            for (int v = 0; v < vectors; ++v) largest = max(scores[row][v], largest);
            return largest;
        },
        [](Floats a, Floats b, Floats c, Floats d)
            SMOLRUN_INLINE_LAMBDA { return max_lanes(a, b, c, d); },
        maximum);
    const Floats before = load_part(tile.maximum, rows);
    const Floats after = max(before, load(maximum));
    const Floats keep = exponential(sub(before, after));
    store_part(tile.maximum, after, rows);
    store(maximum, after);
    store(block.keep, keep);

    Floats totals[rows];
#pragma GCC unroll 12
    for (int row = 0; row < rows; ++row) {
        totals[row] = broadcast(0.0f);
        for (int v = 0; v < vectors; ++v) {
            Floats p = exponential(sub(scores[row][v], broadcast(maximum[row])));
            if (!whole) p = select_first(p, broadcast(0.0f), block.count[row] - v * kLanes);
            store(tile.probabilities + row * kBlockTokens + v * kLanes, p);
            totals[row] = add(totals[row], p);
        }
    }
    float sums[kLanes] = {};
    reduce_rows<rows>([&](int row) SMOLRUN_INLINE_LAMBDA { return totals[row]; },
                      [](Floats a, Floats b, Floats c, Floats d)
                          SMOLRUN_INLINE_LAMBDA { return sum_lanes(a, b, c, d); },
                      sums);
    store_part(tile.sum, fma(load_part(tile.sum, rows), keep, load(sums)), rows);
}

// values[row][first..] = what was there * keep + sum of probability * v over the row's tokens, for
// `vectors` vectors, the last of them `last` lanes long.
template <int rows, int vectors>
SMOLRUN_INLINE void add_values(const AttentionTask& task, const RowTile& tile, const uint16_t* v,
                               const uint16_t* next_v, int64_t first, int64_t last,
                               const BlockRows<rows>& block) {
    const auto lanes = [&](int i) { return i == vectors - 1 ? last : int64_t{kLanes}; };
    const auto load_values = [&](Floats* values, int64_t token) SMOLRUN_INLINE_LAMBDA {
        const uint16_t* const from = v + token * task.head_dim + first;
        for (int i = 0; i < vectors; ++i) values[i] = load_f16_up_to(from + i * kLanes, lanes(i));
    };
    Floats totals[rows][vectors];
    for (int row = 0; row < rows; ++row) {
        const float* const from = tile.values + row * task.head_dim + first;
        const Floats keep = broadcast(block.keep[row]);
        for (int i = 0; i < vectors; ++i) {
            totals[row][i] = mul(load_up_to(from + i * kLanes, lanes(i)), keep);
        }
    }
    for (int64_t token = 0; token < block.count[0]; ++token) {
        prefetch(next_v + token * task.head_dim + first, vectors * kLanes * 2);
        Floats values[vectors];
        load_values(values, token);
        for (int row = 0; row < rows; ++row) {
            const Floats p = broadcast(tile.probabilities[row * kBlockTokens + token]);
            for (int i = 0; i < vectors; ++i) totals[row][i] = fma(p, values[i], totals[row][i]);
        }
    }
    for (int row = 0; row < rows; ++row) {
        for (int64_t token = block.count[0]; token < block.count[row]; ++token) {
            Floats values[vectors];
            load_values(values, token);
            const Floats p = broadcast(tile.probabilities[row * kBlockTokens + token]);
            for (int i = 0; i < vectors; ++i) totals[row][i] = fma(p, values[i], totals[row][i]);
        }
        float* const to = tile.values + row * task.head_dim + first;
        for (int i = 0; i < vectors; ++i) store_up_to(to + i * kLanes, totals[row][i], lanes(i));
    }
}

// One block, for some rows. `row`: the first of them in the task.
template <int rows>
void attend_block(const AttentionTask& task, const RowTile& tile, int64_t row, int64_t begin) {
    BlockRows<rows> rows_of_block;
    for (int i = 0; i < rows; ++i) {
        const int64_t length = task.length + (row + i) / task.group;
        rows_of_block.count[i] = smaller(kBlockTokens, length - begin);
    }
    const Block block = block_at(task, begin);
    // Blocks lie anywhere in memory: the next one is asked for while this one is used.
    const Block next = block_at(task, smaller(begin + kBlockTokens, task.length - 1));
    score_block<rows>(task, tile, block.k, next.k, rows_of_block);
    constexpr int fitting = kAttentionTotals / rows;
    constexpr int vectors = fitting < 4 ? fitting : 4;
    int64_t i = 0;
    for (; i + vectors * kLanes <= task.head_dim; i += vectors * kLanes) {
        add_values<rows, vectors>(task, tile, block.v, next.v, i, kLanes, rows_of_block);
    }
    for (; i < task.head_dim; i += kLanes) {
        add_values<rows, 1>(task, tile, block.v, next.v, i, smaller(kLanes, task.head_dim - i),
                            rows_of_block);
    }
}

// Calls work.operator()<rows>(first row) for tiles that cover [row, end): the largest first.
template <int rows = kTileRowsOfAttention, class Work>
SMOLRUN_INLINE void each_row_tile(int64_t row, int64_t end, Work&& work) {
    for (; row + rows <= end; row += rows) work.template operator()<rows>(row);
    constexpr int next = rows == 12 ? 6 : rows == 6 ? 4 : rows - 1;
    if constexpr (next > 0) each_row_tile<next>(row, end, work);
}

// Scratch of a tile: attend_rows takes it from here on.
RowTile place_tile(int64_t rows, int64_t head_dim, float* scratch) {
    float* const values = scratch + rows * head_dim;
    float* const maximum = values + rows * head_dim;
    return {scratch, rows, maximum + 2 * rows, values, maximum, maximum + rows};
}

// A segment for `rows` rows, each of which sees at least one token of it.
template <int rows>
RowTile attend_rows(const AttentionTask& task, int64_t row, int64_t segment, float* scratch) {
    const int64_t head_dim = task.head_dim;
    const RowTile tile = place_tile(rows, head_dim, scratch);
    for (int i = 0; i < rows; ++i) {
        const float* const from =
            task.q + (row + i) / task.group * task.stride + (row + i) % task.group * head_dim;
        for (int64_t j = 0; j < head_dim; ++j) scratch[j * rows + i] = from[j] * task.scale;
        // Of the first block nothing was before: exp(-infinity - maximum) keeps 0 of it.
        tile.maximum[i] = -__builtin_inff();
        tile.sum[i] = 0;
    }
    for (int64_t i = 0; i < rows * head_dim; ++i) tile.values[i] = 0;

    const int64_t first_length = task.length + row / task.group;
    const int64_t last_length = task.length + (row + rows - 1) / task.group;
    const int64_t end = smaller((segment + 1) * kSegmentTokens, last_length);
    for (int64_t begin = segment * kSegmentTokens; begin < end; begin += kBlockTokens) {
        if (begin < first_length) {
            attend_block<rows>(task, tile, row, begin);
            continue;
        }
        // The tile's first tokens do not reach this block any more.
        const int64_t first = (begin - task.length + 1) * task.group;
        each_row_tile<rows>(first, row + rows, [&]<int count>(int64_t at) {
            const int64_t i = at - row;
            const RowTile part{tile.q + i,
                               rows,
                               tile.probabilities + i * kBlockTokens,
                               tile.values + i * head_dim,
                               tile.maximum + i,
                               tile.sum + i};
            attend_block<count>(task, part, at, begin);
        });
    }
    return tile;
}

// Where some rows stand after the segments so far.
struct Softmax {
    float* maximum;  // [rows]
    float* sum;      // [rows]
};

SMOLRUN_INLINE void start_row(int64_t head_dim, const Softmax& softmax, int64_t row, float* out) {
    softmax.maximum[row] = -__builtin_inff();
    softmax.sum[row] = 0;
    for (int64_t i = 0; i < head_dim; ++i) out[i] = 0;
}

// Merges a segment: values[rows][head_dim], maximum and sum [rows]. out(i): row i's [head_dim].
template <int rows, class Out>
SMOLRUN_INLINE void merge_rows(const float* values, const float* maximum, const float* sum,
                               int64_t head_dim, const Softmax& softmax, Out&& out) {
    const Floats before = load_part(softmax.maximum, rows), of_segment = load_part(maximum, rows);
    const Floats after = max(before, of_segment);
    const Floats keep = exponential(sub(before, after));
    const Floats take = exponential(sub(of_segment, after));
    const Floats taken = mul(load_part(sum, rows), take);
    store_part(softmax.maximum, after, rows);
    store_part(softmax.sum, fma(load_part(softmax.sum, rows), keep, taken), rows);
    float keeps[kLanes], takes[kLanes];
    store(keeps, keep);
    store(takes, take);
    for (int row = 0; row < rows; ++row) {
        const float* const from = values + row * head_dim;
        float* const to = out(row);
        each_vector(head_dim, [&](int64_t i, int64_t lanes) SMOLRUN_INLINE_LAMBDA {
            const Floats kept = mul(load_up_to(to + i, lanes), broadcast(keeps[row]));
            store_up_to(to + i, fma(load_up_to(from + i, lanes), broadcast(takes[row]), kept),
                        lanes);
        });
    }
}

SMOLRUN_INLINE void finish_row(int64_t head_dim, float sum, float* out) {
    each_vector(head_dim, [&](int64_t i, int64_t lanes) SMOLRUN_INLINE_LAMBDA {
        store_up_to(out + i, div(load_up_to(out + i, lanes), broadcast(sum)), lanes);
    });
}

void attention(const AttentionTask& task) {
    const int64_t rows = task.tokens * task.group, head_dim = task.head_dim;
    const Softmax softmax{task.scratch, task.scratch + rows};
    float* const scratch = task.scratch + 2 * rows;
    const auto out = [&](int64_t row) {
        return task.out + row / task.group * task.stride + row % task.group * head_dim;
    };
    for (int64_t row = 0; row < rows; ++row) start_row(head_dim, softmax, row, out(row));
    const int64_t longest = task.length + task.tokens - 1;
    // Segment by segment, so that its K and V stay in the cache while the rows pass.
    for (int64_t segment = 0; segment * kSegmentTokens < longest; ++segment) {
        const int64_t unseen = segment * kSegmentTokens - task.length + 1;
        const int64_t first = unseen > 0 ? unseen * task.group : 0;
        each_row_tile(first, rows, [&]<int count>(int64_t row) {
            const RowTile tile = attend_rows<count>(task, row, segment, scratch);
            merge_rows<count>(tile.values, tile.maximum, tile.sum, head_dim,
                              {softmax.maximum + row, softmax.sum + row},
                              [&](int64_t i) { return out(row + i); });
        });
    }
    for (int64_t row = 0; row < rows; ++row) finish_row(head_dim, softmax.sum[row], out(row));
}

void attend_segment(const AttentionTask& task, int64_t segment, float* partial) {
    const int64_t head_dim = task.head_dim;
    each_row_tile(0, task.group, [&]<int count>(int64_t row) {
        const RowTile tile = attend_rows<count>(task, row, segment, task.scratch);
        for (int i = 0; i < count; ++i) {
            float* const to = partial + (row + i) * (head_dim + kPartialExtra);
            for (int64_t j = 0; j < head_dim; ++j) to[j] = tile.values[i * head_dim + j];
            to[head_dim] = tile.maximum[i];
            to[head_dim + 1] = tile.sum[i];
        }
    });
}

void merge_segments(const float* partial, int64_t segments, int64_t stride, int64_t head_dim,
                    float* out) {
    float maximum, sum;
    const Softmax softmax{&maximum, &sum};
    start_row(head_dim, softmax, 0, out);
    for (int64_t i = 0; i < segments; ++i, partial += stride) {
        merge_rows<1>(partial, partial + head_dim, partial + head_dim + 1, head_dim, softmax,
                      [&](int64_t) { return out; });
    }
    finish_row(head_dim, sum, out);
}

}  // namespace
}  // namespace smolrun
