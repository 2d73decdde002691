// Attention of some tokens over their KV blocks.
#pragma once

#include "kernels.h"
#include "kernels/simd_kv.h"

namespace smolrun {
namespace {

// 2^x for x <= 0, relative error below 4e-6; from -126 down the smallest normal float. NaN stays.
SMOLRUN_INLINE Floats power_of_two(Floats x) {
    x = max(broadcast(-126.0f), x);
    const Words whole = round_to_words(x);
    const Floats r = sub(x, to_floats(whole));
    // The polynomial of 4th degree, 1 at 0, that is nearest to 2^r for |r| <= 0.5.
    Floats sum = broadcast(0.00958283639f);
    sum = fma(sum, r, broadcast(0.0559064134f));
    sum = fma(sum, r, broadcast(0.240240988f));
    sum = fma(sum, r, broadcast(0.693124195f));
    sum = fma(sum, r, broadcast(1.0f));
    return as_floats(add(bits_of(sum), shift_right<-23>(whole)));
}

// A row is a query head of a token. A tile of rows shares each load of K and V.
struct RowTile {
    const int16_t* q;      // [head_dim/2][q_stride][2], codes, the tile's rows side by side
    int64_t q_stride;      //
    const float* q_scale;  // [rows], of the codes, times the scale of scores and log2(e)
    float* weighted;       // [rows][32], probability * scale of V
    int16_t* codes;        // [rows][32], of those
    float* values;         // [rows][head_dim], weighted sums of V
    float* sum;            // [rows][kLanes], of the probabilities
    float* maximum;        // [rows], largest score so far, without q_scale
};

// Rows of the tile from `i` on.
SMOLRUN_INLINE RowTile part_of(const RowTile& tile, int64_t i, int64_t head_dim) {
    return {tile.q + 2 * i,
            tile.q_stride,
            tile.q_scale + i,
            tile.weighted + i * kBlockTokens,
            tile.codes + i * kBlockTokens,
            tile.values + i * head_dim,
            tile.sum + i * kLanes,
            tile.maximum + i};
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

// Blocks lie anywhere in memory. While K is used, V of the block is asked for from the second-level
// cache, and K two blocks ahead from memory; while V is used, K of the next block and V two ahead.
struct Ahead {
    const int16_t *next, *far;  // what comes next, and what comes later
    SMOLRUN_INLINE void ask(int64_t element, int64_t bytes) const {
        prefetch(next + element, bytes);
        prefetch_far(far + element, bytes);
    }
};

// What a block means to each row.
template <int rows>
struct BlockRows {
    int64_t count[rows];  // tokens that the row sees, 1 to 32, not falling
    float keep[kLanes];   // [rows], factor of what was there before
    float scale[kLanes];  // [rows], of the codes of the probabilities
    bool all_kept;        // every factor is 1
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

// codes[row][32] of exp(q . k - largest so far) * scale of V, 0 past the row's count; brings
// maximum and sum up to date.
template <int rows>
SMOLRUN_INLINE void score_block(const AttentionTask& task, const RowTile& tile, const int16_t* k,
                                const int16_t* v, const Ahead& ahead, BlockRows<rows>& block) {
    static_assert(rows <= kLanes);
    constexpr int vectors = static_cast<int>(kBlockTokens) / kLanes;
    const int64_t head_dim = task.head_dim;
    Words dots[rows][vectors];
    for (auto& of_row : dots) {
        for (Words& total : of_row) total = zero_words();
    }
    const int16_t* q = tile.q;
    for (int64_t i = 0; i < head_dim; i += 2) {
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
    Floats scores[rows][vectors];
    for (int j = 0; j < vectors; ++j) {
        const Floats scale = load_scales(k, head_dim, j * kLanes);
        for (int row = 0; row < rows; ++row) scores[row][j] = mul(to_floats(dots[row][j]), scale);
    }
    const bool whole = block.count[0] == kBlockTokens;
    const Floats none = broadcast(-__builtin_inff());
    if (!whole) {
        for (int row = 0; row < rows; ++row) {
            for (int j = 0; j < vectors; ++j) {
                scores[row][j] = select_first(scores[row][j], none, block.count[row] - j * kLanes);
            }
        }
    }
    float maximum[kLanes] = {};
    reduce_rows<rows>(
        [&](int row) SMOLRUN_INLINE_LAMBDA {
            // `none` is what is left of a NaN, which comes back in the sum.
            Floats largest = none;
            for (int j = 0; j < vectors; ++j) largest = max(scores[row][j], largest);
            return largest;
        },
        [](Floats a, Floats b, Floats c, Floats d)
            SMOLRUN_INLINE_LAMBDA { return max_lanes(a, b, c, d); },
        maximum);
    const Floats before = load_part(tile.maximum, rows);
    const Floats after = max(before, load(maximum));
    const Floats q_scale = load_part(tile.q_scale, rows);
    const Floats keep = power_of_two(mul(sub(before, after), q_scale));
    block.all_kept = all_equal(before, after);
    store_part(tile.maximum, after, rows);
    store(maximum, after);
    store(block.keep, keep);

    Floats weighted_sums[rows];
#pragma GCC unroll 12
    for (int row = 0; row < rows; ++row) {
        Floats total = mul(load(tile.sum + row * kLanes), broadcast(block.keep[row]));
        weighted_sums[row] = broadcast(0.0f);
        for (int j = 0; j < vectors; ++j) {
            Floats p = power_of_two(
                mul(sub(scores[row][j], broadcast(maximum[row])), broadcast(tile.q_scale[row])));
            Floats weighted = mul(p, load_scales(v, head_dim, j * kLanes));
            if (!whole) {
                const int64_t count = block.count[row] - j * kLanes;
                p = select_first(p, broadcast(0.0f), count);
                weighted = select_first(weighted, broadcast(0.0f), count);
            }
            store(tile.weighted + row * kBlockTokens + j * kLanes, weighted);
            weighted_sums[row] = add(weighted_sums[row], weighted);
            total = add(total, p);
        }
        store(tile.sum + row * kLanes, total);
    }
    float sums[kLanes] = {};
    reduce_rows<rows>([&](int row) SMOLRUN_INLINE_LAMBDA { return weighted_sums[row]; },
                      [](Floats a, Floats b, Floats c, Floats d)
                          SMOLRUN_INLINE_LAMBDA { return sum_lanes(a, b, c, d); },
                      sums);
    // Codes that add up to 32767 at most, so that their products with those of V fit 32 bits.
    store(block.scale, mul(load(sums), broadcast(1.0f / 32767)));
    store(sums, div(broadcast(32767.0f), load(sums)));
    for (int row = 0; row < rows; ++row) {
        const Floats inverse = broadcast(sums[row]);
        for (int j = 0; j < vectors; ++j) {
            const int64_t at = row * kBlockTokens + j * kLanes;
            store_halves(tile.codes + at, round_to_words(mul(load(tile.weighted + at), inverse)));
        }
    }
}

// values[row][first..] = what was there * keep + sum of probability * v over the row's tokens, for
// `vectors` vectors, the last of them `last` lanes long. `begin`: the tile's first row in the
// block's.
template <int rows, int vectors, int of>
SMOLRUN_INLINE void add_values(const AttentionTask& task, const RowTile& tile, const int16_t* v,
                               const Ahead& ahead, int64_t first, int64_t last, int begin,
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
        const Floats keep = broadcast(block.keep[begin + row]);
        for (int i = 0; i < vectors; ++i) {
            Floats before = load_up_to(values + i * kLanes, lanes(i));
            if (!block.all_kept) before = mul(before, keep);
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
                                       const int16_t* v, const Ahead& ahead, int row,
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
    for (int i = 0; i < rows; ++i) {
        const int64_t length = task.length + (row + i) / task.group;
        rows_of_block.count[i] = smaller(kBlockTokens, length - begin);
    }
    const Block block = block_at(task, begin);
    const Block next = block_at(task, smaller(begin + kBlockTokens, task.length - 1));
    const Block far = block_at(task, smaller(begin + 2 * kBlockTokens, task.length - 1));
    const Ahead with_k{block.v, far.k}, with_v{next.k, far.v};
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
            each_code(q, head_dim, with, [&](int64_t i, int16_t code) {
                tile[(i / 2 * count + row) * 2 + i % 2] = code;
            });
            // Not 0, which would not make 2^-infinity of the start of a softmax.
            const float of_scores = with.scale * scale;
            prepared.q_scale[first + row] = of_scores < 0x1p-126f ? 0x1p-126f : of_scores;
        }
    });
    return prepared;
}

RowTile place_tile(const Rows& prepared, int64_t first, int64_t rows, int64_t head_dim) {
    float* const weighted = prepared.scratch;
    float* const codes = weighted + rows * kBlockTokens;
    float* const sum = codes + rows * kBlockTokens / 2;
    float* const maximum = sum + rows * kLanes;
    float* const values = maximum + kLanes;
    return {prepared.q + first * head_dim,
            rows,
            prepared.q_scale + first,
            weighted,
            reinterpret_cast<int16_t*>(codes),
            values,
            sum,
            maximum};
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
        tile.maximum[i] = -__builtin_inff();
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
    // Ready to be merged: the largest score as a power of two, the sum of the probabilities.
    store_part(tile.maximum, mul(load_part(tile.maximum, rows), load_part(tile.q_scale, rows)),
               rows);
    float sums[kLanes];
    reduce_rows<rows>([&](int i) SMOLRUN_INLINE_LAMBDA { return load(tile.sum + i * kLanes); },
                      [](Floats a, Floats b, Floats c, Floats d)
                          SMOLRUN_INLINE_LAMBDA { return sum_lanes(a, b, c, d); },
                      sums);
    for (int i = 0; i < rows; ++i) tile.sum[i] = sums[i];
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
                merge_rows<some>(tile.values + (at - row) * head_dim, tile.maximum + (at - row),
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
