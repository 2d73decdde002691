// One block of one row is turned into the words and fields of its row, sixteen rows apart from each
// other in memory: a change of bit order, no arithmetic. Only codes of F16 and BF16 are rounded.
#include "pack.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "dispatch.h"
#include "kernels/numbers.h"
#include "packed.h"

namespace smolrun {
namespace {

// Where one row of a packed block writes.
struct RowWriter {
    std::byte* block;
    int64_t row;

    void word(int64_t plane, int64_t index, uint32_t bits) const {
        std::memcpy(block + plane + 4 * (index * kGroupRows + row), &bits, sizeof bits);
    }
    // `count` bytes, each to field[n][row].
    void bytes(int64_t field, const std::byte* from, int64_t count) const {
        for (int64_t n = 0; n < count; ++n) block[field + n * kGroupRows + row] = from[n];
    }
    void half(int64_t field, const std::byte* from) const {
        std::memcpy(block + field + 2 * row, from, 2);
    }
};

// Four-bit codes of 8 weights, one in the low half of each byte, to a word of the 4-bit plane.
inline uint32_t join_nibbles(uint64_t codes) { return static_cast<uint32_t>(codes | codes >> 28); }

constexpr uint64_t kLowNibbles = 0x0f0f0f0f0f0f0f0f;

// 32 bytes that hold two pieces, one in the low nibbles and one in the high ones; writes one.
inline void pack_nibble_piece(const RowWriter& to, int64_t plane, int64_t piece,
                              const std::byte* from, int shift) {
    for (int64_t v = 0; v < 4; ++v) {
        const uint64_t codes = load<uint64_t>(from + 8 * v) >> shift & kLowNibbles;
        to.word(plane, 4 * piece + v, join_nibbles(codes));
    }
}

// 16 bytes that hold one piece: weights 0..15 in the low nibbles, 16..31 in the high ones.
inline void pack_nibble_halves(const RowWriter& to, int64_t plane, int64_t piece,
                               const std::byte* from) {
    for (int64_t v = 0; v < 2; ++v) {
        const uint64_t both = load<uint64_t>(from + 8 * v);
        to.word(plane, 4 * piece + v, join_nibbles(both & kLowNibbles));
        to.word(plane, 4 * piece + v + 2, join_nibbles(both >> 4 & kLowNibbles));
    }
}

// For a byte of bits of weights 0..7: bits of weights j and 4+j, in bits 0 and 1 of byte j.
constexpr std::array<uint32_t, 256> spread_bits() {
    std::array<uint32_t, 256> table{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        for (uint32_t j = 0; j < 4; ++j) {
            table[byte] |= ((byte >> j & 1) | (byte >> (4 + j) & 1) << 1) << (8 * j);
        }
    }
    return table;
}
constexpr std::array<uint32_t, 256> kSpreadBits = spread_bits();

// A word whose bit w belongs to weight w, to the 1-bit plane.
inline void pack_fifth_bits(const RowWriter& to, int64_t plane, uint32_t bits) {
    to.word(plane, 0,
            kSpreadBits[bits & 255] | kSpreadBits[bits >> 8 & 255] << 2 |
                kSpreadBits[bits >> 16 & 255] << 4 | kSpreadBits[bits >> 24] << 6);
}

// 32 bytes whose bit j of byte l belongs to weight 32j+l, to eight 1-bit planes.
inline void pack_bit_planes(const RowWriter& to, int64_t plane, const std::byte* from) {
    uint32_t pieces[8] = {};
    for (int t = 0; t < 8; ++t) {
        const uint32_t four = load<uint32_t>(from + 4 * t);
        for (int j = 0; j < 8; ++j) pieces[j] |= (four >> j & 0x01010101u) << t;
    }
    for (int j = 0; j < 8; ++j) to.word(plane, j, pieces[j]);
}

// 64 bytes: half h of 128 weights owns 32, whose bits 2s..2s+1 of byte l belong to weight 32s+l.
inline void pack_two_bit_planes(const RowWriter& to, int64_t plane, const std::byte* from) {
    for (int half = 0; half < 2; ++half) {
        for (int v = 0; v < 2; ++v) {
            uint32_t pieces[4] = {};
            for (int t = 0; t < 4; ++t) {
                const uint32_t four = load<uint32_t>(from + 32 * half + 16 * v + 4 * t);
                for (int s = 0; s < 4; ++s) pieces[s] |= (four >> (2 * s) & 0x03030303u) << (2 * t);
            }
            for (int s = 0; s < 4; ++s) to.word(plane, 2 * (4 * half + s) + v, pieces[s]);
        }
    }
}

// One block of one row, in the field order of the file (the GGUF specification); two weights of
// BF16.
template <WeightType type>
inline void pack_block(const std::byte* from, const RowWriter& to) {
    constexpr PackedLayout at = packed_layout(type);
    if constexpr (type == WeightType::F32 || type == WeightType::BF16) {
        to.word(0, 0, load<uint32_t>(from));
    } else if constexpr (type == WeightType::F16) {
        to.half(0, from);
    } else if constexpr (type == WeightType::Q4_0 || type == WeightType::IQ4_NL) {
        to.half(at.scale, from);
        pack_nibble_halves(to, at.low, 0, from + 2);
    } else if constexpr (type == WeightType::Q4_1) {
        to.half(at.scale, from);
        to.half(at.minimum, from + 2);
        pack_nibble_halves(to, at.low, 0, from + 4);
    } else if constexpr (type == WeightType::Q5_0) {
        to.half(at.scale, from);
        pack_fifth_bits(to, at.high, load<uint32_t>(from + 2));
        pack_nibble_halves(to, at.low, 0, from + 6);
    } else if constexpr (type == WeightType::Q5_1) {
        to.half(at.scale, from);
        to.half(at.minimum, from + 2);
        pack_fifth_bits(to, at.high, load<uint32_t>(from + 4));
        pack_nibble_halves(to, at.low, 0, from + 8);
    } else if constexpr (type == WeightType::Q8_0) {
        to.half(at.scale, from);
        for (int64_t v = 0; v < 8; ++v) {
            to.word(at.low, v, load<uint32_t>(from + 2 + 4 * v) ^ 0x80808080u);
        }
    } else if constexpr (type == WeightType::Q2_K) {
        to.bytes(at.scales, from, 16);
        pack_two_bit_planes(to, at.low, from + 16);
        to.half(at.scale, from + 80);
        to.half(at.minimum, from + 82);
    } else if constexpr (type == WeightType::Q3_K) {
        pack_bit_planes(to, at.high, from);
        pack_two_bit_planes(to, at.low, from + 32);
        to.bytes(at.scales, from + 96, 12);
        to.half(at.scale, from + 108);
    } else if constexpr (type == WeightType::Q4_K || type == WeightType::Q5_K) {
        constexpr int64_t codes = type == WeightType::Q4_K ? 16 : 48;
        to.half(at.scale, from);
        to.half(at.minimum, from + 2);
        to.bytes(at.scales, from + 4, 12);
        if constexpr (type == WeightType::Q5_K) pack_bit_planes(to, at.high, from + 16);
        for (int64_t piece = 0; piece < 8; ++piece) {
            pack_nibble_piece(to, at.low, piece, from + codes + piece / 2 * 32,
                              piece % 2 == 0 ? 0 : 4);
        }
    } else if constexpr (type == WeightType::Q6_K) {
        for (int64_t piece = 0; piece < 8; ++piece) {
            pack_nibble_piece(to, at.low, piece, from + piece / 4 * 64 + piece % 2 * 32,
                              piece % 4 < 2 ? 0 : 4);
        }
        pack_two_bit_planes(to, at.high, from + 128);
        to.bytes(at.scales, from + 192, 16);
        to.half(at.scale, from + 208);
    } else if constexpr (type == WeightType::IQ4_XS) {
        to.half(at.scale, from);
        to.half(at.scales_high, from + 2);
        to.bytes(at.scales, from + 4, 4);
        for (int64_t piece = 0; piece < 8; ++piece) {
            pack_nibble_halves(to, at.low, piece, from + 8 + 16 * piece);
        }
    }
}

// The row of the file that holds row `row` of the packed weight. In a head of D rows, the file's
// row 2i+j is row j*D/2+i.
int64_t file_row(const FileRows& source, int64_t row) {
    const int64_t head_dim = source.interleaved_head_dim;
    if (head_dim == 0) return row;
    const int64_t half = head_dim / 2, in_head = row % head_dim;
    return row - in_head + in_head % half * 2 + in_head / half;
}

// The rows of a group that there are, and where it goes; what it has no rows for is zero.
struct Group {
    const std::byte* rows[kGroupRows];
    int64_t count;
    std::byte* out;

