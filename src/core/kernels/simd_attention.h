// Attention of some tokens over their KV blocks.
#pragma once

#include "kernels.h"
#include "kernels/simd_scores.h"

namespace smolrun {
namespace {

// values[row][first..] += sum of probability * v over the row's tokens, for
// `vectors` vectors, the last of them `last` lanes long. `begin`: the tile's first row in the
// block's.
template <int rows, int vectors, int of>
SMOLRUN_INLINE void add_values(const AttentionTask& task, const RowTile& tile, const int16_t* v,
                               const Ahead<of>& ahead, int64_t first, int64_t last, int begin,
                               const BlockRows<of>& block) {
    const auto lanes = [&](int i) { return i == vectors - 1 ? last : int64_t{kLanes}; };
    Words totals[rows][vectors];
    for (auto& of_row : totals) {
        for (Words& total : of_row) total = zero_words();
    }
    // The last pair may hold a token that nobody sees: its code is 0.
    const int16_t* codes = tile.codes;
    for (int64_t token = 0; token < block.count[begin + rows - 1]; token += 2) {
        const int64_t at = token * task.head_dim + 2 * first;
        ahead.ask(at, vectors * kLanes * 4);
        Words pairs[vectors];
        for (int i = 0; i < vectors; ++i) {
            pairs[i] = load_words_up_to(v + at + 2 * i * kLanes, lanes(i));
        }
        for (int row = 0; row < rows; ++row) {
            const Words p = broadcast_pair(codes + row * kBlockTokens);
            for (int i = 0; i < vectors; ++i) totals[row][i] = dot(totals[row][i], pairs[i], p);
        }
        codes += 2;
    }
    for (int row = 0; row < rows; ++row) {
        float* const values = tile.values + row * task.head_dim + first;
        const Floats scale = broadcast(block.scale[begin + row]);
        for (int i = 0; i < vectors; ++i) {
            const Floats before = load_up_to(values + i * kLanes, lanes(i));
            store_up_to(values + i * kLanes, fma(to_floats(totals[row][i]), scale, before),
                        lanes(i));
        }
    }
}

// As many rows as leave totals for the most vectors of V.
template <int rows>
constexpr int kValueRows = rows == 12 ? 6 : rows;

// values of the rows from `row` of the block on, all channels.
template <int rows>
SMOLRUN_INLINE void add_values_of_rows(const AttentionTask& task, const RowTile& tile,
                                       const int16_t* v, const Ahead<rows>& ahead, int row,
                                       const BlockRows<rows>& block) {
    constexpr int together = kValueRows<rows>;
    constexpr int fitting = kAttentionTotals / together;
    constexpr int vectors = fitting < 4 ? fitting : 4;
    int64_t i = 0;
    for (; i + vectors * kLanes <= task.head_dim; i += vectors * kLanes) {
        add_values<together, vectors>(task, tile, v, ahead, i, kLanes, row, block);
    }
    for (; i < task.head_dim; i += kLanes) {
        add_values<together, 1>(task, tile, v, ahead, i, smaller(kLanes, task.head_dim - i), row,
                                block);
    }
}

// One block, for some rows. `row`: the first of them in the task.
template <int rows>
void attend_block(const AttentionTask& task, const RowTile& tile, int64_t row, int64_t begin) {
    BlockRows<rows> rows_of_block;
    const bool whole = task.length - begin >= kBlockTokens;
    for (int i = 0; i < rows; ++i) {
        // Divisions take as long as a row's products, so only where they are needed.
        const int64_t length = whole ? kBlockTokens : task.length - begin + (row + i) / task.group;
        rows_of_block.count[i] = smaller(kBlockTokens, length);
    }
    const Block block = block_at(task, begin);
    const Block next = block_at(task, smaller(begin + kBlockTokens, task.length - 1));
    const Block far =
        block_at(task, smaller(begin + kBlocksAhead<rows> * kBlockTokens, task.length - 1));
    const Ahead<rows> with_k{block.v, far.k}, with_v{next.k, far.v};
    with_k.ask(task.head_dim * kBlockTokens, kBlockTokens * 4);  // the scales
    with_v.ask(task.head_dim * kBlockTokens, kBlockTokens * 4);
    score_block<rows>(task, tile, block.k, block.v, with_k, rows_of_block);
    for (int i = 0; i < rows; i += kValueRows<rows>) {
        add_values_of_rows<rows>(task, part_of(tile, i, task.head_dim), block.v, with_v, i,
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

// The rows of a task, ready to be multiplied, and scratch of a tile.
struct Rows {
    int16_t* q;      // [tiles] of [head_dim/2][rows of the tile][2]
    float* q_scale;  // [rows]
    float* scratch;  // of a tile
};

constexpr int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

// Rounds the rows of a task; tiles stand where each_row_tile has them.
Rows prepare_rows(const AttentionTask& task, float* scratch) {
    const int64_t rows = task.tokens * task.group, head_dim = task.head_dim;
    const Rows prepared{reinterpret_cast<int16_t*>(scratch), scratch + padded(rows * head_dim / 2),
                        scratch + padded(rows * head_dim / 2) + padded(rows)};
    const float scale = task.scale * 1.44269504088896341f;
    each_row_tile(0, rows, [&]<int count>(int64_t first) {
        int16_t* const tile = prepared.q + first * head_dim;
        for (int row = 0; row < count; ++row) {
            const float* const q = task.q + (first + row) / task.group * task.stride +
                                   (first + row) % task.group * head_dim;
            const Rounding with = rounding_for_dot(q, head_dim);
            store_rounded<2>(q, head_dim, with, tile + 2 * row, 2 * count);
            // Not 0, which would not make 2^-infinity of the start of a softmax.
            const float of_scores = with.scale * scale;
            prepared.q_scale[first + row] = of_scores < 0x1p-126f ? 0x1p-126f : of_scores;
        }
    });
    return prepared;
}

RowTile place_tile(const Rows& prepared, int64_t first, int64_t rows, int64_t head_dim) {
    float* const codes = prepared.scratch;
    float* const sum = codes + rows * kBlockTokens / 2;
    float* const reference = sum + rows * kLanes;
    float* const values = reference + kLanes;
    return {prepared.q + first * head_dim,
            rows,
            prepared.q_scale + first,
            reinterpret_cast<int16_t*>(codes),
            values,
            sum,
            reference};
}

// The first row that sees the token at `position`.
SMOLRUN_INLINE int64_t first_row_at(const AttentionTask& task, int64_t position) {
    const int64_t unseen = position - task.length + 1;
    return unseen > 0 ? unseen * task.group : 0;
}

// A segment for `rows` rows from `row` on, one of which at least sees a token of it.
template <int rows>
RowTile attend_rows(const AttentionTask& task, const Rows& prepared, int64_t row, int64_t segment) {
    const int64_t head_dim = task.head_dim;
    const RowTile tile = place_tile(prepared, row, rows, head_dim);
    for (int i = 0; i < rows; ++i) {
        // Of the first block nothing was before: what is kept is kept of 0.
        tile.reference[i] = -__builtin_inff();
        store(tile.sum + i * kLanes, broadcast(0.0f));
    }
    for (int64_t i = 0; i < rows * head_dim; ++i) tile.values[i] = 0;
    const Block start = block_at(task, segment * kSegmentTokens);
    prefetch_far(start.k, (head_dim + 2) * kBlockTokens * 2);
    prefetch_far(start.v, (head_dim + 2) * kBlockTokens * 2);

    const int64_t last_length = task.length + (row + rows - 1) / task.group;
    const int64_t end = smaller((segment + 1) * kSegmentTokens, last_length);
    for (int64_t begin = segment * kSegmentTokens; begin < end; begin += kBlockTokens) {
        const int64_t first = first_row_at(task, begin);
        if (first <= row) {
            attend_block<rows>(task, tile, row, begin);
            continue;
        }
        // The tile's first tokens do not reach this block any more.
        each_row_tile<rows>(first, row + rows, [&]<int count>(int64_t at) {
            attend_block<count>(task, part_of(tile, at - row, head_dim), at, begin);
        });
    }
    float* const sum = tile.sum;
    const auto add_up = [&]<int first, int count>() SMOLRUN_INLINE_LAMBDA {
        Floats of_row[count];
        for (int i = 0; i < count; ++i) of_row[i] = load(sum + (first + i) * kLanes);
        // Only sums that are added up already lie where these go.
        const __m128 sums = reduce_rows(of_row, sum_of_each);
        float four[4];
        _mm_storeu_ps(four, sums);
        for (int i = 0; i < count; ++i) sum[first + i] = four[i];
    };
    each_four_rows<rows>(add_up);
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
    const Floats keep = power_of_two(sub(before, after));
    const Floats take = power_of_two(sub(of_segment, after));
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
    const Softmax softmax{task.scratch, task.scratch + padded(rows)};
    const Rows prepared = prepare_rows(task, task.scratch + 2 * padded(rows));
    const auto out = [&](int64_t row) {
        return task.out + row / task.group * task.stride + row % task.group * head_dim;
    };
    for (int64_t row = 0; row < rows; ++row) start_row(head_dim, softmax, row, out(row));
    const int64_t longest = task.length + task.tokens - 1;
    // Segment by segment, so that its K and V stay in the cache while the rows pass.
    for (int64_t segment = 0; segment * kSegmentTokens < longest; ++segment) {
        const int64_t first = first_row_at(task, segment * kSegmentTokens);
        each_row_tile(0, rows, [&]<int count>(int64_t row) {
            if (first >= row + count) return;
            const RowTile tile = attend_rows<count>(task, prepared, row, segment);
            each_row_tile<count>(first > row ? first : row, row + count, [&]<int some>(int64_t at) {
                merge_rows<some>(tile.values + (at - row) * head_dim, tile.reference + (at - row),
                                 tile.sum + (at - row), head_dim,
                                 {softmax.maximum + at, softmax.sum + at},
                                 [&](int64_t i) { return out(at + i); });
            });
        });
    }
    for (int64_t row = 0; row < rows; ++row) finish_row(head_dim, softmax.sum[row], out(row));
}

void attend_segment(const AttentionTask& task, int64_t segment, float* partial) {
    const int64_t head_dim = task.head_dim;
    const Rows prepared = prepare_rows(task, task.scratch);
    each_row_tile(0, task.group, [&]<int count>(int64_t row) {
        const RowTile tile = attend_rows<count>(task, prepared, row, segment);
        for (int i = 0; i < count; ++i) {
            float* const to = partial + (row + i) * (head_dim + kPartialExtra);
            for (int64_t j = 0; j < head_dim; ++j) to[j] = tile.values[i * head_dim + j];
            to[head_dim] = tile.reference[i];
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
