// The weight types, and how their blocks are laid out in memory for the kernels.
//
// Weights are repacked once at load, bit for bit the same size but for I16. Sixteen rows make a
// group (rows past the end are zero), and a group holds one *packed block* per block of columns:
//
//     [row group][block along the row][packed block of 16 rows]
//
// so that a kernel streams straight through memory, each vector lane owning one row, and no
// horizontal sum is ever needed.
//
// Of float types a block is one column: F32 and F16 are [row group][column][16]. BF16 has two, so
// that a 32-bit word holds neighbours, the first one in its low half: [row group][pair][16][2],
// with zeros after an odd number of columns.
//
// I16 is in no file: codes of 16 bits to which F16 and BF16 are rounded where activations are fast
// (kernels.h). A row has a scale for each *part* of 512 columns, of which the last one may have
// fewer: weight = scale * code. Scales are float, codes in pairs as of BF16:
//
//     [row group][part]: scales[16], codes[pair][16][2]
//
// In a packed block of a quantized type a *plane* holds one bit field of the codes as 32-bit words,
// one word per row: words[v][16]. A *quad* is four consecutive weights of each row: after
// unpacking, byte j of the row's word is the unsigned code of weight 4*quad+j.
//
//   8-bit plane  (32 weights: 8 words a row)  byte j of word v = weight 4v+j
//   4-bit plane  (32 weights: 4 words a row)  byte j of word v: low nibble = weight 8v+j,
//                                             high nibble = weight 8v+4+j
//   2-bit plane  (32 weights: 2 words a row)  byte j of word v: bits 2t..2t+1 = weight 16v+4t+j
//   1-bit plane  (32 weights: 1 word a row)   byte j: bit t = weight 4t+j
//
// Blocks of 256 weights hold eight 32-weight pieces of each plane, one after the other. Then the
// scales, each field as field[16 rows] (16-bit) or field[n][16 rows] (bytes in file order):
//
//   Q4_0, IQ4_NL  4-bit plane, d[16]
//   Q4_1          4-bit plane, d[16], m[16]
//   Q5_0          4-bit plane, 1-bit plane, d[16]
//   Q5_1          4-bit plane, 1-bit plane, d[16], m[16]
//   Q8_0          8-bit plane of code+128, d[16]
//   Q2_K          2-bit plane x8, scales[16][16], d[16], dmin[16]
//   Q3_K          2-bit plane x8, 1-bit plane x8, scales[12][16], d[16]
//   Q4_K          4-bit plane x8, scales[12][16], d[16], dmin[16]
//   Q5_K          4-bit plane x8, 1-bit plane x8, scales[12][16], d[16], dmin[16]
//   Q6_K          4-bit plane x8, 2-bit plane x8, scales[16][16] (int8), d[16]
//   IQ4_XS        4-bit plane x8, scales_l[4][16], scales_h[16] (16-bit), d[16]
#pragma once

#include <cstddef>
#include <cstdint>

namespace smolrun {

inline constexpr int64_t kGroupRows = 16;

// One line per type: name, weights in a block, bytes of a block.
#define SMOLRUN_WEIGHT_TYPES(X) \
    X(F32, 1, 4)                \
    X(F16, 1, 2)                \
    X(BF16, 1, 2)               \
    X(Q4_0, 32, 18)             \
    X(Q4_1, 32, 20)             \
    X(Q5_0, 32, 22)             \
    X(Q5_1, 32, 24)             \
    X(Q8_0, 32, 34)             \
    X(Q2_K, 256, 84)            \
    X(Q3_K, 256, 110)           \
    X(Q4_K, 256, 144)           \
    X(Q5_K, 256, 176)           \
    X(Q6_K, 256, 210)           \
    X(IQ4_NL, 32, 18)           \
    X(IQ4_XS, 256, 136)         \
    X(I16, 1, 2)

enum class WeightType : int {
#define X(name, weights, bytes) name,
    SMOLRUN_WEIGHT_TYPES(X)
#undef X
        count
};
inline constexpr int kWeightTypes = static_cast<int>(WeightType::count);
inline constexpr int kFileTypes = static_cast<int>(WeightType::I16);  // the first ones

struct BlockLayout {
    const char* name;
    int64_t weights;  // in a block
    int64_t bytes;    // of a block, one row
};
inline constexpr BlockLayout kBlockLayouts[kWeightTypes] = {
#define X(name, weights, bytes) {#name, weights, bytes},
    SMOLRUN_WEIGHT_TYPES(X)
#undef X
};
inline constexpr const BlockLayout& layout(WeightType type) {
    return kBlockLayouts[static_cast<int>(type)];
}
// Of any number of columns, with inputs that are not rounded to pieces.
inline constexpr bool is_float(WeightType type) { return layout(type).weights == 1; }

// A weight ready for the kernels. Owns nothing.
struct Matrix {
    WeightType type;
    int64_t rows;           // output features
    int64_t columns;        // input features
    const std::byte* data;  // [groups][blocks][packed block], or parts of I16
};

}  // namespace smolrun
