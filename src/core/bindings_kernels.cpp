// The submodule smolrun._core.kernels: every kernel by itself, for tests and benchmarks. Whatever
// a kernel takes for granted is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "dispatch.h"
#include "pack.h"

namespace nb = nanobind;

namespace smolrun {
namespace {

using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;
constexpr int64_t kAny = -1;  // a length that is not prescribed

[[noreturn]] void fail(const std::string& what) { throw nb::value_error(what.c_str()); }

void require(bool holds, const std::string& what) {
    if (!holds) fail(what);
}

// The data of an array that must have this type and shape and lie in one piece.
template <class T, class Array>
T* checked(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
    const std::string prefix = std::string(name) + ": ";
    require(array.dtype() == nb::dtype<std::remove_const_t<T>>(), prefix + "wrong element type");
    require(array.ndim() == shape.size(), prefix + "expected " + std::to_string(shape.size()) +
                                              " dimensions, found " + std::to_string(array.ndim()));
    std::size_t axis = 0;
    for (int64_t length : shape) {
        const auto found = static_cast<int64_t>(array.shape(axis));
        require(length == kAny || found == length,
                prefix + "expected length " + std::to_string(length) + " on axis " +
                    std::to_string(axis) + ", found " + std::to_string(found));
        ++axis;
    }
    int64_t stride = 1;
    for (axis = array.ndim(); axis-- > 0;) {
        require(array.shape(axis) <= 1 || array.stride(axis) == stride,
                prefix + "must be C-contiguous");
        stride *= static_cast<int64_t>(array.shape(axis));
    }
    return static_cast<T*>(array.data());
}

template <class T>
const T* input(const Input& array, const char* name, std::initializer_list<int64_t> shape) {
    return checked<const T>(array, name, shape);
}
template <class T>
T* output(const Output& array, const char* name, std::initializer_list<int64_t> shape) {
    return checked<T>(array, name, shape);
}

const Kernels& kernels(const std::string& isa) {
    try {
        return kernels_of(isa);
    } catch (const std::invalid_argument& error) {
        fail(error.what());
    }
}

WeightType weight_type(const std::string& name) {
    for (int i = 0; i < kWeightTypes; ++i) {
        if (name == kBlockLayouts[i].name) return static_cast<WeightType>(i);
    }
    fail("type: unknown weight type '" + name + "'");
}

// Sizes past this would overflow a product; no weight comes near it.
constexpr int64_t kLargest = int64_t{1} << 30;

WeightType checked_type(const std::string& name, int64_t rows, int64_t columns) {
    const WeightType type = weight_type(name);
    require(rows > 0 && rows <= kLargest, "rows: out of range");
    require(columns > 0 && columns <= kLargest, "columns: out of range");
    require(columns % layout(type).weights == 0,
            "columns: " + std::to_string(columns) + " is not a multiple of the " +
                std::to_string(layout(type).weights) + " weights in a " + name + " block");
    return type;
}

Matrix checked_matrix(const std::string& name, int64_t rows, int64_t columns, const Input& data) {
    const WeightType type = checked_type(name, rows, columns);
    const auto* bytes = input<uint8_t>(data, "packed", {packed_bytes(type, rows, columns)});
    return {type, rows, columns, reinterpret_cast<const std::byte*>(bytes)};
}

int64_t py_packed_bytes(const std::string& name, int64_t rows, int64_t columns) {
    return packed_bytes(checked_type(name, rows, columns), rows, columns);
}

void py_pack(const std::string& name, int64_t rows, int64_t columns, const Input& data,
             int64_t interleaved_head_dim, const Output& out) {
    const WeightType type = checked_type(name, rows, columns);
    require(
        interleaved_head_dim == 0 || (interleaved_head_dim > 0 && interleaved_head_dim % 2 == 0 &&
                                      rows % interleaved_head_dim == 0),
        "interleaved_head_dim: must be even and divide the rows, or be 0");
    const auto* from = input<uint8_t>(data, "data", {rows * row_bytes(type, columns)});
    auto* to = output<uint8_t>(out, "out", {packed_bytes(type, rows, columns)});
    const FileRows source{type, rows, columns, reinterpret_cast<const std::byte*>(from),
                          interleaved_head_dim};
    nb::gil_scoped_release unlocked;
    pack(source, 0, row_groups(rows), reinterpret_cast<std::byte*>(to));
}

// The codes of some tokens' inputs, as a step of a model prepares them.
struct QuantizedInputs {
    std::vector<int16_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> sums;

