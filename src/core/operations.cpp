#include "operations.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "products.h"

namespace smolrun {
namespace {

void run(const Embed& op, const StepContext& step, Worker& worker) {
    const int64_t together = token_chunk(step.arrays.tokens, worker.threads());
    const TokenChunks tokens{step.arrays.tokens, step.arrays.own, together};
    worker.phase(tokens.count(), [&](int64_t chunk) {
        const auto [begin, end] = tokens.range(chunk);
        for (int64_t token = begin; token < end; ++token) {
            op.dequantize(op.weights, step.arrays.token_ids[token],
                          op.out.data + token * op.out.width);
        }
    });
}

void rotate(const StepContext& step, int64_t token, float* heads, int64_t head_count) {
    const int64_t half = step.dimensions.head_dim / 2;
    step.kernels.rope(heads, head_count, step.dimensions.head_dim,
                      step.scratch.cosine + token * half, step.scratch.sine + token * half);
}

// Rotates and stores the K and V of some tokens and heads: k, v [tokens][part.rows].
void store(const NormQkv& op, const StepContext& step, const Tiling::Part& part, float* k,
           float* v) {
    const int64_t head_dim = step.dimensions.head_dim;
    const int64_t first_head = part.row_begin / head_dim;
    const int64_t heads = part.rows() / head_dim;
    for (int64_t i = 0; i < part.tokens; ++i) {
        const int64_t token = part.token_begin + i;
        const int64_t position = step.arrays.positions[token];
        const int64_t block =
            step.arrays.block_tables[static_cast<size_t>(token)][position / kBlockTokens];
        int16_t* const stored = step.kv.data() + block * step.kv.block_stride();
        float* const token_k = k + i * part.rows();
        const float* const token_v = v + i * part.rows();
        if (op.rope) rotate(step, token, token_k, heads);
        for (int64_t head = 0; head < heads; ++head) {
            step.kernels.store_kv(token_k + head * head_dim, token_v + head * head_dim, head_dim,
                                  position % kBlockTokens,
                                  stored + step.kv.k_offset(op.layer, first_head + head),
                                  stored + step.kv.v_offset(op.layer, first_head + head));
        }
    }
}

// One part of K and V, and of q. A part is whole heads, so that they are rotated and stored while
// they are still in the cache.
void multiply_kv(const NormQkv& op, const StepContext& step, const ThreadScratch& scratch,
                 const Activations& inputs, const Tiling::Part& part) {
    float* const k = scratch.products;
    float* const v = scratch.products + kProductFloats;
    multiply(op.k, step, scratch, inputs, part, k, part.rows());
    multiply(op.v, step, scratch, inputs, part, v, part.rows());
    store(op, step, part, k, v);
}
void multiply_q(const NormQkv& op, const StepContext& step, const ThreadScratch& scratch,
                const Activations& inputs, const Tiling::Part& part) {
    float* const q = op.out.data + part.token_begin * op.out.width + part.row_begin;
    multiply(op.q, step, scratch, inputs, part, q, op.out.width);
    for (int64_t i = 0; op.rope && i < part.tokens; ++i) {
        rotate(step, part.token_begin + i, q + i * op.out.width,
               part.rows() / step.dimensions.head_dim);
    }
}

Tiling tile_heads(const LinkedMatrix& matrix, const StepContext& step, const Worker& worker) {
    return tile(step.arrays.tokens, step.arrays.own, matrix.weights, step.dimensions.head_rows(),
                step, worker);
}

void run(const NormQkv& op, const StepContext& step, Worker& worker) {
    const Tiling q_tiling = tile_heads(op.q, step, worker);
    const Tiling kv_tiling = tile_heads(op.k, step, worker);
    const int64_t chunks = kv_tiling.chunks + q_tiling.chunks;
    // Those of K and V are longer: so they come first among the chunks of a thread's own tokens,
    // and else are spread evenly among those of q.
    const int64_t blocks = ceil_div(step.arrays.tokens, step.arrays.own);
    const int64_t of_block = chunks / blocks, kv_of_block = kv_tiling.chunks / blocks;
    const auto place = [&](int64_t chunk) {
        const int64_t block = chunk / of_block;
        const int64_t kv = blocks > 1
                               ? block * kv_of_block + std::min(kv_of_block, chunk % of_block)
                               : chunk * kv_tiling.chunks / chunks;
        const bool is_kv = blocks > 1 ? chunk % of_block < kv_of_block
                                      : (chunk + 1) * kv_tiling.chunks / chunks > kv;
        return std::pair(is_kv, is_kv ? kv_tiling.part(kv) : q_tiling.part(chunk - kv));
    };
    const auto weights_of = [&](int64_t chunk) {
        const auto [is_kv, part] = place(chunk);
        return WeightsAhead((is_kv ? op.k : op.q).weights, part.row_begin);
    };
    product_phase(op.input, step, worker, q_tiling.tiles, std::min(q_tiling.panel, kv_tiling.panel),
                  chunks, kSameToken, weights_of, [&](int64_t chunk, auto&& inputs) {
                      const auto [is_kv, part] = place(chunk);
                      (is_kv ? multiply_kv : multiply_q)(op, step, own(step, worker),
                                                         inputs(part.token_begin), part);
                  });
}

// Brings the rows of some tokens to the front.
void gather(const std::vector<int32_t>& tokens, float* data, int64_t width) {
    for (size_t i = 0; i < tokens.size(); ++i) {
        std::memmove(data + static_cast<int64_t>(i) * width, data + tokens[i] * width,
                     static_cast<size_t>(width) * sizeof(float));
    }
}

// Some successive tokens of one sequence, and `group` query heads from `head` on.
AttentionTask attention_task(const Attention& op, const StepContext& step, const Worker& worker,
                             int64_t token, int64_t tokens, int64_t head, int64_t group) {
    const Dimensions& d = step.dimensions;
    const int64_t kv_head = head / d.group();
    AttentionTask task{};
    task.q = op.input.data + token * op.input.width + head * d.head_dim;
    task.out = op.out.data + token * op.out.width + head * d.head_dim;
    task.tokens = tokens;
    task.stride = op.out.width;
    task.group = group;
    task.head_dim = d.head_dim;
    task.length = int64_t{step.arrays.positions[token]} + 1;
    task.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d.head_dim)));
    task.pool = step.kv.data();
    task.block_table = step.arrays.block_tables[static_cast<size_t>(token)];
    task.block_stride = step.kv.block_stride();
    task.k_offset = step.kv.k_offset(op.layer, kv_head);
    task.v_offset = step.kv.v_offset(op.layer, kv_head);
    task.scratch = own(step, worker).attention;
    return task;
}

