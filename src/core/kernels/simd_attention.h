// Attention of one token over its KV blocks, and the storing of K and V.
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

// Where the softmax of some heads stands after the blocks so far.
template <int heads>
struct Softmax {
    float maximum[heads];
    float sum[heads];
    // Factors of the block that was just merged: of what was there, and of what comes.
    float keep[heads], take[heads];
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

// probabilities[head][32] = exp(q . k * scale - maximum of the block), 0 past `count`; merges
// maximum and sum.
template <int heads>
SMOLRUN_INLINE void score_block(const AttentionTask& task, const float* q, const uint16_t* k,
                                const uint16_t* next_k, int64_t count, float* probabilities,
                                Softmax<heads>& softmax) {
    constexpr int vectors = static_cast<int>(kBlockTokens) / kLanes;
    Floats scores[heads][vectors];
    for (auto& of_head : scores) {
        for (Floats& score : of_head) score = broadcast(0.0f);
    }
    for (int64_t i = 0; i < task.head_dim; ++i, k += kBlockTokens, next_k += kBlockTokens) {
        prefetch(next_k, kBlockTokens * 2);
        Floats keys[vectors];
        for (int v = 0; v < vectors; ++v) keys[v] = load_f16(k + v * kLanes);
        for (int head = 0; head < heads; ++head) {
            const Floats query = broadcast(q[head * task.head_dim + i]);
            for (int v = 0; v < vectors; ++v) {
                scores[head][v] = fma(query, keys[v], scores[head][v]);
            }
        }
    }

    const float infinity = __builtin_inff();
    float block_sum[heads], differences[kLanes] = {}, factors[kLanes];
    static_assert(2 * heads <= kLanes);
    for (int head = 0; head < heads; ++head) {
        Floats largest = broadcast(-infinity);
        for (int v = 0; v < vectors; ++v) {
            Floats& score = scores[head][v];
            score = mul(score, broadcast(task.scale));
            score = select_first(score, broadcast(-infinity), count - v * kLanes);
            largest = max(score, largest);
        }
        const float block_maximum = max_lane(largest);
        Floats total = broadcast(0.0f);
        for (int v = 0; v < vectors; ++v) {
            Floats p = exponential(sub(scores[head][v], broadcast(block_maximum)));
            p = select_first(p, broadcast(0.0f), count - v * kLanes);
            store(probabilities + head * kBlockTokens + v * kLanes, p);
            total = add(total, p);
        }
        block_sum[head] = sum_lanes(total);
        const float before = softmax.maximum[head];
        const float maximum = before < block_maximum ? block_maximum : before;
        softmax.maximum[head] = maximum;
        differences[2 * head] = before - maximum;
        differences[2 * head + 1] = block_maximum - maximum;
    }
    store(factors, exponential(load(differences)));
    for (int head = 0; head < heads; ++head) {
        softmax.keep[head] = factors[2 * head];
        softmax.take[head] = factors[2 * head + 1];
        softmax.sum[head] =
            softmax.sum[head] * softmax.keep[head] + block_sum[head] * softmax.take[head];
    }
}

// out[head][first..] = out * keep + take * (sum of the first `count` tokens' probability * v), for
// `vectors` vectors, the last of them `last` lanes long.
template <int heads, int vectors>
SMOLRUN_INLINE void add_values(const AttentionTask& task, const uint16_t* v, const uint16_t* next_v,
                               int64_t first, int64_t last, int64_t count,
                               const float* probabilities, const Softmax<heads>& softmax,
                               float* out) {
    const auto lanes = [&](int i) { return i == vectors - 1 ? last : int64_t{kLanes}; };
    Floats totals[heads][vectors];
    for (auto& of_head : totals) {
        for (Floats& total : of_head) total = broadcast(0.0f);
    }
    for (int64_t token = 0; token < count; ++token) {
        const uint16_t* row = v + token * task.head_dim + first;
        prefetch(next_v + token * task.head_dim + first, vectors * kLanes * 2);
        Floats values[vectors];
        for (int i = 0; i < vectors; ++i) values[i] = load_f16_up_to(row + i * kLanes, lanes(i));
        for (int head = 0; head < heads; ++head) {
            const Floats p = broadcast(probabilities[head * kBlockTokens + token]);
            for (int i = 0; i < vectors; ++i) totals[head][i] = fma(p, values[i], totals[head][i]);
        }
    }
    for (int head = 0; head < heads; ++head) {
        float* const to = out + head * task.head_dim + first;
        const Floats keep = broadcast(softmax.keep[head]), take = broadcast(softmax.take[head]);
        for (int i = 0; i < vectors; ++i) {
            const Floats kept = mul(load_up_to(to + i * kLanes, lanes(i)), keep);
            store_up_to(to + i * kLanes, fma(totals[head][i], take, kept), lanes(i));
        }
    }
}

template <int heads>
void attend(const AttentionTask& task, int64_t first_head) {
    constexpr int vectors = 4;
    const float* const q = task.q + first_head * task.head_dim;
    float* const out = task.out + first_head * task.head_dim;
    float* const probabilities = task.scratch;  // [heads][32]
    Softmax<heads> softmax{};
    for (float& maximum : softmax.maximum) maximum = -__builtin_inff();
    for (int64_t i = 0; i < heads * task.head_dim; ++i) out[i] = 0;

    for (int64_t begin = 0; begin < task.length; begin += kBlockTokens) {
        const int64_t count = smaller(kBlockTokens, task.length - begin);
        const Block block = block_at(task, begin);
        // Blocks lie anywhere in memory: the next one is asked for while this one is used.
        const Block next = block_at(task, smaller(begin + kBlockTokens, task.length - 1));
        // Of the first block nothing was before: exp(-infinity - maximum) keeps 0 of it.
        score_block<heads>(task, q, block.k, next.k, count, probabilities, softmax);
        int64_t i = 0;
        for (; i + vectors * kLanes <= task.head_dim; i += vectors * kLanes) {
            add_values<heads, vectors>(task, block.v, next.v, i, kLanes, count, probabilities,
                                       softmax, out);
        }
        for (; i < task.head_dim; i += kLanes) {
            add_values<heads, 1>(task, block.v, next.v, i, smaller(kLanes, task.head_dim - i),
                                 count, probabilities, softmax, out);
        }
    }
    for (int head = 0; head < heads; ++head) {
        float* const to = out + head * task.head_dim;
        const Floats sum = broadcast(softmax.sum[head]);
        each_vector(task.head_dim, [&](int64_t i, int64_t lanes) {
            store_up_to(to + i, div(load_up_to(to + i, lanes), sum), lanes);
        });
    }
}

// Heads by tiles: the most that keep their sums in registers, then fewer.
template <int heads = kTileHeads>
void attend_heads(const AttentionTask& task, int64_t first_head) {
    for (; first_head + heads <= task.group; first_head += heads) attend<heads>(task, first_head);
    if constexpr (heads > 1) attend_heads<heads - 1>(task, first_head);
}

void attention(const AttentionTask& task) { attend_heads(task, 0); }

}  // namespace
}  // namespace smolrun
