// From the rows of a file to the layout of blocks.h, once at load.
#pragma once

#include <cstddef>
#include <cstdint>

#include "blocks.h"
#include "packed.h"

namespace smolrun {

// A weight as its file has it: [rows][row bytes], at any alignment.
struct FileRows {
    WeightType type;
    int64_t rows;
    int64_t columns;  // a multiple of the weights in a block
    const std::byte* data;
    int64_t interleaved_head_dim;  // even, divides `rows`; 0: rows stand in their order
    bool as_codes;                 // F16 and BF16 become I16

    WeightType packed_type() const {
        const bool short_float = type == WeightType::F16 || type == WeightType::BF16;
        return as_codes && short_float ? WeightType::I16 : type;
    }
};

// Sixteen-row groups of a weight; the last may be part empty.
constexpr int64_t row_groups(int64_t rows) { return (rows + kGroupRows - 1) / kGroupRows; }

constexpr int64_t row_bytes(WeightType type, int64_t columns) {
    return columns / layout(type).weights * layout(type).bytes;
}

// Bytes of a packed group of rows.
constexpr int64_t group_bytes(WeightType type, int64_t columns) {
    const bool pairs = type == WeightType::BF16 || type == WeightType::I16;
    const int64_t codes = kGroupRows * row_bytes(type, pairs ? columns + columns % 2 : columns);
    if (type != WeightType::I16) return codes;
    return codes + (columns + kCodePartColumns - 1) / kCodePartColumns * kCodeScaleBytes;
}

constexpr int64_t packed_bytes(WeightType type, int64_t rows, int64_t columns) {
    return row_groups(rows) * group_bytes(type, columns);
}

// Writes the groups [group_begin, group_end) of the packed weight that starts at `out`. Threads may
// share a weight by its groups.
void pack(const FileRows& source, int64_t group_begin, int64_t group_end, std::byte* out);

}  // namespace smolrun