int64_t segments_of(const StepContext& step, int64_t token) {
    return ceil_div(int64_t{step.arrays.positions[token]} + 1, kSegmentTokens);
}

// A few tokens that look far back: the segments of each are computed by whoever is free, then
// merged. A chunk is some successive segments of a head, so that memory is asked for across them.
void run_by_segments(const Attention& op, const StepContext& step, Worker& worker,
                     int64_t segments) {
    const Dimensions& d = step.dimensions;
    const int64_t partial_floats = d.head_dim + kPartialExtra;
    const int64_t segment_floats = d.num_attention_heads * partial_floats;
    float* const partials = step.scratch.partials;  // [segment][head][head_dim + 16]

    const int64_t kv_heads = d.num_key_value_heads;
    const int64_t together =
        std::max<int64_t>(1, segments * kv_heads / (worker.threads() * 2 * kChunksPerThread));
    worker.phase(ceil_div(segments, together) * kv_heads, [&](int64_t chunk) {
        const int64_t head = chunk % kv_heads * d.group();
        const int64_t begin = chunk / kv_heads * together;
        int64_t token = 0, segment = begin;
        while (segment >= segments_of(step, token)) segment -= segments_of(step, token++);
        for (int64_t slot = begin; slot < std::min(begin + together, segments); ++slot) {
            step.kernels.attend_segment(attention_task(op, step, worker, token, 1, head, d.group()),
                                        segment,
                                        partials + slot * segment_floats + head * partial_floats);
            if (++segment < segments_of(step, token)) continue;
            segment = 0;
            ++token;
        }
    });
    worker.phase(step.arrays.tokens * kv_heads, [&](int64_t chunk) {
        const int64_t token = chunk / kv_heads;
        int64_t first = 0;
        for (int64_t i = 0; i < token; ++i) first += segments_of(step, i);
        const int64_t begin = chunk % kv_heads * d.group();
        for (int64_t head = begin; head < begin + d.group(); ++head) {
            step.kernels.merge_segments(partials + first * segment_floats + head * partial_floats,
                                        segments_of(step, token), segment_floats, d.head_dim,
                                        op.out.data + token * op.out.width + head * d.head_dim);
        }
    });
}

