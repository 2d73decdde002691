// From the rows of a file to the layout of blocks.h, once at load.
#pragma once

#include <cstddef>
#include <cstdint>

#include "blocks.h"

namespace smolrun {

// A weight as its file has it: [rows][row bytes], at any alignment.
struct FileRows {
    WeightType type;
    int64_t rows;
    int64_t columns;  // a multiple of the weights in a block
    const std::byte* data;
    int64_t interleaved_head_dim;  // even, divides `rows`; 0: rows stand in their order
};

// Sixteen-row groups of a weight; the last may be part empty.
constexpr int64_t row_groups(int64_t rows) { return (rows + kGroupRows - 1) / kGroupRows; }

constexpr int64_t row_bytes(WeightType type, int64_t columns) {
    return columns / layout(type).weights * layout(type).bytes;
}

// Bytes of a packed group of rows.
constexpr int64_t group_bytes(WeightType type, int64_t columns) {
    const int64_t whole = type == WeightType::BF16 ? columns + columns % 2 : columns;
    return kGroupRows * row_bytes(type, whole);
}

constexpr int64_t packed_bytes(WeightType type, int64_t rows, int64_t columns) {
    return row_groups(rows) * group_bytes(type, columns);
}

// Writes the groups [group_begin, group_end) of the packed weight that starts at `out`. Threads may
// share a weight by its groups.
void pack(const FileRows& source, int64_t group_begin, int64_t group_end, std::byte* out);

}  // namespace smolrun
