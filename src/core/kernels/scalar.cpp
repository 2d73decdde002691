// The kernels in portable C++: what the faster ones must compute.
#include "kernels/scalar.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/numbers.h"
#include "packed.h"

namespace smolrun {
namespace {

// What some numbers are rounded with: code = x * inverse, value = code * scale.
struct Rounding {
    float scale, inverse;
};
Rounding rounding(const float* x, int64_t count, float max_code) {
    uint32_t largest = 0;  // magnitudes as bits: NaN is above infinity, which is above the rest
    for (int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
    }
    if (largest >= 0x7f800000u) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
    const float scale = std::bit_cast<float>(largest) / max_code;
    if (scale < FLT_MIN) return {0.0f, 0.0f};
    return {scale, max_code / std::bit_cast<float>(largest)};
}

// In the current rounding mode, which is to nearest even. 0 times infinity or NaN is NaN.
template <class Code>
Code rounded(float x, const Rounding& with) {
    return with.inverse == 0 ? Code{0} : static_cast<Code>(std::nearbyint(x * with.inverse));
}

// Rounds 32 numbers to codes; returns their scale.
float quantize_piece(const float* x, int16_t* codes) {
    const Rounding with = rounding(x, kPieceWeights, 32767.0f);
    for (int64_t quad = 0; quad < kPieceWeights; quad += 4) {
        const float* from = x + quad;
        const float ordered[4] = {from[0], from[2], from[1], from[3]};
        for (int j = 0; j < 4; ++j) codes[quad + j] = rounded<int16_t>(ordered[j], with);
    }
    return with.scale;
}

void quantize(const float* x, int64_t columns, int64_t panel, WordPiece* words, WordScale* scales) {
    for (int64_t piece = 0; piece < columns / kPieceWeights; ++piece) {
        const int16_t (&codes)[32] = words[piece * panel].codes;
        WordScale& with = scales[piece * panel];
        with.scale = quantize_piece(x + piece * kPieceWeights, words[piece * panel].codes);
        for (int half = 0; half < 2; ++half) {
            int32_t sum = 0;
            for (int i = 0; i < 16; ++i) sum += codes[16 * half + i];
            with.sums[half] = sum;
            with.scaled_sums[half] = with.scale * static_cast<float>(sum);
        }
        with.scaled_sum = with.scale * static_cast<float>(with.sums[0] + with.sums[1]);
    }
}

// One piece; `largest`: magnitude in the row.
void quantize_byte_piece(const float* x, float largest, BytePiece& piece) {
    constexpr float steps = 1 << kMostByteShift;
    float wanted[2];  // of each half: its scale, where that of the token is 1
    for (int half = 0; half < 2; ++half) {
        float most = 0;
        for (int i = 0; i < 16; ++i) most = std::max(most, std::abs(x[16 * half + i]));
        wanted[half] = std::clamp(most * (steps / largest), 1.0f, steps);
    }
    const float larger = std::max(wanted[0], wanted[1]);
    int factor = 0, exponent = 0;
    while (std::ldexp(kByteFactor[factor], exponent) < larger) {
        if (++factor == kByteFactors) factor = 0, ++exponent;
    }
    int32_t sums[2] = {};
    for (int half = 0; half < 2; ++half) {
        int shift = 0;
        while (std::ldexp(kByteFactor[factor], shift) < wanted[half]) ++shift;
        const float inverse =
            std::ldexp(127 * steps / largest * kInverseByteFactor[factor], -shift);
        int32_t of_half = 0;
        for (int i = 16 * half; i < 16 * (half + 1); ++i) {
            piece.codes[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
            of_half += piece.codes[i];
        }
        piece.shifts[half] = shift;
        piece.starts[half] = -128 * of_half;
        sums[half] = of_half * (1 << shift);
    }
    piece.eightfold_sum = 8 * (sums[0] + sums[1]);
    piece.scaled_first = kByteFactor[factor] * static_cast<float>(sums[0]);
    piece.scaled_sum = kByteFactor[factor] * static_cast<float>(sums[0] + sums[1]);
    piece.factor = factor;
}

void quantize_bytes(const float* x, int64_t columns, int64_t panel, BytePiece* pieces,
                    float* scale) {
    constexpr float steps = 1 << kMostByteShift;
    const Rounding with = rounding(x, columns, 127 * steps);
    *scale = with.scale;
    float largest = 0;
    for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, std::abs(x[i]));
    for (int64_t i = 0; i < columns / kPieceWeights; ++i) {
        BytePiece& piece = pieces[i * panel];
        piece = BytePiece{};
        if (with.inverse != 0) quantize_byte_piece(x + i * kPieceWeights, largest, piece);
    }
}

void rms_norm(const float* x, const float* weight, int64_t columns, float epsilon, float* out) {
    double sum = 0;
    for (int64_t i = 0; i < columns; ++i) sum += double{x[i]} * double{x[i]};
    const double mean = sum / static_cast<double>(columns);
    const float inverse = static_cast<float>(1.0 / std::sqrt(mean + double{epsilon}));
    for (int64_t i = 0; i < columns; ++i) out[i] = x[i] * inverse * weight[i];
}

void rope(float* heads, int64_t head_count, int64_t head_dim, const float* cosine,
          const float* sine) {
    const int64_t half = head_dim / 2;
    for (int64_t head = 0; head < head_count; ++head) {
        float* first = heads + head * head_dim;
        float* second = first + half;
        for (int64_t i = 0; i < half; ++i) {
            const float a = first[i], b = second[i];
            first[i] = a * cosine[i] - b * sine[i];
            second[i] = b * cosine[i] + a * sine[i];
        }
    }
}

void swiglu(const float* gate, const float* up, int64_t columns, float* out) {
    for (int64_t i = 0; i < columns; ++i) {
        out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
}

double weigh(const float* x, int64_t columns, float greatest, float factor, float* out) {
    double sum = 0;
    for (int64_t i = 0; i < columns; ++i) {
        out[i] = std::exp((x[i] - greatest) * factor);
        sum += double{out[i]};
    }
    return sum;
}

void add(const float* x, int64_t columns, float* out) {
    for (int64_t i = 0; i < columns; ++i) out[i] += x[i];
}

// Where the code of element i of a token stands.
int64_t k_code(int64_t i, int64_t slot) { return (i / 2 * kBlockTokens + slot) * 2 + i % 2; }
int64_t v_code(int64_t head_dim, int64_t slot, int64_t i) {
    return (slot / 2 * head_dim + i) * 2 + slot % 2;
}
float kv_scale(const int16_t* block, int64_t head_dim, int64_t slot) {
    float scale;
    std::memcpy(&scale, block + kv_codes(head_dim) + 2 * slot, sizeof scale);
    return scale;
}

// Rounding of a vector whose products with another such are summed.
Rounding rounding_for_dot(const float* x, int64_t head_dim) {
    const Rounding by_largest = rounding(x, head_dim, 32767.0f);
    if (by_largest.inverse == 0) return by_largest;
    double squares = 0;
    for (int64_t i = 0; i < head_dim; ++i) squares += double{x[i]} * double{x[i]};
    const double scale = std::sqrt(squares) / kLargestNorm;
    if (scale <= double{by_largest.scale}) return by_largest;
    return {static_cast<float>(scale), static_cast<float>(1 / scale)};
}

void quantize_runs(const float* x, int64_t columns, int64_t stride, int16_t* codes, float* scales) {
    for (int64_t column = 0; column < columns; column += kCodeRunColumns) {
        const int64_t part = column / kCodePartColumns * stride;
        const int64_t in_part = column % kCodePartColumns;
        const int64_t count = std::min(kCodeRunColumns, columns - column);
        const Rounding with = rounding_for_dot(x + column, count);
        scales[part * kCodePartRuns + in_part / kCodeRunColumns] = with.scale;
        int16_t* const to = codes + part * kCodePartColumns + in_part;
        for (int64_t i = 0; i < count; ++i) to[i] = rounded<int16_t>(x[column + i], with);
        if (count % 2 != 0) to[count] = 0;
    }
}

template <WeightType type>
float encode(const std::byte* weights, int64_t count, int16_t* codes) {
    float values[kCodePartColumns];
    float largest = 0;
    double most_squares = 0;  // of a run
    bool finite = true;
    for (int64_t run = 0; run < count; run += kCodeRunColumns) {
        double squares = 0;
        for (int64_t i = run; i < std::min(count, run + kCodeRunColumns); ++i) {
            const auto bits = load<uint16_t>(weights + 2 * i);
            values[i] = type == WeightType::F16 ? float_from_half(bits) : float_from_bfloat16(bits);
            finite = finite && std::isfinite(values[i]);
            largest = std::max(largest, std::abs(values[i]));
            squares += double{values[i]} * double{values[i]};
        }
        most_squares = std::max(most_squares, squares);
    }
    Rounding with{std::numeric_limits<float>::quiet_NaN(), 0};
    if (finite) {
        with.scale = power_of_two_above(
            std::max(double{largest} / kLargestCode, std::sqrt(most_squares) / kLargestNorm));
        with.inverse = 1 / with.scale;
    }
    for (int64_t i = 0; i < count; ++i) codes[i] = rounded<int16_t>(values[i], with);
    if (count % 2 != 0) codes[count] = 0;
    return with.scale;
}

void store_kv(const float* k, const float* v, int64_t head_dim, int64_t slot, int16_t* k_block,
              int16_t* v_block) {
    const Rounding of_k = rounding_for_dot(k, head_dim), of_v = rounding(v, head_dim, 32767.0f);
    for (int64_t i = 0; i < head_dim; ++i) {
        k_block[k_code(i, slot)] = rounded<int16_t>(k[i], of_k);
        v_block[v_code(head_dim, slot, i)] = rounded<int16_t>(v[i], of_v);
    }
    const int64_t scale = kv_codes(head_dim) + 2 * slot;
    std::memcpy(k_block + scale, &of_k.scale, sizeof of_k.scale);
    std::memcpy(v_block + scale, &of_v.scale, sizeof of_v.scale);
}

// Softmax over the first `count` tokens of one block, not yet divided by its sum.
struct BlockResult {
    float maximum;  // of the scores
    float sum;      // of exp(score - maximum)
};

// weighted[head_dim] = sum of exp(score - maximum) * V; scores is [32].
BlockResult attend_block(const AttentionTask& task, const float* q, const int16_t* block,
                         int64_t count, float* scores, float* weighted) {
    const int16_t* k = block + task.k_offset;
    const int16_t* v = block + task.v_offset;
    std::fill_n(scores, kBlockTokens, 0.0f);
    for (int64_t i = 0; i < task.head_dim; ++i) {
        for (int64_t token = 0; token < count; ++token) {
            scores[token] += q[i] * static_cast<float>(k[k_code(i, token)]);
        }
    }
    BlockResult result{-std::numeric_limits<float>::infinity(), 0.0f};
    for (int64_t token = 0; token < count; ++token) {
        scores[token] *= task.scale * kv_scale(k, task.head_dim, token);
        result.maximum = std::max(result.maximum, scores[token]);
    }
    std::fill_n(weighted, task.head_dim, 0.0f);
    for (int64_t token = 0; token < count; ++token) {
        const float weight = std::exp(scores[token] - result.maximum);
        result.sum += weight;
        const float of_code = weight * kv_scale(v, task.head_dim, token);
        for (int64_t i = 0; i < task.head_dim; ++i) {
            weighted[i] += of_code * static_cast<float>(v[v_code(task.head_dim, token, i)]);
        }
    }
    return result;
}

// all = all and one together; both [head_dim].
void merge(const BlockResult& one, const float* weighted, int64_t head_dim, BlockResult& all,
           float* out) {
    // exp(-inf - maximum) is 0 for the first one, so nothing of the start is left.
    const float maximum = std::max(all.maximum, one.maximum);
    const float keep = std::exp(all.maximum - maximum);
    const float take = std::exp(one.maximum - maximum);
    all = {maximum, all.sum * keep + one.sum * take};
    for (int64_t i = 0; i < head_dim; ++i) out[i] = out[i] * keep + weighted[i] * take;
}

constexpr BlockResult kNothing = {-std::numeric_limits<float>::infinity(), 0.0f};

// One head of a token that sees `length` tokens; scratch is [32 + head_dim].
void attend_segment_of_head(const AttentionTask& task, const float* q, int64_t length,
                            int64_t segment, float* scratch, float* partial) {
    float* scores = scratch;                   // [32]
    float* weighted = scratch + kBlockTokens;  // [head_dim]
    BlockResult all = kNothing;
    std::fill_n(partial, task.head_dim, 0.0f);
    const int64_t end = std::min(length, (segment + 1) * kSegmentTokens);
    for (int64_t first = segment * kSegmentTokens; first < end; first += kBlockTokens) {
        const int16_t* block =
            task.pool + int64_t{task.block_table[first / kBlockTokens]} * task.block_stride;
        const int64_t count = std::min(kBlockTokens, end - first);
        const BlockResult one = attend_block(task, q, block, count, scores, weighted);
        merge(one, weighted, task.head_dim, all, partial);
    }
    partial[task.head_dim] = all.maximum;
    partial[task.head_dim + 1] = all.sum;
}

void attend_segment(const AttentionTask& task, int64_t segment, float* partial) {
    for (int64_t head = 0; head < task.group; ++head) {
        attend_segment_of_head(task, task.q + head * task.head_dim, task.length, segment,
                               task.scratch, partial + head * (task.head_dim + kPartialExtra));
    }
}

void merge_segments(const float* partial, int64_t segments, int64_t stride, int64_t head_dim,
                    float* out) {
    BlockResult all = kNothing;
    std::fill_n(out, head_dim, 0.0f);
    for (int64_t i = 0; i < segments; ++i, partial += stride) {
        merge({partial[head_dim], partial[head_dim + 1]}, partial, head_dim, all, out);
    }
    for (int64_t i = 0; i < head_dim; ++i) out[i] /= all.sum;
}

void attention(const AttentionTask& task) {
    float* const partial = task.scratch + kBlockTokens + task.head_dim;  // [head_dim + 16]
    for (int64_t token = 0; token < task.tokens; ++token) {
        const int64_t length = task.length + token;
        for (int64_t head = 0; head < task.group; ++head) {
            const int64_t at = token * task.stride + head * task.head_dim;
            float* const out = task.out + at;
            BlockResult all = kNothing;
            std::fill_n(out, task.head_dim, 0.0f);
            for (int64_t segment = 0; segment * kSegmentTokens < length; ++segment) {
                attend_segment_of_head(task, task.q + at, length, segment, task.scratch, partial);
                merge({partial[task.head_dim], partial[task.head_dim + 1]}, partial, task.head_dim,
                      all, out);
            }
            for (int64_t i = 0; i < task.head_dim; ++i) out[i] /= all.sum;
        }
    }
}

}  // namespace

const Kernels kScalarKernels = {
    .name = "scalar",
    .panel_tokens = kPanelTokens,
#define X(name, weights, bytes) scalar::linear(WeightType::name),
    .linear = {SMOLRUN_WEIGHT_TYPES(X)},
#undef X
#define X(name, weights, bytes) scalar::fast_linear(WeightType::name),
    .fast_linear = {SMOLRUN_WEIGHT_TYPES(X)},
#undef X
    .quantize = quantize,
    .quantize_bytes = quantize_bytes,
    .quantize_runs = quantize_runs,
    .encode_f16 = encode<WeightType::F16>,
    .encode_bf16 = encode<WeightType::BF16>,
    .rms_norm = rms_norm,
    .rope = rope,
    .swiglu = swiglu,
    .weigh = weigh,
    .add = add,
    .attention = attention,
    .attend_segment = attend_segment,
    .merge_segments = merge_segments,
    .store_kv = store_kv,
#define X(name, weights, bytes) scalar::dequantize(WeightType::name),
    .dequantize = {SMOLRUN_WEIGHT_TYPES(X)},
#undef X
};

}  // namespace smolrun