void run(const Attention& op, const StepContext& step, Worker& worker) {
    const Dimensions& d = step.dimensions;
    const int64_t tokens = step.arrays.tokens;
    const int64_t wanted = worker.threads() * kChunksPerThread;
    const bool few = tokens * d.num_key_value_heads < wanted;
    if (few) {
        int64_t segments = 0;
        for (int64_t token = 0; token < tokens; ++token) segments += segments_of(step, token);
        if (segments > tokens && segments <= kMostSegments) {
            run_by_segments(op, step, worker, segments);
            return;
        }
    }
    // Query heads that share a KV head read it once, and successive tokens of a sequence too. With
    // few tokens there are too few KV heads to go round, and each query head is a chunk by itself.
    const int64_t group = few && d.num_key_value_heads % worker.threads() != 0 ? 1 : d.group();
    const int64_t groups = d.num_attention_heads / group;
    const int64_t together =
        std::clamp<int64_t>(tokens * d.num_key_value_heads / wanted, 1, kAttentionTokens);
    const TokenChunks runs{tokens, step.arrays.own, together};

    worker.phase(runs.count() * groups, [&](int64_t chunk) {
        const auto [begin, end] = runs.range(chunk / groups);
        const int64_t head = chunk % groups * group;
        const auto& tables = step.arrays.block_tables;
        const int32_t* const positions = step.arrays.positions;
        for (int64_t token = begin, next = begin; token < end; token = next) {
            while (next < end &&
                   tables[static_cast<size_t>(next)] == tables[static_cast<size_t>(token)] &&
                   positions[next] - positions[token] == next - token) {
                ++next;
            }
            step.kernels.attention(
                attention_task(op, step, worker, token, next - token, head, group));
        }
    });
}

// Asks for what a product will be added to: short pieces of rows, which the CPU does not foresee.
void ask_for(const Buffer& out, const Tiling::Part& part) {
    for (int64_t i = 0; i < part.tokens; ++i) {
        const float* const row = out.data + (part.token_begin + i) * out.width;
        for (int64_t j = part.row_begin; j < part.row_end; j += 16) {
            __builtin_prefetch(row + j, 1, 2);
        }
    }
}

void run(const LinearAdd& op, const StepContext& step, Worker& worker) {
    const Tiling tiling =
        tile(step.arrays.tokens, step.arrays.own, op.matrix.weights, 0, step, worker);
    product_phase(op.input, step, worker, tiling.tiles, tiling.panel, tiling.chunks, kSameToken,
                  first_rows(op.matrix, tiling), [&](int64_t chunk, auto&& inputs) {
                      const ThreadScratch& scratch = own(step, worker);
                      const Tiling::Part part = tiling.part(chunk);
                      ask_for(op.out, part);
                      multiply(op.matrix, step, scratch, inputs(part.token_begin), part,
                               scratch.products, part.rows());
                      for (int64_t i = 0; i < part.tokens; ++i) {
                          step.kernels.add(
                              scratch.products + i * part.rows(), part.rows(),
                              op.out.data + (part.token_begin + i) * op.out.width + part.row_begin);
                      }
                  });
}

