// How the product of inputs and weights is cut into chunks, prepared and carried out by a team.
#pragma once

#include <algorithm>
#include <limits>

#include "operations.h"
#include "pack.h"

namespace smolrun {

constexpr int64_t kChunksPerThread = 4;
// Weights that are asked for before a phase starts: at most, at a time, and with its first chunk.
constexpr int64_t kMostAhead = 128 * 1024;
constexpr int64_t kAskedTogether = 512;
constexpr int64_t kAskedFirst = 8 * 1024;
// A tile of prepared inputs stays in the second-level cache while weights stream past it: all of
// it, or a part of the columns of I16, which are gone through one after the other.
constexpr int64_t kTileBytes = 384 * 1024;
// But weights are not read again for fewer tokens than this.
constexpr int64_t kFewestTileTokens = 24;
// Where every thread can have as many, tiles are cut so that it has its own: then what it wrote is
// in its cache when it comes to be read. (Not for F16, which is converted once for a tile.)
constexpr int64_t kOwnTokens = 96;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Tokens of a step that one thread keeps to itself from operation to operation, or all of them.
inline int64_t own_tokens(int64_t tokens, int threads, int64_t panel) {
    if (tokens < threads * kOwnTokens) return tokens;
    return std::min(tokens, round_up(ceil_div(tokens, threads), panel));
}

// How a product [tokens] x [rows] is cut into chunks. Tiles of tokens come one after the other, so
// that all threads read the same inputs.
struct Tiling {
    int64_t tokens;
    int64_t rows;
    int64_t tile_tokens;
    int64_t panel;  // tile_tokens is a multiple of it, unless there is but one tile
    int64_t chunk_rows;
    int64_t row_chunks;
    int64_t chunks;

    struct Part {
        int64_t token_begin, tokens, row_begin, row_end;
        int64_t rows() const { return row_end - row_begin; }
    };

    Part part(int64_t chunk) const {
        const int64_t token = chunk / row_chunks * tile_tokens;
        const int64_t row = chunk % row_chunks * chunk_rows;
        return {token, std::min(tile_tokens, tokens - token), row,
                std::min(row + chunk_rows, rows)};
    }
};

// Groups of rows in a chunk, `most` or down to half of it: so many that threads which take chunks
// in turn end together. `tiles`: how often all rows are gone through.
inline int64_t chunk_groups(int64_t groups, int64_t most, int64_t tiles, int threads) {
    int64_t best = most, least = std::numeric_limits<int64_t>::max();
    for (int64_t size = most; 2 * size >= most; --size) {
        const int64_t longest = size * ceil_div(tiles * ceil_div(groups, size), threads);
        if (longest < least) {
            least = longest;
            best = size;
        }
        if (longest * threads == tiles * groups) break;  // none is better
    }
    return best;
}

// unit: rows that a chunk is a multiple of; 0 chooses.
inline Tiling tile(int64_t tokens, const Matrix& weights, int64_t unit, const StepContext& step,
                   const Worker& worker) {
    const int64_t rows = weights.rows;
    // Columns that are gone through together.
    const int64_t columns = weights.type == WeightType::I16
                                ? std::min(weights.columns, kCodePartColumns)
                                : weights.columns;
    const int64_t panel = step.kernels.panel_tokens;
    const auto in_panels = [&](int64_t most) { return most < panel ? most : most / panel * panel; };
    int64_t most = in_panels(std::max(kFewestTileTokens, kTileBytes / (columns * 2)));
    if (weights.type != WeightType::F16) {
        most = std::min(most, own_tokens(tokens, worker.threads(), panel));
    }
    Tiling t{};
    t.tokens = tokens;
    t.rows = rows;
    if (unit > 0) most = std::min(most, in_panels(kProductFloats / unit));
    // No last tile of a few tokens, for which all weights would be read again.
    const int64_t even = ceil_div(tokens, ceil_div(tokens, most));
    t.tile_tokens = even == tokens ? tokens : std::min(most, round_up(even, panel));
    if (unit > 0) {
        t.chunk_rows = unit;
    } else {
        const int64_t groups = ceil_div(rows, kGroupRows);
        const int64_t fair = ceil_div(groups, worker.threads() * kChunksPerThread);
        const int64_t fitting = std::max<int64_t>(1, kProductFloats / t.tile_tokens / kGroupRows);
        t.chunk_rows = kGroupRows * chunk_groups(groups, std::min(fair, fitting),
                                                 ceil_div(tokens, t.tile_tokens), worker.threads());
    }
    t.panel = std::min(t.tile_tokens, panel);
    t.row_chunks = ceil_div(rows, t.chunk_rows);
    t.chunks = ceil_div(tokens, t.tile_tokens) * t.row_chunks;
    return t;
}

// Tokens that are prepared at a time.
inline int64_t token_chunk(int64_t tokens, int threads) {
    return std::clamp<int64_t>(tokens / (threads * kChunksPerThread), 1, 8);
}

inline void prepare_input(const LinkedInput& input, const StepContext& step, int64_t source_token,
                          int64_t token, int64_t panel, const InputScratch& scratch) {
    const int64_t columns = input.buffer.width;
    const float* values = input.buffer.data + source_token * columns;
    if (input.norm != nullptr) {
        float* const normalized = scratch.values + token * columns;
        step.kernels.rms_norm(values, input.norm, columns, input.epsilon, normalized);
        values = normalized;
    }
    const int64_t first = token / panel * panel * (columns / 32) + token % panel;
    if (input.quantize) {
        step.kernels.quantize(values, columns, panel, scratch.words + first,
                              scratch.scales + first);
    }
    if (input.quantize_bytes) {
        step.kernels.quantize_bytes(values, columns, panel, scratch.bytes + first,
                                    scratch.byte_scales + token);
    }
    if (input.quantize_runs) {
        step.kernels.quantize_runs(values, columns, scratch.code_stride,
                                   scratch.codes + token * kCodePartColumns,
                                   scratch.code_scales + token * kCodePartRuns);
    }
}

// Prepared inputs from the first token of a panel on.
inline Activations view(const LinkedInput& input, const InputScratch& scratch, const float* values,
                        int64_t panel, int64_t token) {
    const int64_t columns = input.buffer.width;
    return {columns,
            values + token * columns,
            panel,
            scratch.words + token * (columns / 32),
            scratch.scales + token * (columns / 32),
            scratch.bytes == nullptr ? nullptr : scratch.bytes + token * (columns / 32),
            scratch.bytes == nullptr ? nullptr : scratch.byte_scales + token,
            scratch.codes + token * kCodePartColumns,
            scratch.code_scales + token * kCodePartRuns,
            scratch.code_stride};
}

// Columns of inputs whose squares a thread sums at a time.
constexpr int64_t kSquareColumns = 64;

// Adds the squares of some columns of the inputs of a product.
inline void add_squares(const float* values, int64_t tokens, int64_t columns, int64_t begin,
                        double* squares) {
    const int64_t end = std::min(columns, begin + kSquareColumns);
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t i = begin; i < end; ++i) {
            const double value = values[token * columns + i];
            squares[i] += value * value;
        }
    }
}

