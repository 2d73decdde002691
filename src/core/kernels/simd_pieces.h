// Unpacking of quantized weights: from a packed block (blocks.h) to pairs of 16-bit codes, one row
// in each lane, and the scales of a piece of 32 weights.
#pragma once

#include "kernels/simd_common.h"
#include "packed.h"

namespace smolrun {
namespace {

constexpr int kPieceQuads = 8;
constexpr int kPieceWords = 16;                 // an even and an odd word for each quad
constexpr int64_t kWordBytes = 4 * kGroupRows;  // one word of each row

template <WeightType type>
struct Format {
    static constexpr PackedLayout at = packed_layout(type);
    static constexpr int block_pieces = static_cast<int>(layout(type).weights / kPieceWeights);
    static constexpr int64_t block_bytes = layout(type).bytes * kGroupRows;
    // Two scales in a piece. They are integers times a common float, and go into the codes.
    static constexpr bool sub_blocks = at.sub_block == 16;
    // With them the sum over 32 weights might not fit 32 bits: two sums of 16.
    static constexpr bool two_sums = type == WeightType::Q6_K;
    static constexpr int minimums = at.minimum < 0 ? 0 : sub_blocks ? 2 : 1;
    // What unpacked codes are too large by; the lookup table is shifted to be unsigned.
    static constexpr int offset = at.lookup ? 128 : at.offset;
};

// Weights 0 and 2, and 1 and 3, of a quad: 16-bit codes, not signed yet.
struct Pairs {
    Words even, odd;
};

// Bits `bits` wide from bit `bit` of every byte, moved to bit `to`.
template <int bits, int bit, int to>
SMOLRUN_INLINE Words read_bytes(Words words) {
    constexpr uint32_t mask = ((1u << bits) - 1) << to;
    return bit_and(shift_right<bit - to>(words),
                   broadcast_word(static_cast<int32_t>(mask * 0x01010101u)));
}

// Where a quad stands in a plane: which word of a row, which bit of its bytes.
template <int bits, int quad>
struct Place {
    static constexpr int quads_in_word = 8 / bits;
    static constexpr int64_t word = quad / quads_in_word * kWordBytes;
    static constexpr int bit = bits * (quad % quads_in_word);
};

SMOLRUN_INLINE Pairs widen_bytes(Words bytes) {
    return {bit_and(bytes, broadcast_word(0x00ff00ff)), shift_right_16<8>(bytes)};
}

constexpr int8_t unsigned_value(int i) {
    return static_cast<int8_t>(static_cast<uint8_t>(kNonlinearValues[i] + 128));
}
constexpr int8_t kUnsignedValues[16] = {
    unsigned_value(0),  unsigned_value(1),  unsigned_value(2),  unsigned_value(3),
    unsigned_value(4),  unsigned_value(5),  unsigned_value(6),  unsigned_value(7),
    unsigned_value(8),  unsigned_value(9),  unsigned_value(10), unsigned_value(11),
    unsigned_value(12), unsigned_value(13), unsigned_value(14), unsigned_value(15)};

// A quad of a piece as unsigned bytes, `up` bits to the left; the planes are those of the piece,
// from the first row of the lanes on.
template <WeightType type, int quad, int up = 0>
SMOLRUN_INLINE Words read_quad(const std::byte* low, const std::byte* high) {
    constexpr PackedLayout at = Format<type>::at;
    using Low = Place<at.low_bits, quad>;
    const Words words = load_words(low + Low::word);
    if constexpr (at.low_bits == 8) {
        return words;
    } else {
        const Words lower = read_bytes<at.low_bits, Low::bit, up>(words);
        if constexpr (at.high_bits != 0) {
            using High = Place<at.high_bits, quad>;
            const Words from = load_words(high + High::word);
            return bit_or(lower, read_bytes<at.high_bits, High::bit, at.low_bits + up>(from));
        } else if constexpr (at.lookup) {
            return look_up(kUnsignedValues, lower);
        } else {
            return lower;
        }
    }
}

// The same as pairs.
template <WeightType type, int quad>
SMOLRUN_INLINE Pairs read_codes(const std::byte* low, const std::byte* high) {
    constexpr PackedLayout at = Format<type>::at;
    if constexpr (at.high_bits != 0 || at.lookup) {
        return widen_bytes(read_quad<type, quad>(low, high));
    } else {
        // One plane: straight to pairs, where the topmost bits need no mask.
        using Low = Place<at.low_bits, quad>;
        const Words words = load_words(low + Low::word);
        const Words mask = broadcast_word(((1 << at.low_bits) - 1) * 0x00010001);
        const Words even = bit_and(shift_right<Low::bit>(words), mask);
        if constexpr (Low::bit + at.low_bits == 8) {
            return {even, shift_right_16<Low::bit + 8>(words)};
        } else {
            return {even, bit_and(shift_right<Low::bit + 8>(words), mask)};
        }
    }
}

// The planes of a piece, from row `lane` of the group on: 32 weights of `bits` bits take 4*bits
// bytes a row.
template <WeightType type>
SMOLRUN_INLINE const std::byte* low_plane(const std::byte* block, int piece, int lane) {
    constexpr PackedLayout at = Format<type>::at;
    return block + at.low + piece * at.low_bits * kWordBytes + 4 * lane;
}
template <WeightType type>
SMOLRUN_INLINE const std::byte* high_plane(const std::byte* block, int piece, int lane) {
    constexpr PackedLayout at = Format<type>::at;
    return block + at.high + piece * at.high_bits * kWordBytes + 4 * lane;
}

// Where weights are asked for ahead: in which cache, and how many bytes, or a little more.
//
// For many tokens in the second level: inputs come from there, and must not wait behind weights. So
// too for one token and a brief stretch of weights, much of which was asked for before its phase.
// In an extended one the first level serves it better where blocks are small, and less far ahead
// where a piece is read in several places.
enum class Stretch { brief, extended };
struct PrefetchDistance {
    int64_t bytes;
    _mm_hint hint;
};
template <WeightType type, Stretch stretch>
consteval PrefetchDistance prefetch_distance() {
    using F = Format<type>;
    const bool several_places = F::sub_blocks || (F::block_pieces > 1 && F::at.high_bits != 0);
    if (stretch == Stretch::extended && several_places) return {4096, _MM_HINT_T1};
    if (stretch == Stretch::extended && F::block_pieces == 1) return {4096, _MM_HINT_T0};
    return {8192, _MM_HINT_T1};
}

// Of the rows of a call for one token.
constexpr int64_t kExtendedBytes = 96 * 1024;
template <WeightType type>
SMOLRUN_INLINE bool is_extended(int64_t columns, int64_t rows) {
    return kExtendedNear &&
           rows * (columns / layout(type).weights) * layout(type).bytes >= kExtendedBytes;
}

// Asks for weights some way ahead of a piece. The scales of a block of several pieces stand at its
// end, and are needed first: so they are asked for first, and the rest a part with each piece.
template <WeightType type, Stretch stretch>
SMOLRUN_INLINE void prefetch_ahead(const std::byte* block, int piece) {
    using F = Format<type>;
    constexpr PrefetchDistance ahead = prefetch_distance<type, stretch>();
    constexpr int64_t blocks = (ahead.bytes + F::block_bytes - 1) / F::block_bytes;
    constexpr int64_t part = F::block_bytes / F::block_pieces;
    const int64_t first = (piece + F::block_pieces - 1) % F::block_pieces * part;
    prefetch<ahead.hint>(block + blocks * F::block_bytes + first, part);
}

// Calls work.operator()<quad>(codes) for some quads of a piece. `lane`: the first row in the group.
template <WeightType type, int quad = 0, int end = kPieceQuads, class Work>
SMOLRUN_INLINE void each_quad(const std::byte* block, int piece, int lane, Work& work) {
    const std::byte* low = low_plane<type>(block, piece, lane);
    const std::byte* high = high_plane<type>(block, piece, lane);
    work.template operator()<quad>(read_codes<type, quad>(low, high));
    if constexpr (quad + 1 < end) each_quad<type, quad + 1, end>(block, piece, lane, work);
}

// weight = scale * sub_scale * code + minimum; sub_scale only where a piece has two.
struct Scales {
    Floats scale;
    Words sub_scale[2];
    Floats minimum[2];
};

// Six-bit scale and minimum of sub-block j of Q4_K and Q5_K.
struct ScaleAndMinimum {
    Words scale, minimum;
};
SMOLRUN_INLINE ScaleAndMinimum read_q4_k_scale(const std::byte* field, int j) {
    const Words six = broadcast_word(63), four = broadcast_word(15), top = broadcast_word(0x30);
    if (j < 4) {
        return {bit_and(widen_u8(field + j * kGroupRows), six),
                bit_and(widen_u8(field + (j + 4) * kGroupRows), six)};
    }
    const Words both = widen_u8(field + (j + 4) * kGroupRows);
    const Words scale_top = shift_right<2>(widen_u8(field + (j - 4) * kGroupRows));
    const Words minimum_top = shift_right<2>(widen_u8(field + j * kGroupRows));
    return {bit_or(bit_and(both, four), bit_and(scale_top, top)),
            bit_or(shift_right<4>(both), bit_and(minimum_top, top))};
}

// Scale of sub-block j (of 16 weights) of Q3_K: -32..31.
SMOLRUN_INLINE Words read_q3_k_scale(const std::byte* field, int j) {
    const Words low = shift_right_by(widen_u8(field + j % 8 * kGroupRows), j < 8 ? 0 : 4);
    const Words high = shift_right_by(widen_u8(field + (8 + j % 4) * kGroupRows), 2 * (j / 4));
    const Words six =
        bit_or(bit_and(low, broadcast_word(15)), shift_right<-4>(bit_and(high, broadcast_word(3))));
    return sub(six, broadcast_word(32));
}

template <WeightType type>
SMOLRUN_INLINE Scales read_scales(const std::byte* block, int piece, int lane) {
    constexpr PackedLayout at = Format<type>::at;
    const std::byte* const field = block + at.scales + lane;
    Scales scales{load_f16(block + at.scale + 2 * lane), {}, {}};
    Floats minimum{};
    if constexpr (at.minimum >= 0) minimum = load_f16(block + at.minimum + 2 * lane);
    if constexpr (type == WeightType::Q2_K) {
        for (int part = 0; part < 2; ++part) {
            const Words both = widen_u8(field + (2 * piece + part) * kGroupRows);
            scales.sub_scale[part] = bit_and(both, broadcast_word(15));
            scales.minimum[part] =
                mul(sub(broadcast(0.0f), minimum), to_floats(shift_right<4>(both)));
        }
    } else if constexpr (type == WeightType::Q3_K) {
        scales.sub_scale[0] = read_q3_k_scale(field, 2 * piece);
        scales.sub_scale[1] = read_q3_k_scale(field, 2 * piece + 1);
    } else if constexpr (type == WeightType::Q6_K) {
        scales.sub_scale[0] = widen_i8(field + 2 * piece * kGroupRows);
        scales.sub_scale[1] = widen_i8(field + (2 * piece + 1) * kGroupRows);
    } else if constexpr (type == WeightType::Q4_K || type == WeightType::Q5_K) {
        const ScaleAndMinimum whole = read_q4_k_scale(field, piece);
        scales.scale = mul(scales.scale, to_floats(whole.scale));
        scales.minimum[0] = mul(sub(broadcast(0.0f), minimum), to_floats(whole.minimum));
    } else if constexpr (type == WeightType::IQ4_XS) {
        const Words low = shift_right_by(widen_u8(field + piece / 2 * kGroupRows), 4 * (piece % 2));
        const Words high = shift_right_by(widen_u16(block + at.scales_high + 2 * lane), 2 * piece);
        const Words six = bit_or(bit_and(low, broadcast_word(15)),
                                 shift_right<-4>(bit_and(high, broadcast_word(3))));
        scales.scale = mul(scales.scale, to_floats(sub(six, broadcast_word(32))));
    } else if constexpr (at.minimum >= 0) {
        scales.minimum[0] = minimum;
    }
    return scales;
}

// Signed codes of a quad.
template <WeightType type>
SMOLRUN_INLINE Pairs without_offset(Pairs codes) {
    if constexpr (Format<type>::offset == 0) return codes;
    const Words offset = broadcast_word(Format<type>::offset << 16 | Format<type>::offset);
    return {sub_16(codes.even, offset), sub_16(codes.odd, offset)};
}

}  // namespace
}  // namespace smolrun
