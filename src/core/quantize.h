// From float rows to the blocks of a weight type, as files store them.
//
// One table of functions for each instruction set, filled in kernels/*_quantize.cpp. All give the
// same bytes. The searches look for the scales and minimums that leave the least squared error,
// weighted by the importance of the columns where one is given (kernels/quantize_*.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "blocks.h"

namespace smolrun {

struct QuantizeRows {
    const float* x;           // [rows][columns], finite
    const float* importance;  // [columns], at least 0, or null: all alike
    int64_t rows;
    int64_t columns;  // a multiple of the weights in a block
    std::byte* out;   // [rows][row bytes]
};

// False where a scale, or a value of a float type, came out too large for the type.
using Quantize = bool (*)(const QuantizeRows& rows);

struct Quantizers {
    const char* name;
    Quantize quantize[kWeightTypes];
};

extern const Quantizers kScalarQuantizers;
extern const Quantizers kAvx2Quantizers;    // only in x86 builds
extern const Quantizers kAvx512Quantizers;  // only in x86 builds

struct FileRows;

struct QuantizeResult {
    enum Kind { done, not_finite, too_large } kind;
    int64_t row;     // where it went wrong; of too_large the first of a few rows
    int64_t column;  // of not_finite
};

// Rows of a float type, in their order, into blocks of `type`.
// std::invalid_argument for an instruction set that this CPU does not run.
QuantizeResult quantize_rows(std::string_view isa, const FileRows& source, const float* importance,
                             WeightType type, std::byte* out);

}  // namespace smolrun