// Weights from some row on.
struct WeightsAhead {
    const std::byte* next;
    const std::byte* end;

    WeightsAhead(const Matrix& matrix, int64_t row) {
        const int64_t bytes = group_bytes(matrix.type, matrix.columns);
        next = matrix.data + row / kGroupRows * bytes;
        end = std::min(next + kMostAhead, matrix.data + row_groups(matrix.rows) * bytes);
    }
    // Asks for some of them; false where nothing is left.
    bool ask(int64_t bytes) {
        for (const std::byte* const until = std::min(end, next + bytes); next < until; next += 64) {
            __builtin_prefetch(next, 0, 2);  // into the second-level cache
        }
        return next < end;
    }
};

// A phase of products over the prepared inputs of `tokens` tokens:
// work(chunk, inputs(first token)). `source_token(i)` is where token i stands in the input buffer.
//
// The input of a single token is prepared by every thread for itself: less work than waiting for
// one that does it. Then memory bounds the step, and must not rest while a thread waits for another
// or prepares: weights_of(chunk) are asked for.
template <class SourceToken, class WeightsOf, class Work>
void product_phase(const LinkedInput& input, const StepContext& step, Worker& worker,
                   int64_t tokens, int64_t panel, int64_t chunks, SourceToken&& source_token,
                   WeightsOf&& weights_of, Work&& work) {
    const bool alone = tokens == 1 && step.squares == nullptr;
    const InputScratch& scratch =
        alone ? step.scratch.threads[static_cast<size_t>(worker.index())].input
              : step.scratch.input;
    const float* const values = input.norm != nullptr ? scratch.values : input.buffer.data;
    const auto multiply = [&](int64_t chunk) {
        work(chunk, [&](int64_t token) { return view(input, scratch, values, panel, token); });
    };
    if (alone) {
        WeightsAhead ahead = weights_of(std::min(chunks - 1, worker.first_chunk(chunks)));
        worker.phase(
            chunks, [&] { return ahead.ask(kAskedTogether); },
            [&](int64_t chunk) {
                weights_of(chunk).ask(kAskedFirst);
                prepare_input(input, step, source_token(0), 0, panel, scratch);
            },
            multiply);
        return;
    }
    if (input.norm != nullptr || input.quantize || input.quantize_bytes || input.quantize_runs) {
        const int64_t group = token_chunk(tokens, worker.threads());
        worker.phase(ceil_div(tokens, group), [&](int64_t chunk) {
            const int64_t end = std::min(tokens, (chunk + 1) * group);
            for (int64_t token = chunk * group; token < end; ++token) {
                prepare_input(input, step, source_token(token), token, panel, scratch);
            }
        });
    }
    if (step.squares != nullptr) {
        const int64_t columns = input.buffer.width;
        double* const squares = step.squares[input.operation].data();
        worker.phase(ceil_div(columns, kSquareColumns), [&](int64_t chunk) {
            add_squares(values, tokens, columns, chunk * kSquareColumns, squares);
        });
    }
    worker.phase(chunks, multiply);
}

// The weights that a chunk starts with.
inline auto first_rows(const LinkedMatrix& matrix, const Tiling& tiling) {
    return
        [&](int64_t chunk) { return WeightsAhead(matrix.weights, tiling.part(chunk).row_begin); };
}

constexpr auto kSameToken = [](int64_t token) { return token; };

inline const ThreadScratch& own(const StepContext& step, const Worker& worker) {
    return step.scratch.threads[static_cast<size_t>(worker.index())];
}

// One part of a product, with its bias: out[token][row - row_begin].
inline void multiply(const LinkedMatrix& matrix, const StepContext& step,
                     const ThreadScratch& scratch, const Activations& inputs,
                     const Tiling::Part& part, float* out, int64_t stride) {
    matrix.multiply(matrix.weights, inputs, part.tokens, part.row_begin, part.row_end, out, stride,
                    scratch.linear);
    if (matrix.bias == nullptr) return;
    for (int64_t token = 0; token < part.tokens; ++token) {
        step.kernels.add(matrix.bias + part.row_begin, part.rows(), out + token * stride);
    }
}

}  // namespace smolrun