    Group(const FileRows& source, int64_t group, std::byte* weight)
        : count(std::min(kGroupRows, source.rows - group * kGroupRows)) {
        const int64_t bytes = row_bytes(source.type, source.columns);
        for (int64_t row = 0; row < count; ++row) {
            rows[row] = source.data + file_row(source, group * kGroupRows + row) * bytes;
        }
        const int64_t size = group_bytes(source.packed_type(), source.columns);
        out = weight + group * size;
        if (count < kGroupRows) std::memset(out, 0, static_cast<std::size_t>(size));
    }
};

void pack_codes(const FileRows& source, const Group& group) {
    // All instruction sets give the same codes: the fastest one makes them.
    static const Kernels& kernels = kernels_of(supported_isas().back());
    const auto encode = source.type == WeightType::F16 ? kernels.encode_f16 : kernels.encode_bf16;
    std::byte* part = group.out;
    for (int64_t column = 0; column < source.columns; column += kCodePartColumns) {
        const int64_t columns = std::min(kCodePartColumns, source.columns - column);
        const int64_t pairs = (columns + 1) / 2;
        for (int64_t row = 0; row < group.count; ++row) {
            int16_t codes[kCodePartColumns];
            const float scale =
                encode(group.rows[row] + row_bytes(source.type, column), columns, codes);
            std::memcpy(part + 4 * row, &scale, sizeof scale);
            const RowWriter to{part + kCodeScaleBytes, row};
            for (int64_t pair = 0; pair < pairs; ++pair) {
                uint32_t both;
                std::memcpy(&both, codes + 2 * pair, sizeof both);
                to.word(0, pair, both);
            }
        }
        part += kCodeScaleBytes + 4 * kGroupRows * pairs;
    }
}

template <WeightType type>
void pack_group(const FileRows& source, int64_t index, std::byte* out) {
    const Group group(source, index, out);
    if (source.packed_type() == WeightType::I16) {
        pack_codes(source, group);
        return;
    }
    const int64_t bytes = row_bytes(type, source.columns);
    const auto& [rows, count, begin] = group;
    std::byte* block = begin;
    constexpr int64_t block_bytes = type == WeightType::BF16 ? 4 : layout(type).bytes;
    for (int64_t at = 0; at + block_bytes <= bytes; at += block_bytes) {
        for (int64_t row = 0; row < count; ++row) {
            pack_block<type>(rows[row] + at, RowWriter{block, row});
        }
        block += kGroupRows * block_bytes;
    }
    if (type == WeightType::BF16 && source.columns % 2 != 0) {
        for (int64_t row = 0; row < count; ++row) {
            RowWriter{block, row}.word(0, 0, load<uint16_t>(rows[row] + bytes - 2));
        }
    }
}

}  // namespace

void pack(const FileRows& source, int64_t group_begin, int64_t group_end, std::byte* out) {
    for (int64_t group = group_begin; group < group_end; ++group) {
        switch (source.type) {
#define X(name, weights, bytes)                           \
    case WeightType::name:                                \
        pack_group<WeightType::name>(source, group, out); \
        break;
            SMOLRUN_WEIGHT_TYPES(X)
#undef X
            default:
                break;
        }
    }
}

}  // namespace smolrun
