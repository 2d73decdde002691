#include "quantize.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "kernels/numbers.h"
#include "pack.h"

namespace smolrun {
namespace {

// Floats that are quantized at a time: they stay in the first-level cache.
constexpr int64_t kChunkFloats = 4096;

const Quantizers& quantizers_of(std::string_view isa) {
    const std::string_view name = kernels_of(isa).name;
#ifdef SMOLRUN_X86
    for (const Quantizers* found : {&kAvx2Quantizers, &kAvx512Quantizers}) {
        if (name == found->name) return *found;
    }
#endif
    return kScalarQuantizers;
}

bool is_finite(float x) { return (std::bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

bool all_finite(const float* x, int64_t count) {
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) finite &= is_finite(x[i]);
    return finite;
}

void read_floats(WeightType type, const std::byte* from, int64_t count, float* out) {
    if (type == WeightType::F32) {
        std::memcpy(out, from, static_cast<std::size_t>(count) * sizeof(float));
    } else if (type == WeightType::F16) {
        for (int64_t i = 0; i < count; ++i) out[i] = float_from_half(load<uint16_t>(from + 2 * i));
    } else {
        for (int64_t i = 0; i < count; ++i) {
            out[i] = float_from_bfloat16(load<uint16_t>(from + 2 * i));
        }
    }
}

}  // namespace

QuantizeResult quantize_rows(std::string_view isa, const FileRows& source, const float* importance,
                             WeightType type, std::byte* out) {
    const int64_t columns = source.columns;
    const Quantize quantize = quantizers_of(isa).quantize[static_cast<int>(type)];
    const int64_t most = std::max<int64_t>(1, kChunkFloats / columns);
    std::vector<float> values(static_cast<std::size_t>(most * columns));
    for (int64_t row = 0; row < source.rows; row += most) {
        const int64_t rows = std::min(most, source.rows - row);
        read_floats(source.type, source.data + row * row_bytes(source.type, columns),
                    rows * columns, values.data());
        if (!all_finite(values.data(), rows * columns)) {
            const auto bad = std::find_if_not(values.begin(), values.end(), is_finite);
            const int64_t at = bad - values.begin();
            return {QuantizeResult::not_finite, row + at / columns, at % columns};
        }
        if (!quantize(
                {values.data(), importance, rows, columns, out + row * row_bytes(type, columns)})) {
            return {QuantizeResult::too_large, row, 0};
        }
    }
    return {QuantizeResult::done, 0, 0};
}

}  // namespace smolrun