    QuantizedInputs(const Kernels& with, const float* x, int64_t tokens, int64_t columns)
        : codes(static_cast<std::size_t>(tokens * columns)),
          scales(static_cast<std::size_t>(tokens * columns / 32)),
          sums(static_cast<std::size_t>(tokens * columns / 16)) {
        for (int64_t t = 0; t < tokens; ++t) {
            with.quantize(x + t * columns, columns, codes.data() + t * columns,
                          scales.data() + t * columns / 32, sums.data() + t * columns / 16);
        }
    }
};

void py_linear(const std::string& isa, const std::string& name, int64_t rows, int64_t columns,
               const Input& packed, const Input& x, int64_t row_begin, int64_t row_end,
               const Output& out) {
    const Kernels& with = kernels(isa);
    const Matrix weights = checked_matrix(name, rows, columns, packed);
    const float* values = input<float>(x, "x", {kAny, columns});
    const auto tokens = static_cast<int64_t>(x.shape(0));
    require(0 <= row_begin && row_begin <= row_end && row_end <= rows,
            "row_begin, row_end: not a range of rows");
    require(row_begin % kGroupRows == 0, "row_begin: must be a multiple of 16");
    require(row_end % kGroupRows == 0 || row_end == rows,
            "row_end: must be a multiple of 16, or the number of rows");
    auto* to = output<float>(out, "out", {tokens, row_end - row_begin});
    nb::gil_scoped_release unlocked;
    struct Free {
        void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    const std::unique_ptr<std::byte[], Free> scratch(new (std::align_val_t{64})
                                                         std::byte[kLinearScratch]);
    Activations activations{columns, values, nullptr, nullptr, nullptr};
    const auto linear = with.linear[static_cast<int>(weights.type)];
    if (is_float(weights.type)) {
        linear(weights, activations, tokens, row_begin, row_end, to, row_end - row_begin,
               scratch.get());
        return;
    }
    const QuantizedInputs quantized(with, values, tokens, columns);
    activations.codes = quantized.codes.data();
    activations.scales = quantized.scales.data();
    activations.sums = quantized.sums.data();
    linear(weights, activations, tokens, row_begin, row_end, to, row_end - row_begin,
           scratch.get());
}

void py_dequantize(const std::string& isa, const std::string& name, int64_t rows, int64_t columns,
                   const Input& packed, int64_t row, const Output& out) {
    const Kernels& with = kernels(isa);
    const Matrix weights = checked_matrix(name, rows, columns, packed);
    require(0 <= row && row < rows, "row: out of range");
    with.dequantize[static_cast<int>(weights.type)](weights, row,
                                                    output<float>(out, "out", {columns}));
}

void py_quantize(const std::string& isa, const Input& x, const Output& codes, const Output& scales,
                 const Output& sums) {
    const Kernels& with = kernels(isa);
    const float* values = input<float>(x, "x", {kAny});
    const auto columns = static_cast<int64_t>(x.shape(0));
    require(columns % 32 == 0, "x: the length must be a multiple of 32");
    with.quantize(values, columns, output<int16_t>(codes, "codes", {columns}),
                  output<float>(scales, "scales", {columns / 32}),
                  output<int32_t>(sums, "sums", {columns / 16}));
}

void py_rms_norm(const std::string& isa, const Input& x, const Input& weight, float epsilon,
                 const Output& out) {
    const Kernels& with = kernels(isa);
    const float* values = input<float>(x, "x", {kAny});
    const auto columns = static_cast<int64_t>(x.shape(0));
    with.rms_norm(values, input<float>(weight, "weight", {columns}), columns, epsilon,
                  output<float>(out, "out", {columns}));
}

void py_rope(const std::string& isa, const Output& heads, const Input& cosine, const Input& sine) {
    const Kernels& with = kernels(isa);
    float* values = output<float>(heads, "heads", {kAny, kAny});
    const auto head_dim = static_cast<int64_t>(heads.shape(1));
    require(head_dim % 2 == 0, "heads: the head size must be even");
    with.rope(values, static_cast<int64_t>(heads.shape(0)), head_dim,
              input<float>(cosine, "cosine", {head_dim / 2}),
              input<float>(sine, "sine", {head_dim / 2}));
}

void py_swiglu(const std::string& isa, const Input& gate, const Input& up, const Output& out) {
    const Kernels& with = kernels(isa);
    const float* values = input<float>(gate, "gate", {kAny});
    const auto columns = static_cast<int64_t>(gate.shape(0));
    with.swiglu(values, input<float>(up, "up", {columns}), columns,
                output<float>(out, "out", {columns}));
}

void py_add(const std::string& isa, const Input& x, const Output& out) {
    const Kernels& with = kernels(isa);
    const float* values = input<float>(x, "x", {kAny});
    const auto columns = static_cast<int64_t>(x.shape(0));
    with.add(values, columns, output<float>(out, "out", {columns}));
}

void py_store_kv(const std::string& isa, const Input& k, const Input& v, int64_t slot,
                 const Output& k_block, const Output& v_block) {
    const Kernels& with = kernels(isa);
    const float* keys = input<float>(k, "k", {kAny});
    const auto head_dim = static_cast<int64_t>(k.shape(0));
    require(0 <= slot && slot < kBlockTokens, "slot: must be 0 to 31");
    with.store_kv(keys, input<float>(v, "v", {head_dim}), head_dim, slot,
                  output<uint16_t>(k_block, "k_block", {head_dim, kBlockTokens}),
                  output<uint16_t>(v_block, "v_block", {kBlockTokens, head_dim}));
}

void py_attention(const std::string& isa, const Input& q, const Output& out, int64_t length,
                  float scale, const Input& pool, const Input& block_table, int64_t block_stride,
                  int64_t k_offset, int64_t v_offset) {
    const Kernels& with = kernels(isa);
    const float* queries = input<float>(q, "q", {kAny, kAny});
    const auto group = static_cast<int64_t>(q.shape(0)),
               head_dim = static_cast<int64_t>(q.shape(1));
    float* to = output<float>(out, "out", {group, head_dim});
    const auto* cache = input<uint16_t>(pool, "pool", {kAny});
    const auto* table = input<int32_t>(block_table, "block_table", {kAny});
    require(0 < length && length <= kLargest, "length: must be positive");
    const int64_t blocks = (length + kBlockTokens - 1) / kBlockTokens;
    require(static_cast<int64_t>(block_table.shape(0)) >= blocks,
            "block_table: too short for the length");
    require(0 < block_stride && block_stride <= kLargest, "block_stride: out of range");
    for (int64_t offset : {k_offset, v_offset}) {
        require(0 <= offset && offset <= block_stride - head_dim * kBlockTokens,
                "k_offset, v_offset: outside the block");
    }
    const int64_t pool_blocks = static_cast<int64_t>(pool.shape(0)) / block_stride;
    for (int64_t i = 0; i < blocks; ++i) {
        require(0 <= table[i] && table[i] < pool_blocks, "block_table: no such block");
    }
    std::vector<float> scratch(static_cast<std::size_t>(group * (kBlockTokens + head_dim)));
    with.attention({queries, to, group, head_dim, length, scale, cache, table, block_stride,
                    k_offset, v_offset, scratch.data()});
}

}  // namespace

void bind_kernels(nb::module_& module) {
    using namespace nb::literals;
    nb::module_ m = module.def_submodule("kernels");
    // No argument is ever converted: a copy would take an output's place.
    const auto array = [](const char* name) { return nb::arg(name).noconvert(); };
    m.def("packed_bytes", &py_packed_bytes, "type"_a, "rows"_a, "columns"_a);
    m.def("pack", &py_pack, "type"_a, "rows"_a, "columns"_a, array("data"),
          "interleaved_head_dim"_a, array("out"));
    m.def("linear", &py_linear, "isa"_a, "type"_a, "rows"_a, "columns"_a, array("packed"),
          array("x"), "row_begin"_a, "row_end"_a, array("out"));
    m.def("dequantize", &py_dequantize, "isa"_a, "type"_a, "rows"_a, "columns"_a, array("packed"),
          "row"_a, array("out"));
    m.def("quantize", &py_quantize, "isa"_a, array("x"), array("codes"), array("scales"),
          array("sums"));
    m.def("rms_norm", &py_rms_norm, "isa"_a, array("x"), array("weight"), "epsilon"_a,
          array("out"));
    m.def("rope", &py_rope, "isa"_a, array("heads"), array("cosine"), array("sine"));
    m.def("swiglu", &py_swiglu, "isa"_a, array("gate"), array("up"), array("out"));
    m.def("add", &py_add, "isa"_a, array("x"), array("out"));
    m.def("store_kv", &py_store_kv, "isa"_a, array("k"), array("v"), "slot"_a, array("k_block"),
          array("v_block"));
    m.def("attention", &py_attention, "isa"_a, array("q"), array("out"), "length"_a, "scale"_a,
          array("pool"), array("block_table"), "block_stride"_a, "k_offset"_a, "v_offset"_a);
}

}  // namespace smolrun
