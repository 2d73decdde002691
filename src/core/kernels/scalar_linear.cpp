// Products of weights in portable C++. It is the definition that faster kernels follow: one piece
// of 32 weights x 16 rows is unpacked into plain codes and float scales, then met by each token.
#include <algorithm>
#include <cmath>

#include "kernels/numbers.h"
#include "kernels/scalar.h"
#include "pack.h"
#include "packed.h"

namespace smolrun::scalar {
namespace {

constexpr int kRows = static_cast<int>(kGroupRows);
constexpr int kPiece = static_cast<int>(kPieceWeights);
constexpr int64_t kTokenTile = 64;

// 32 weights of 16 rows, ready to multiply: weight = scale * code + minimum.
struct Piece {
    int16_t codes[kPiece][kRows];  // in quad order, as the activations are
    float scales[2][kRows];        // of each sub-block; one sub-block: only the first
    float minimums[2][kRows];      // likewise; types without a minimum leave it unset
};

// Where weight `index` of a piece stands in quad order: 0, 2, 1, 3 within its quad.
constexpr int quad_position(int index) {
    constexpr int order[4] = {0, 2, 1, 3};
    return index / 4 * 4 + order[index % 4];
}

// Reads weight `index` of all rows out of a plane of `bits` bits per weight (blocks.h).
template <int bits>
inline void read_plane(const std::byte* plane, int index, uint32_t (&out)[kRows]) {
    constexpr int quads_in_word = 8 / bits;
    const int word = index / (4 * quads_in_word);
    const int shift = 8 * (index % 4) + bits * (index / 4 % quads_in_word);
    constexpr uint32_t mask = (1u << bits) - 1;
    for (int row = 0; row < kRows; ++row) {
        out[row] = load<uint32_t>(plane + 4 * (word * kRows + row)) >> shift & mask;
    }
}

template <WeightType type>
void unpack_codes(const std::byte* block, int piece, Piece& out) {
    constexpr PackedLayout at = packed_layout(type);
    // 32 weights of `bits` bits take 4*bits bytes a row.
    const std::byte* low_plane = block + at.low + piece * 4 * at.low_bits * kRows;
    const std::byte* high_plane = block + at.high + piece * 4 * at.high_bits * kRows;
    for (int index = 0; index < kPiece; ++index) {
        uint32_t code[kRows];
        read_plane<at.low_bits>(low_plane, index, code);
        if constexpr (at.high_bits != 0) {
            uint32_t high[kRows];
            read_plane<at.high_bits>(high_plane, index, high);
            for (int row = 0; row < kRows; ++row) code[row] |= high[row] << at.low_bits;
        }
        int16_t* codes = out.codes[quad_position(index)];
        for (int row = 0; row < kRows; ++row) {
            if constexpr (at.lookup) {
                codes[row] = kNonlinearValues[code[row]];
            } else {
                codes[row] = static_cast<int16_t>(static_cast<int>(code[row]) - at.offset);
            }
        }
    }
}

inline int byte_at(const std::byte* field, int n, int row) {
    return std::to_integer<int>(field[n * kRows + row]);
}

// Six-bit scale and minimum of sub-block j of Q4_K and Q5_K.
struct ScaleAndMinimum {
    int scale, minimum;
};
inline ScaleAndMinimum q4_k_scale(const std::byte* field, int j, int row) {
    if (j < 4) return {byte_at(field, j, row) & 63, byte_at(field, j + 4, row) & 63};
    const int both = byte_at(field, j + 4, row);
    return {(both & 15) | byte_at(field, j - 4, row) >> 6 << 4,
            both >> 4 | byte_at(field, j, row) >> 6 << 4};
}

// Scale of sub-block j (of 16 weights) of Q3_K: -32..31.
inline int q3_k_scale(const std::byte* field, int j, int row) {
    const int low = byte_at(field, j % 8, row) >> (j < 8 ? 0 : 4) & 15;
    const int high = byte_at(field, 8 + j % 4, row) >> (2 * (j / 4)) & 3;
    return (low | high << 4) - 32;
}

// The integer scale and minimum of sub-block j of a block; 1 and 1 where a type has none.
template <WeightType type>
inline ScaleAndMinimum integer_scale(const std::byte* block, int j, int row) {
    constexpr PackedLayout at = packed_layout(type);
    const std::byte* field = block + at.scales;
    if constexpr (type == WeightType::Q2_K) {
        return {byte_at(field, j, row) & 15, byte_at(field, j, row) >> 4};
    } else if constexpr (type == WeightType::Q3_K) {
        return {q3_k_scale(field, j, row), 0};
    } else if constexpr (type == WeightType::Q4_K || type == WeightType::Q5_K) {
        return q4_k_scale(field, j, row);
    } else if constexpr (type == WeightType::Q6_K) {
        return {static_cast<int8_t>(byte_at(field, j, row)), 0};
    } else if constexpr (type == WeightType::IQ4_XS) {
        const int low = byte_at(field, j / 2, row) >> (4 * (j % 2)) & 15;
        const int high = load<uint16_t>(block + at.scales_high + 2 * row) >> (2 * j) & 3;
        return {(low | high << 4) - 32, 0};
    } else {
        return {1, 1};
    }
}

template <WeightType type>
void unpack_scales(const std::byte* block, int piece, Piece& out) {
    constexpr PackedLayout at = packed_layout(type);
    constexpr int parts = kPiece / at.sub_block;
    // The K types subtract their minimums, Q4_1 and Q5_1 add them.
    constexpr float sign = at.scales >= 0 ? -1.0f : 1.0f;
    for (int row = 0; row < kRows; ++row) {
        const float scale = float_from_half(load<uint16_t>(block + at.scale + 2 * row));
        float minimum = 0;
        if constexpr (at.minimum >= 0) {
            minimum = sign * float_from_half(load<uint16_t>(block + at.minimum + 2 * row));
        }
        for (int part = 0; part < parts; ++part) {
            const auto whole = integer_scale<type>(block, piece * parts + part, row);
            out.scales[part][row] = scale * static_cast<float>(whole.scale);
            out.minimums[part][row] = minimum * static_cast<float>(whole.minimum);
        }
    }
}

template <WeightType type>
const std::byte* unpack(const std::byte* group, int64_t piece_of_row, Piece& out) {
    constexpr int64_t pieces = layout(type).weights / kPieceWeights;
    const std::byte* block = group + piece_of_row / pieces * layout(type).bytes * kRows;
    const int piece = static_cast<int>(piece_of_row % pieces);
    unpack_codes<type>(block, piece, out);
    unpack_scales<type>(block, piece, out);
    return block;
}

// Adds the product of one piece and 32 activations to the totals of 16 rows.
template <WeightType type>
void multiply(const Piece& piece, const int16_t (&codes)[32], const WordScale& input,
              float (&totals)[kRows]) {
    constexpr PackedLayout at = packed_layout(type);
    for (int part = 0; part < kPiece / at.sub_block; ++part) {
        int32_t dots[kRows] = {};
        for (int i = part * at.sub_block; i < (part + 1) * at.sub_block; ++i) {
            for (int row = 0; row < kRows; ++row) {
                dots[row] += int32_t{piece.codes[i][row]} * int32_t{codes[i]};
            }
        }
        for (int row = 0; row < kRows; ++row) {
            const float factor = piece.scales[part][row] * input.scale;
            totals[row] = std::fma(factor, static_cast<float>(dots[row]), totals[row]);
        }
        if constexpr (at.minimum >= 0) {
            const float sum = at.sub_block == 16 ? input.scaled_sums[part] : input.scaled_sum;
            for (int row = 0; row < kRows; ++row) {
                totals[row] = std::fma(piece.minimums[part][row], sum, totals[row]);
            }
        }
    }
}

// The same with inputs of 8 bits; what is added counts in scales of the token.
template <WeightType type>
void multiply_bytes(const Piece& piece, const BytePiece& input, float (&totals)[kRows]) {
    constexpr PackedLayout at = packed_layout(type);
    const float factor = kByteFactor[input.factor];
    int32_t dots[2][kRows] = {};
    for (int i = 0; i < kPiece; ++i) {
        const int32_t code = int32_t{input.codes[i]} * (1 << input.shifts[i / 16]);
        for (int row = 0; row < kRows; ++row) {
            dots[i / at.sub_block][row] += int32_t{piece.codes[quad_position(i)][row]} * code;
        }
    }
    for (int part = 0; part < kPiece / at.sub_block; ++part) {
        // What is taken away is exact: both are few bits long.
        const float sum = at.sub_block == 32 ? input.scaled_sum
                          : part == 0        ? input.scaled_first
                                             : input.scaled_sum - input.scaled_first;
        for (int row = 0; row < kRows; ++row) {
            const float dot = static_cast<float>(dots[part][row]);
            totals[row] = std::fma(piece.scales[part][row] * factor, dot, totals[row]);
            if constexpr (at.minimum >= 0) {
                totals[row] = std::fma(piece.minimums[part][row], sum, totals[row]);
            }
        }
    }
}

template <WeightType type, bool fast>
void quantized_linear(const Matrix& weights, const Activations& input, int64_t tokens,
                      int64_t row_begin, int64_t row_end, float* out, int64_t out_stride,
                      std::byte*) {
    const int64_t columns = weights.columns, pieces = columns / kPieceWeights;
    const int64_t of_group = group_bytes(type, columns);
    float totals[kTokenTile][kRows];
    Piece piece;
    for (int64_t first = 0; first < tokens; first += kTokenTile) {
        const int64_t tile = std::min(kTokenTile, tokens - first);
        for (int64_t row = row_begin; row < row_end; row += kRows) {
            std::fill_n(&totals[0][0], tile * kRows, 0.0f);
            for (int64_t p = 0; p < pieces; ++p) {
                unpack<type>(weights.data + row / kRows * of_group, p, piece);
                for (int64_t t = 0; t < tile; ++t) {
                    const int64_t token = first + t;
                    const int64_t at =
                        (token / input.panel * pieces + p) * input.panel + token % input.panel;
                    if constexpr (fast) {
                        multiply_bytes<type>(piece, input.bytes[at], totals[t]);
                    } else {
                        multiply<type>(piece, input.words[at].codes, input.scales[at], totals[t]);
                    }
                }
            }
            const int64_t rows = std::min<int64_t>(kRows, row_end - row);
            for (int64_t t = 0; t < tile; ++t) {
                if constexpr (fast) {
                    for (float& total : totals[t]) total *= input.byte_scales[first + t];
                }
                std::copy_n(totals[t], rows, out + (first + t) * out_stride + row - row_begin);
            }
        }
    }
}

template <WeightType type>
void quantized_row(const Matrix& weights, int64_t row, float* out) {
    constexpr PackedLayout at = packed_layout(type);
    const int64_t pieces = weights.columns / kPieceWeights;
    const int64_t of_group = group_bytes(type, weights.columns);
    Piece piece;
    for (int64_t p = 0; p < pieces; ++p) {
        unpack<type>(weights.data + row / kRows * of_group, p, piece);
        for (int i = 0; i < kPiece; ++i) {
            const int part = i / at.sub_block;
            float value = piece.scales[part][row % kRows] *
                          static_cast<float>(piece.codes[quad_position(i)][row % kRows]);
            if constexpr (at.minimum >= 0) value += piece.minimums[part][row % kRows];
            out[p * kPiece + i] = value;
        }
    }
}

// Weight `column` of row `row` of a group.
template <WeightType type>
inline float read_weight(const std::byte* group, int64_t column, int64_t row) {
    if constexpr (type == WeightType::F32) {
        return load<float>(group + 4 * (column * kRows + row));
    } else if constexpr (type == WeightType::F16) {
        return float_from_half(load<uint16_t>(group + 2 * (column * kRows + row)));
    } else if constexpr (type == WeightType::I16) {
        const std::byte* part = group + column / kCodePartColumns * kCodePartBytes;
        const std::byte* pair =
            part + kCodeScaleBytes + 4 * (column % kCodePartColumns / 2 * kRows + row);
        return load<float>(part + 4 * row) *
               static_cast<float>(load<int16_t>(pair + 2 * (column % 2)));
    } else {
        const std::byte* pair = group + 4 * (column / 2 * kRows + row);
        return float_from_bfloat16(load<uint16_t>(pair + 2 * (column % 2)));
    }
}

template <WeightType type>
void float_row(const Matrix& weights, int64_t row, float* out) {
    const std::byte* group = weights.data + row / kRows * group_bytes(type, weights.columns);
    for (int64_t column = 0; column < weights.columns; ++column) {
        out[column] = read_weight<type>(group, column, row % kRows);
    }
}

// Adds the products of a part of the columns of one group to the totals of its rows.
template <WeightType type>
void add_float_part(const std::byte* group, const float* x, int64_t begin, int64_t end,
                    float (&totals)[kRows]) {
    float sums[kRows] = {};
    for (int64_t column = begin; column < end; ++column) {
        for (int row = 0; row < kRows; ++row) {
            sums[row] += read_weight<type>(group, column, row) * x[column];
        }
    }
    for (int row = 0; row < kRows; ++row) totals[row] += sums[row];
}

template <WeightType type>
void float_linear(const Matrix& weights, const Activations& input, int64_t tokens,
                  int64_t row_begin, int64_t row_end, float* out, int64_t out_stride, std::byte*) {
    const int64_t columns = weights.columns;
    for (int64_t row = row_begin; row < row_end; row += kRows) {
        const std::byte* group = weights.data + row / kRows * group_bytes(type, columns);
        for (int64_t token = 0; token < tokens; ++token) {
            float totals[kRows] = {};
            for (int64_t begin = 0; begin < columns; begin += kFloatPartColumns) {
                add_float_part<type>(group, input.values + token * columns, begin,
                                     std::min(columns, begin + kFloatPartColumns), totals);
            }
            std::copy_n(totals, std::min<int64_t>(kRows, row_end - row),
                        out + token * out_stride + row - row_begin);
        }
    }
}

// Adds the products of a run of one group to the totals of its rows. `pairs` and `scales` are of
// the weights, [pairs][16][2] and [16].
void add_run(const std::byte* pairs, const std::byte* scales, const int16_t* codes, int64_t columns,
             float scale, float (&totals)[kRows]) {
    int32_t dots[kRows] = {};
    for (int64_t i = 0; i < columns; ++i) {
        const std::byte* at = pairs + i / 2 * 4 * kRows + i % 2 * 2;
        for (int row = 0; row < kRows; ++row) {
            dots[row] += int32_t{load<int16_t>(at + 4 * row)} * int32_t{codes[i]};
        }
    }
    for (int row = 0; row < kRows; ++row) {
        totals[row] += load<float>(scales + 4 * row) * scale * static_cast<float>(dots[row]);
    }
}

void code_linear(const Matrix& weights, const Activations& input, int64_t tokens, int64_t row_begin,
                 int64_t row_end, float* out, int64_t out_stride, std::byte*) {
    const int64_t columns = weights.columns;
    for (int64_t row = row_begin; row < row_end; row += kRows) {
        const std::byte* group = weights.data + row / kRows * group_bytes(WeightType::I16, columns);
        for (int64_t token = 0; token < tokens; ++token) {
            float totals[kRows] = {};
            for (int64_t begin = 0; begin < columns; begin += kCodeRunColumns) {
                const int64_t part = begin / kCodePartColumns, in_part = begin % kCodePartColumns;
                const int64_t at = part * input.code_stride + token;
                const std::byte* scales = group + part * kCodePartBytes;
                add_run(scales + kCodeScaleBytes + in_part / 2 * 4 * kRows, scales,
                        input.codes + at * kCodePartColumns + in_part,
                        std::min(kCodeRunColumns, columns - begin),
                        input.code_scales[at * kCodePartRuns + in_part / kCodeRunColumns], totals);
            }
            std::copy_n(totals, std::min<int64_t>(kRows, row_end - row),
                        out + token * out_stride + row - row_begin);
        }
    }
}

}  // namespace

Kernels::Linear linear(WeightType type) {
    switch (type) {
#define X(name, weights, bytes)                               \
    case WeightType::name:                                    \
        if constexpr (WeightType::name == WeightType::I16) {  \
            return code_linear;                               \
        } else if constexpr (is_float(WeightType::name)) {    \
            return float_linear<WeightType::name>;            \
        } else {                                              \
            return quantized_linear<WeightType::name, false>; \
        }
        SMOLRUN_WEIGHT_TYPES(X)
#undef X
        default:
            return nullptr;
    }
}

Kernels::Linear fast_linear(WeightType type) {
    switch (type) {
#define X(name, weights, bytes)                              \
    case WeightType::name:                                   \
        if constexpr (is_float(WeightType::name)) {          \
            return nullptr;                                  \
        } else {                                             \
            return quantized_linear<WeightType::name, true>; \
        }
        SMOLRUN_WEIGHT_TYPES(X)
#undef X
        default:
            return nullptr;
    }
}

Kernels::Dequantize dequantize(WeightType type) {
    switch (type) {
#define X(name, weights, bytes)                     \
    case WeightType::name:                          \
        if constexpr (is_float(WeightType::name)) { \
            return float_row<WeightType::name>;     \
        } else {                                    \
            return quantized_row<WeightType::name>; \
        }
        SMOLRUN_WEIGHT_TYPES(X)
#undef X
        default:
            return nullptr;
    }
}

}  // namespace smolrun::scalar
