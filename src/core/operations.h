// The operations of a program after linking, and how a team of threads carries them out.
//
// Linking leaves nothing to look up: an operation holds pointers to its buffers and weights and
// the kernel of its weight type. Work is split over output rows (in sixteens), heads and tokens,
// never over a sum, so that no result depends on how it was split.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "kernels.h"
#include "kv.h"
#include "threads.h"

namespace smolrun {

// Sizes that all operations share.
struct Dimensions {
    int64_t num_attention_heads;
    int64_t num_key_value_heads;
    int64_t head_dim;
    int64_t num_hidden_layers;
    int64_t vocab_size;
    int64_t max_step_tokens;
    int threads;

    int64_t group() const { return num_attention_heads / num_key_value_heads; }
    int64_t head_rows() const;  // rows of whole heads that are a multiple of 16
};

// A buffer of activations between operations.
struct Buffer {
    float* data;    // [max_step_tokens][width]
    int64_t width;  // floats a token
};

// A weight matrix with the kernel for its type.
struct LinkedMatrix {
    Matrix weights;
    Kernels::Linear multiply;
    const float* bias;  // [rows], or null
};

// The input of a product: a buffer, normalized first where `norm` is set.
struct LinkedInput {
    Buffer buffer;
    const float* norm;  // [width], or null
    float epsilon;
    bool floats;          // some weight, or the caller, takes them as they are
    bool quantize;        // some weight that reads it takes codes of 16 bits, in pieces
    bool quantize_bytes;  // some weight that reads it takes codes of 8 bits
    bool quantize_runs;   // some weight that reads it is of I16
    size_t operation;     // its place in the listing
};

struct Embed {
    Matrix weights;
    Kernels::Dequantize dequantize;
    Buffer out;
};

struct NormQkv {
    LinkedInput input;
    LinkedMatrix q;
    LinkedMatrix k;
    LinkedMatrix v;
    bool rope;
    int64_t layer;
    Buffer out;  // q, rotated
};

struct Attention {
    Buffer input;
    int64_t layer;
    Buffer out;
};

struct LinearAdd {
    LinkedInput input;
    LinkedMatrix matrix;
    Buffer out;
};

struct NormSwiglu {
    LinkedInput input;
    LinkedMatrix gate;
    LinkedMatrix up;
    Buffer out;
};

struct NormLogits {
    LinkedInput input;
    LinkedMatrix matrix;
};

using Operation = std::variant<Embed, NormQkv, Attention, LinearAdd, NormSwiglu, NormLogits>;

// Inputs of a product, prepared: room for some tokens.
struct InputScratch {
    int64_t columns;      // at most
    float* values;        // [tokens][columns]
    WordPiece* words;     // [panels][columns / 32][panel]
    WordScale* scales;    // [panels][columns / 32][panel]
    BytePiece* bytes;     // [panels][columns / 32][panel]; null where no product is fast
    float* byte_scales;   // [tokens]; likewise
    int16_t* codes;       // [parts][code_stride][512]
    float* code_scales;   // [parts][code_stride][4]
    int64_t code_stride;  // tokens there is room for
};

// What one thread needs for itself.
struct ThreadScratch {
    InputScratch input;  // of one token
    float* products;     // [kProductFloats * 2]
    float* attention;    // attention_scratch() floats
    std::byte* linear;   // kLinearScratch bytes
};

// Room for the products of a chunk: a tile of tokens times a chunk of rows.
inline constexpr int64_t kProductFloats = 32 * 1024;

// Segments of attention, over all tokens of a step, whose partial results there is room for: a
// context of 262144 tokens. The memory is only taken as it is used.
inline constexpr int64_t kMostSegments = 1024;

struct Scratch {
    InputScratch input;  // of max_step_tokens tokens
    float* partials;     // [kMostSegments][num_attention_heads][head_dim + 16]
    float* cosine;       // [max_step_tokens][head_dim / 2]
    float* sine;         // [max_step_tokens][head_dim / 2]
    std::vector<ThreadScratch> threads;
};

// A step's arrays, checked. Nothing here is written but logits and hidden.
struct StepArrays {
    int64_t tokens;  // how many
    int64_t own;     // that a thread keeps between operations, thread after thread; or all
    const int32_t* token_ids;                  // [tokens]
    const int32_t* positions;                  // [tokens]
    std::vector<const int32_t*> block_tables;  // [tokens], the table of each token's sequence
    int64_t logit_row_count;
    const int32_t* logit_rows;  // [logit_row_count]
    float* logits;              // [logit_row_count][vocab_size], written; or null
    float* hidden;              // [logit_row_count][hidden_size], or null: after the last norm
};

// Everything an operation sees while it runs.
struct StepContext {
    const Dimensions& dimensions;
    const Kernels& kernels;
    const Scratch& scratch;
    const KvPool& kv;
    const StepArrays& arrays;
    // Where wanted, or null: for each operation [columns], to which the squares of the inputs of
    // its products are added. One thread adds up a column, in the order of the tokens.
    std::vector<double>* squares;
};

void run_operation(const Operation& operation, const StepContext& step, Worker& worker);

// What nobody looks at again is not computed: after K and V of the last layer, a step goes on with
// the tokens whose logits are wanted. Their rows of all buffers come first then.
struct Narrowing {
    const std::vector<Buffer>& buffers;
    const std::vector<int32_t>& tokens;  // indexes, rising
};

// norm_qkv where a step is narrowed: K and V of all tokens, q of those that it goes on with.
void run_narrowing(const NormQkv& op, const Narrowing& narrowing, const StepContext& step,
                   const StepContext& narrowed, Worker& worker);

}  // namespace smolrun
