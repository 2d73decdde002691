// How the product of inputs and weights is cut into chunks, prepared and carried out by a team.
#pragma once

#include <algorithm>
#include <bit>
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
// But weights are not read again for fewer tokens than this, a panel at least.
constexpr int64_t kFewestTileTokens = 32;
static_assert(kFewestTileTokens >= kPanelTokens);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The tokens of a step in chunks, none of which belongs to two threads.
struct TokenChunks {
    int64_t tokens, own, together;  // `together` at most in a chunk

    struct Range {
        int64_t begin, end;
    };

    int64_t of_own() const { return ceil_div(own, together); }
    int64_t count() const { return ceil_div(tokens, own) * of_own(); }
    Range range(int64_t chunk) const {
        const int64_t first = chunk / of_own() * own;
        const int64_t begin = first + chunk % of_own() * together;
        const int64_t end = std::min({begin + together, first + own, tokens});
        return {begin, std::max(begin, end)};  // the last thread may have fewer tokens
    }
};

// How a product [tokens] x [rows] is cut into chunks. Tiles of tokens come one after the other, so
// that all threads read the same inputs, or each its own tokens'.
struct Tiling {
    TokenChunks tiles;
    int64_t rows;
    int64_t panel;  // a tile has a multiple of it, but for the last one
    int64_t chunk_rows;
    int64_t row_chunks;
    int64_t chunks;

    struct Part {
        int64_t token_begin, tokens, row_begin, row_end;
        int64_t rows() const { return row_end - row_begin; }
    };

    Part part(int64_t chunk) const {
        const auto [begin, end] = tiles.range(chunk / row_chunks);
        const int64_t row = chunk % row_chunks * chunk_rows;
        return {begin, end - begin, row, std::min(row + chunk_rows, rows)};
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

// unit: rows that a chunk is a multiple of; 0 chooses. own: tokens that a thread keeps, or all.
inline Tiling tile(int64_t tokens, int64_t own, const Matrix& weights, int64_t unit,
                   const StepContext& step, const Worker& worker) {
    // Columns that are gone through together.
    const int64_t columns = weights.type == WeightType::I16
                                ? std::min(weights.columns, kCodePartColumns)
                                : weights.columns;
    const int64_t panel = step.kernels.panel_tokens;
    const auto in_panels = [&](int64_t most) {
        if (most >= panel) return most / panel * panel;
        return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most)));
    };
    int64_t most = in_panels(std::max(kFewestTileTokens, kTileBytes / (columns * 2)));
    if (unit > 0) most = std::min(most, in_panels(kProductFloats / unit));
    // No last tile of a few tokens, for which all weights would be read again.
    const int64_t even = ceil_div(own, ceil_div(own, most));
    const int64_t tile_tokens = even == own ? own : std::min(most, round_up(even, panel));
    Tiling t{};
    t.tiles = {tokens, own, tile_tokens};
    t.rows = weights.rows;
    if (unit > 0) {
        t.chunk_rows = unit;
    } else {
        const int64_t groups = ceil_div(weights.rows, kGroupRows);
        const int64_t fair = ceil_div(groups, worker.threads() * kChunksPerThread);
        const int64_t fitting = std::max<int64_t>(1, kProductFloats / tile_tokens / kGroupRows);
        t.chunk_rows = kGroupRows * chunk_groups(groups, std::min(fair, fitting), t.tiles.count(),
                                                 worker.threads());
    }
    t.panel = std::min(tile_tokens, panel);
    t.row_chunks = ceil_div(weights.rows, t.chunk_rows);
    t.chunks = t.tiles.count() * t.row_chunks;
    return t;
}

// Tokens that are prepared at a time.
inline int64_t token_chunk(int64_t tokens, int threads) {
    return std::clamp<int64_t>(tokens / (threads * kChunksPerThread), 1, 8);
}

// Room for the inputs of a thread's own tokens, from `token` on, the first of a panel: apart from
// others', which may have another number of columns meanwhile.
inline InputScratch inputs_from(const InputScratch& all, int64_t columns, int64_t own,
                                int64_t token) {
    const int64_t first = token / own * own;
    const auto at = [&](auto* from, int64_t most_of_token, int64_t of_token) {
        return from == nullptr ? from : from + first * most_of_token + (token - first) * of_token;
    };
    InputScratch some = all;
    some.values = at(all.values, all.columns, columns);
    some.words = at(all.words, all.columns / 32, columns / 32);
    some.scales = at(all.scales, all.columns / 32, columns / 32);
    some.bytes = at(all.bytes, all.columns / 32, columns / 32);
    some.byte_scales = at(all.byte_scales, 1, 1);
    some.codes = at(all.codes, kCodePartColumns, kCodePartColumns);
    some.code_scales = at(all.code_scales, kCodePartRuns, kCodePartRuns);
    return some;
}

