// The table of an instruction set, filled with the kernels of simd_*.h.
#pragma once

#include "kernels/simd_attention.h"
#include "kernels/simd_byte_inputs.h"
#include "kernels/simd_bytes.h"
#include "kernels/simd_codes.h"
#include "kernels/simd_floats.h"
#include "kernels/simd_kv.h"
#include "kernels/simd_quantized.h"
#include "kernels/simd_vectors.h"

namespace smolrun {
namespace {

template <WeightType type>
constexpr Kernels::Linear linear() {
    if constexpr (type == WeightType::I16) {
        return multiply_codes;
    } else if constexpr (is_float(type)) {
        return multiply_floats<type>;
    } else {
        return multiply_quantized<type>;
    }
}

template <WeightType type>
constexpr Kernels::Linear fast_linear() {
    if constexpr (!is_float(type) && bits_of_code<type> <= kByteProductBits) {
        return multiply_bytes<type>;
    } else {
        return nullptr;
    }
}

template <WeightType type>
constexpr Kernels::Dequantize dequantize() {
    if constexpr (type == WeightType::I16) {
        return read_code_row;
    } else if constexpr (is_float(type)) {
        return read_row<type>;
    } else {
        return dequantize_row<type>;
    }
}

consteval Kernels table(const char* name) {
    return {
        .name = name,
        .panel_tokens = kTilePanelTokens,
#define X(type, weights, bytes) linear<WeightType::type>(),
        .linear = {SMOLRUN_WEIGHT_TYPES(X)},
#undef X
#define X(type, weights, bytes) fast_linear<WeightType::type>(),
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
        .add = add_to,
        .attention = attention,
        .attend_segment = attend_segment,
        .merge_segments = merge_segments,
        .store_kv = store_kv,
#define X(type, weights, bytes) dequantize<WeightType::type>(),
        .dequantize = {SMOLRUN_WEIGHT_TYPES(X)},
#undef X
    };
}

}  // namespace
}  // namespace smolrun