void run(const NormSwiglu& op, const StepContext& step, Worker& worker) {
    const Tiling tiling =
        tile(step.arrays.tokens, step.arrays.own, op.gate.weights, 0, step, worker);
    product_phase(op.input, step, worker, tiling.tiles, tiling.panel, tiling.chunks, kSameToken,
                  first_rows(op.gate, tiling), [&](int64_t chunk, auto&& inputs) {
                      const ThreadScratch& scratch = own(step, worker);
                      const Tiling::Part part = tiling.part(chunk);
                      float* const gate = scratch.products;
                      float* const up = scratch.products + kProductFloats;
                      const Activations x = inputs(part.token_begin);
                      multiply(op.gate, step, scratch, x, part, gate, part.rows());
                      multiply(op.up, step, scratch, x, part, up, part.rows());
                      for (int64_t i = 0; i < part.tokens; ++i) {
                          step.kernels.swiglu(
                              gate + i * part.rows(), up + i * part.rows(), part.rows(),
                              op.out.data + (part.token_begin + i) * op.out.width + part.row_begin);
                      }
                  });
}

void run(const NormLogits& op, const StepContext& step, Worker& worker) {
    const StepArrays& arrays = step.arrays;
    const int64_t rows = arrays.logit_row_count;
    if (rows == 0) return;
    const int64_t columns = op.input.buffer.width;
    const int64_t vocab_size = op.matrix.weights.rows;
    const Tiling tiling = tile(rows, rows, op.matrix.weights, 0, step, worker);
    const auto source_token = [&](int64_t row) { return int64_t{arrays.logit_rows[row]}; };
    product_phase(op.input, step, worker, tiling.tiles, tiling.panel, tiling.chunks, source_token,
                  first_rows(op.matrix, tiling), [&](int64_t chunk, auto&& inputs) {
                      const Tiling::Part part = tiling.part(chunk);
                      const Activations x = inputs(part.token_begin);
                      if (arrays.logits != nullptr) {
                          multiply(op.matrix, step, own(step, worker), x, part,
                                   arrays.logits + part.token_begin * vocab_size + part.row_begin,
                                   vocab_size);
                      }
                      if (arrays.hidden != nullptr && part.row_begin == 0) {
                          std::memcpy(arrays.hidden + part.token_begin * columns, x.values,
                                      static_cast<size_t>(part.tokens * columns) * sizeof(float));
                      }
                  });
}

}  // namespace

int64_t Dimensions::head_rows() const { return std::lcm(head_dim, kGroupRows); }

void run_operation(const Operation& operation, const StepContext& step, Worker& worker) {
    std::visit([&](const auto& op) { run(op, step, worker); }, operation);
}

void run_narrowing(const NormQkv& op, const Narrowing& narrowing, const StepContext& step,
                   const StepContext& narrowed, Worker& worker) {
    const auto products = [&](const StepContext& of, const LinkedMatrix& matrix, auto&& work) {
        const Tiling tiling = tile_heads(matrix, of, worker);
        product_phase(op.input, of, worker, tiling.tiles, tiling.panel, tiling.chunks, kSameToken,
                      first_rows(matrix, tiling), [&](int64_t chunk, auto&& inputs) {
                          const Tiling::Part part = tiling.part(chunk);
                          work(op, of, own(of, worker), inputs(part.token_begin), part);
                      });
    };
    products(step, op.k, multiply_kv);
    if (narrowed.arrays.tokens == 0) return;
    worker.phase(1, [&](int64_t) {
        const int64_t half = step.dimensions.head_dim / 2;
        for (const Buffer& buffer : narrowing.buffers) {
            gather(narrowing.tokens, buffer.data, buffer.width);
        }
        gather(narrowing.tokens, step.scratch.cosine, half);
        gather(narrowing.tokens, step.scratch.sine, half);
    });
    products(narrowed, op.q, multiply_q);
}

}  // namespace smolrun