// passing: room for a token's [columns], of which only codes stay.
inline void prepare_input(const LinkedInput& input, const StepContext& step, int64_t source_token,
                          int64_t own, int64_t token, int64_t panel, const InputScratch& all,
                          float* passing) {
    const int64_t columns = input.buffer.width;
    const int64_t place = token % own % panel;
    const InputScratch to = inputs_from(all, columns, own, token - place);
    const float* values = input.buffer.data + source_token * columns;
    if (input.norm != nullptr) {
        const bool kept = input.floats || step.squares != nullptr;
        float* const normalized = kept ? to.values + place * columns : passing;
        step.kernels.rms_norm(values, input.norm, columns, input.epsilon, normalized);
        values = normalized;
    }
    if (input.quantize) {
        step.kernels.quantize(values, columns, panel, to.words + place, to.scales + place);
    }
    if (input.quantize_bytes) {
        step.kernels.quantize_bytes(values, columns, panel, to.bytes + place,
                                    to.byte_scales + place);
    }
    if (input.quantize_runs) {
        step.kernels.quantize_runs(values, columns, to.code_stride,
                                   to.codes + place * kCodePartColumns,
                                   to.code_scales + place * kCodePartRuns);
    }
}

// Prepared inputs from the first token of a panel on.
inline Activations view(const LinkedInput& input, const InputScratch& all, int64_t own,
                        int64_t panel, int64_t token) {
    const int64_t columns = input.buffer.width;
    const InputScratch from = inputs_from(all, columns, own, token);
    const float* const values =
        input.norm != nullptr ? from.values : input.buffer.data + token * columns;
    return {columns,    values,           panel,      from.words,       from.scales,
            from.bytes, from.byte_scales, from.codes, from.code_scales, from.code_stride};
}

inline const ThreadScratch& own(const StepContext& step, const Worker& worker) {
    return step.scratch.threads[static_cast<size_t>(worker.index())];
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

// A phase of products over the prepared inputs of tokens.tokens tokens:
// work(chunk, inputs(first token)). `source_token(i)` is where token i stands in the input buffer.
//
// The input of a single token is prepared by every thread for itself: less work than waiting for
// one that does it. Then memory bounds the step, and must not rest while a thread waits for another
// or prepares: weights_of(chunk) are asked for.
template <class SourceToken, class WeightsOf, class Work>
void product_phase(const LinkedInput& input, const StepContext& step, Worker& worker,
                   TokenChunks tokens, int64_t panel, int64_t chunks, SourceToken&& source_token,
                   WeightsOf&& weights_of, Work&& work) {
    const bool alone = tokens.tokens == 1 && step.squares == nullptr;
    const InputScratch& scratch =
        alone ? step.scratch.threads[static_cast<size_t>(worker.index())].input
              : step.scratch.input;
    const auto multiply = [&](int64_t chunk) {
        work(chunk, [&](int64_t token) { return view(input, scratch, tokens.own, panel, token); });
    };
    if (alone) {
        WeightsAhead ahead = weights_of(std::min(chunks - 1, worker.first_chunk(chunks)));
        worker.phase(
            chunks, [&] { return ahead.ask(kAskedTogether); },
            [&](int64_t chunk) {
                weights_of(chunk).ask(kAskedFirst);
                prepare_input(input, step, source_token(0), tokens.own, 0, panel, scratch,
                              scratch.values);
            },
            multiply);
        return;
    }
    if (input.norm != nullptr || input.quantize || input.quantize_bytes || input.quantize_runs) {
        tokens.together = token_chunk(tokens.tokens, worker.threads());
        worker.phase(tokens.count(), [&](int64_t chunk) {
            float* const passing = own(step, worker).input.values;
            const auto [begin, end] = tokens.range(chunk);
            for (int64_t token = begin; token < end; ++token) {
                prepare_input(input, step, source_token(token), tokens.own, token, panel, scratch,
                              passing);
            }
        });
    }
    if (step.squares != nullptr) {
        const int64_t columns = input.buffer.width;
        const float* const values = input.norm != nullptr ? scratch.values : input.buffer.data;
        double* const squares = step.squares[input.operation].data();
        worker.phase(ceil_div(columns, kSquareColumns), [&](int64_t chunk) {
            add_squares(values, tokens.tokens, columns, chunk * kSquareColumns, squares);
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

// One part of a product, with its bias: out[token][row - row_begin].
inline void multiply(const LinkedMatrix& matrix, const StepContext& step,
                     const ThreadScratch& scratch, const Activations& inputs,
                     const Tiling::Part& part, float* out, int64_t stride) {
    if (part.tokens == 0) return;
    matrix.multiply(matrix.weights, inputs, part.tokens, part.row_begin, part.row_end, out, stride,
                    scratch.linear);
    if (matrix.bias == nullptr) return;
    for (int64_t token = 0; token < part.tokens; ++token) {
        step.kernels.add(matrix.bias + part.row_begin, part.rows(), out + token * stride);
    }
}

}  // namespace smolrun
