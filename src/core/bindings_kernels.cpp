// The submodule smolrun._core.kernels: every kernel by itself, for tests and benchmarks. Whatever
// a kernel takes for granted is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "dispatch.h"
#include "pack.h"
#include "python_arrays.h"

namespace nb = nanobind;

namespace smolrun {
namespace {

[[noreturn]] void fail(const std::string& what) { throw nb::value_error(what.c_str()); }

void require(bool holds, const std::string& what) {
    if (!holds) fail(what);
}

Array vector(nb::handle object, const char* name) {
    return Array(object, name, Element::float32, 1);
}

// An array of this shape, for reading or for writing.
Array input(nb::handle object, const char* name, Element element, std::vector<int64_t> shape) {
    Array array(object, name, element, static_cast<int>(shape.size()));
    array.expect_shape(shape);
    return array;
}
Array output(nb::handle object, const char* name, Element element, std::vector<int64_t> shape) {
    Array array(object, name, element, static_cast<int>(shape.size()), true);
    array.expect_shape(shape);
    return array;
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

Array packed_input(nb::handle object, WeightType type, int64_t rows, int64_t columns) {
    return input(object, "packed", Element::uint8, {packed_bytes(type, rows, columns)});
}

int64_t py_packed_bytes(const std::string& name, int64_t rows, int64_t columns) {
    return packed_bytes(checked_type(name, rows, columns), rows, columns);
}

void py_pack(const std::string& name, int64_t rows, int64_t columns, nb::handle data,
             int64_t interleaved_head_dim, nb::handle out, bool as_codes) {
    const WeightType type = checked_type(name, rows, columns);
    require(type != WeightType::I16, "type: no file has I16");
    require(
        interleaved_head_dim == 0 || (interleaved_head_dim > 0 && interleaved_head_dim % 2 == 0 &&
                                      rows % interleaved_head_dim == 0),
        "interleaved_head_dim: must be even and divide the rows, or be 0");
    const Array from = input(data, "data", Element::uint8, {rows * row_bytes(type, columns)});
    const FileRows source{type,    rows, columns, from.data<std::byte>(), interleaved_head_dim,
                          as_codes};
    const Array to =
        output(out, "out", Element::uint8, {packed_bytes(source.packed_type(), rows, columns)});
    nb::gil_scoped_release unlocked;
    pack(source, 0, row_groups(rows), to.data<std::byte>());
}

int64_t panel_of(const Kernels& with, int64_t tokens) {
    return std::clamp<int64_t>(tokens, 1, with.panel_tokens);
}

// The codes of some tokens' inputs, as a step of a model prepares them.
struct QuantizedInputs {
    int64_t panel;
    std::vector<WordPiece> words;
    std::vector<WordScale> scales;

    QuantizedInputs(const Kernels& with, const float* x, int64_t tokens, int64_t columns)
        : panel(panel_of(with, tokens)),
          words(static_cast<std::size_t>((tokens + panel) * columns / 32)),
          scales(words.size()) {
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t first = t / panel * panel * (columns / 32) + t % panel;
            with.quantize(x + t * columns, columns, panel, words.data() + first,
                          scales.data() + first);
        }
    }
};

// The same in 8 bits.
struct ByteInputs {
    int64_t panel;
    std::vector<BytePiece> pieces;
    std::vector<float> scales;

    ByteInputs(const Kernels& with, const float* x, int64_t tokens, int64_t columns)
        : panel(panel_of(with, tokens)),
          pieces(static_cast<std::size_t>((tokens + panel) * columns / 32)),
          scales(static_cast<std::size_t>(tokens)) {
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t first = t / panel * panel * (columns / 32) + t % panel;
            with.quantize_bytes(x + t * columns, columns, panel, pieces.data() + first,
                                scales.data() + t);
        }
    }
};

// The same in runs.
struct RunInputs {
    std::vector<int16_t> codes;
    std::vector<float> scales;

    RunInputs(const Kernels& with, const float* x, int64_t tokens, int64_t columns) {
        const int64_t parts = (columns + kCodePartColumns - 1) / kCodePartColumns;
        codes.resize(static_cast<std::size_t>(parts * tokens * kCodePartColumns));
        scales.resize(static_cast<std::size_t>(parts * tokens * kCodePartRuns));
        for (int64_t t = 0; t < tokens; ++t) {
            with.quantize_runs(x + t * columns, columns, tokens,
                               codes.data() + t * kCodePartColumns,
                               scales.data() + t * kCodePartRuns);
        }
    }
};

bool has_fast(const std::string& isa, const std::string& name) {
    return kernels(isa).fast_linear[static_cast<int>(weight_type(name))] != nullptr;
}

void py_linear(const std::string& isa, const std::string& name, int64_t rows, int64_t columns,
               nb::handle packed, nb::handle x, int64_t row_begin, int64_t row_end, nb::handle out,
               bool fast) {
    const Kernels& with = kernels(isa);
    const WeightType type = checked_type(name, rows, columns);
    const Array bytes = packed_input(packed, type, rows, columns);
    const Array values(x, "x", Element::float32, 2);
    const int64_t tokens = values.size(0);
    values.expect_shape({tokens, columns});
    require(0 <= row_begin && row_begin <= row_end && row_end <= rows,
            "row_begin, row_end: not a range of rows");
    require(row_begin % kGroupRows == 0, "row_begin: must be a multiple of 16");
    require(row_end % kGroupRows == 0 || row_end == rows,
            "row_end: must be a multiple of 16, or the number of rows");
    require(!fast || has_fast(isa, name), "fast: there is no such product of " + name);
    const int64_t stride = row_end - row_begin;
    const Array to = output(out, "out", Element::float32, {tokens, stride});

    nb::gil_scoped_release unlocked;
    const Matrix weights{type, rows, columns, bytes.data<std::byte>()};
    Activations activations{};
    activations.columns = columns;
    activations.values = values.data<float>();
    activations.panel = 1;
    std::optional<ByteInputs> rounded;
    std::optional<RunInputs> runs;
    std::optional<QuantizedInputs> quantized;
    if (type == WeightType::I16) {
        runs.emplace(with, activations.values, tokens, columns);
        activations.codes = runs->codes.data();
        activations.code_scales = runs->scales.data();
        activations.code_stride = tokens;
    } else if (fast) {
        rounded.emplace(with, activations.values, tokens, columns);
        activations.panel = rounded->panel;
        activations.bytes = rounded->pieces.data();
        activations.byte_scales = rounded->scales.data();
    } else if (!is_float(type)) {
        quantized.emplace(with, activations.values, tokens, columns);
        activations.panel = quantized->panel;
        activations.words = quantized->words.data();
        activations.scales = quantized->scales.data();
    }
    struct Free {
        void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    const std::unique_ptr<std::byte[], Free> scratch(new (std::align_val_t{64})
                                                         std::byte[kLinearScratch]);
    const Kernels::Linear multiply =
        (fast ? with.fast_linear : with.linear)[static_cast<int>(type)];
    multiply(weights, activations, tokens, row_begin, row_end, to.data<float>(), stride,
             scratch.get());
}

void py_dequantize(const std::string& isa, const std::string& name, int64_t rows, int64_t columns,
                   nb::handle packed, int64_t row, nb::handle out) {
    const Kernels& with = kernels(isa);
    const WeightType type = checked_type(name, rows, columns);
    const Array bytes = packed_input(packed, type, rows, columns);
    require(0 <= row && row < rows, "row: out of range");
    const Array to = output(out, "out", Element::float32, {columns});
    with.dequantize[static_cast<int>(type)]({type, rows, columns, bytes.data<std::byte>()}, row,
                                            to.data<float>());
}

void py_quantize(const std::string& isa, nb::handle x, nb::handle codes, nb::handle scales,
                 nb::handle sums) {
    const Kernels& with = kernels(isa);
    const Array values = vector(x, "x");
    const int64_t columns = values.size(0);
    require(columns % 32 == 0, "x: the length must be a multiple of 32");
    const Array to_codes = output(codes, "codes", Element::int16, {columns});
    const Array to_scales = output(scales, "scales", Element::float32, {columns / 32});
    const Array to_sums = output(sums, "sums", Element::int32, {columns / 16});
    const QuantizedInputs quantized(with, values.data<float>(), 1, columns);
    for (std::size_t i = 0; i < static_cast<std::size_t>(columns / 32); ++i) {
        std::copy_n(quantized.words[i].codes, 32, to_codes.data<int16_t>() + 32 * i);
        to_scales.data<float>()[i] = quantized.scales[i].scale;
        std::copy_n(quantized.scales[i].sums, 2, to_sums.data<int32_t>() + 2 * i);
    }
}

void py_quantize_bytes(const std::string& isa, nb::handle x, nb::handle codes, nb::handle scales,
                       nb::handle sums) {
    const Kernels& with = kernels(isa);
    const Array values = vector(x, "x");
    const int64_t columns = values.size(0);
    require(columns % 32 == 0, "x: the length must be a multiple of 32");
    const Array to_codes = output(codes, "codes", Element::int8, {columns});
    const Array to_scales = output(scales, "scales", Element::float32, {columns / 16});
    const Array to_sums = output(sums, "sums", Element::int32, {columns / 16});
    const ByteInputs rounded(with, values.data<float>(), 1, columns);
    for (std::size_t i = 0; i < static_cast<std::size_t>(columns / 32); ++i) {
        const BytePiece& piece = rounded.pieces[i];
        std::copy_n(piece.codes, 32, to_codes.data<int8_t>() + 32 * i);
        for (std::size_t half = 0; half < 2; ++half) {
            to_scales.data<float>()[2 * i + half] =
                std::ldexp(rounded.scales[0] * kByteFactor[piece.factor], piece.shifts[half]);
            to_sums.data<int32_t>()[2 * i + half] = piece.starts[half] / -128;
        }
    }
}

void py_quantize_runs(const std::string& isa, nb::handle x, nb::handle codes, nb::handle scales) {
    const Kernels& with = kernels(isa);
    const Array values = vector(x, "x");
    const int64_t columns = values.size(0);
    const int64_t runs = (columns + kCodeRunColumns - 1) / kCodeRunColumns;
    const Array to_codes = output(codes, "codes", Element::int16, {columns});
    const Array to_scales = output(scales, "scales", Element::float32, {runs});
    const RunInputs quantized(with, values.data<float>(), 1, columns);
    std::copy_n(quantized.codes.data(), columns, to_codes.data<int16_t>());
    std::copy_n(quantized.scales.data(), runs, to_scales.data<float>());
}

float py_encode(const std::string& isa, const std::string& name, nb::handle weights,
                nb::handle codes) {
    const Kernels& with = kernels(isa);
    const WeightType type = weight_type(name);
    require(type == WeightType::F16 || type == WeightType::BF16,
            "type: expected F16 or BF16, not " + name);
    const Array from(weights, "weights", Element::uint8, 1);
    const int64_t count = from.size(0) / 2;
    require(from.size(0) % 2 == 0, "weights: not a whole number of them");
    require(count <= kCodePartColumns, "weights: more than 512");
    const Array to = output(codes, "codes", Element::int16, {count + count % 2});
    const auto encode = type == WeightType::F16 ? with.encode_f16 : with.encode_bf16;
    return encode(from.data<std::byte>(), count, to.data<int16_t>());
}

void py_rms_norm(const std::string& isa, nb::handle x, nb::handle weight, float epsilon,
                 nb::handle out) {
    const Kernels& with = kernels(isa);
    const Array values = vector(x, "x");
    const int64_t columns = values.size(0);
    const Array factors = input(weight, "weight", Element::float32, {columns});
    const Array to = output(out, "out", Element::float32, {columns});
    with.rms_norm(values.data<float>(), factors.data<float>(), columns, epsilon, to.data<float>());
}

void py_rope(const std::string& isa, nb::handle heads, nb::handle cosine, nb::handle sine) {
    const Kernels& with = kernels(isa);
    const Array values(heads, "heads", Element::float32, 2, true);
    const int64_t head_dim = values.size(1);
    require(head_dim % 2 == 0, "heads: the head size must be even");
    const Array cosines = input(cosine, "cosine", Element::float32, {head_dim / 2});
    const Array sines = input(sine, "sine", Element::float32, {head_dim / 2});
    with.rope(values.data<float>(), values.size(0), head_dim, cosines.data<float>(),
              sines.data<float>());
}

void py_swiglu(const std::string& isa, nb::handle gate, nb::handle up, nb::handle out) {
    const Kernels& with = kernels(isa);
    const Array gates = vector(gate, "gate");
    const int64_t columns = gates.size(0);
    const Array ups = input(up, "up", Element::float32, {columns});
    const Array to = output(out, "out", Element::float32, {columns});
    with.swiglu(gates.data<float>(), ups.data<float>(), columns, to.data<float>());
}

double py_weigh(const std::string& isa, nb::handle x, float greatest, float factor,
                nb::handle out) {
    const Kernels& with = kernels(isa);
    const Array values = vector(x, "x");
    const Array to = output(out, "out", Element::float32, {values.size(0)});
    return with.weigh(values.data<float>(), values.size(0), greatest, factor, to.data<float>());
}

void py_add(const std::string& isa, nb::handle x, nb::handle out) {
    const Kernels& with = kernels(isa);
    const Array values = vector(x, "x");
    const Array to = output(out, "out", Element::float32, {values.size(0)});
    with.add(values.data<float>(), values.size(0), to.data<float>());
}

void py_store_kv(const std::string& isa, nb::handle k, nb::handle v, int64_t slot,
                 nb::handle k_block, nb::handle v_block) {
    const Kernels& with = kernels(isa);
    const Array key = vector(k, "k");
    const int64_t head_dim = key.size(0);
    const Array value = input(v, "v", Element::float32, {head_dim});
    require(0 <= slot && slot < kBlockTokens, "slot: must be 0 to 31");
    const int64_t size = kv_elements(head_dim);
    const Array keys = output(k_block, "k_block", Element::int16, {size});
    const Array values = output(v_block, "v_block", Element::int16, {size});
    with.store_kv(key.data<float>(), value.data<float>(), head_dim, slot, keys.data<int16_t>(),
                  values.data<int16_t>());
}

void py_attention(const std::string& isa, nb::handle q, nb::handle out, int64_t length, float scale,
                  nb::handle pool, nb::handle block_table, int64_t block_stride, int64_t k_offset,
                  int64_t v_offset, bool by_segments) {
    const Kernels& with = kernels(isa);
    const Array queries(q, "q", Element::float32, 3);
    const int64_t tokens = queries.size(0), group = queries.size(1), head_dim = queries.size(2);
    require(tokens <= kAttentionTokens, "q: too many tokens");
    const Array to = output(out, "out", Element::float32, {tokens, group, head_dim});
    const Array cache(pool, "pool", Element::int16, 1);
    const Array table(block_table, "block_table", Element::int32, 1);
    require(0 < length && length <= kLargest, "length: must be positive");
    const int64_t blocks = (length + tokens - 1 + kBlockTokens - 1) / kBlockTokens;
    require(table.size(0) >= blocks, "block_table: too short for the length");
    require(0 < block_stride && block_stride <= kLargest, "block_stride: out of range");
    for (int64_t offset : {k_offset, v_offset}) {
        require(0 <= offset && offset <= block_stride - kv_elements(head_dim),
                "k_offset, v_offset: outside the block");
    }
    for (int64_t i = 0; i < blocks; ++i) {
        const int32_t block = table.data<int32_t>()[i];
        require(0 <= block && block < cache.size(0) / block_stride, "block_table: no such block");
    }
    std::vector<float> scratch(static_cast<std::size_t>(attention_scratch(group, head_dim)));
    const AttentionTask task{queries.data<float>(),
                             to.data<float>(),
                             tokens,
                             group * head_dim,
                             group,
                             head_dim,
                             length,
                             scale,
                             cache.data<int16_t>(),
                             table.data<int32_t>(),
                             block_stride,
                             k_offset,
                             v_offset,
                             scratch.data()};
    if (!by_segments) {
        with.attention(task);
        return;
    }
    require(tokens == 1, "by_segments: takes one token");
    const int64_t segments = (length + kSegmentTokens - 1) / kSegmentTokens;
    const int64_t stride = group * (head_dim + kPartialExtra);
    std::vector<float> partials(static_cast<std::size_t>(segments * stride));
    for (int64_t segment = segments; segment-- > 0;) {
        with.attend_segment(task, segment, partials.data() + segment * stride);
    }
    for (int64_t head = 0; head < group; ++head) {
        with.merge_segments(partials.data() + head * (head_dim + kPartialExtra), segments, stride,
                            head_dim, to.data<float>() + head * head_dim);
    }
}

}  // namespace

void bind_kernels(nb::module_& module) {
    using namespace nb::literals;
    nb::module_ m = module.def_submodule("kernels");
    m.def("packed_bytes", &py_packed_bytes, "type"_a, "rows"_a, "columns"_a);
    m.def("pack", &py_pack, "type"_a, "rows"_a, "columns"_a, "data"_a, "interleaved_head_dim"_a,
          "out"_a, "as_codes"_a = false);
    m.def("linear", &py_linear, "isa"_a, "type"_a, "rows"_a, "columns"_a, "packed"_a, "x"_a,
          "row_begin"_a, "row_end"_a, "out"_a, "fast"_a = false);
    m.def("has_fast", &has_fast, "isa"_a, "type"_a);
    m.def("dequantize", &py_dequantize, "isa"_a, "type"_a, "rows"_a, "columns"_a, "packed"_a,
          "row"_a, "out"_a);
    m.def("quantize", &py_quantize, "isa"_a, "x"_a, "codes"_a, "scales"_a, "sums"_a);
    m.def("quantize_bytes", &py_quantize_bytes, "isa"_a, "x"_a, "codes"_a, "scales"_a, "sums"_a);
    m.def("quantize_runs", &py_quantize_runs, "isa"_a, "x"_a, "codes"_a, "scales"_a);
    m.def("encode", &py_encode, "isa"_a, "type"_a, "weights"_a, "codes"_a);
    m.def("rms_norm", &py_rms_norm, "isa"_a, "x"_a, "weight"_a, "epsilon"_a, "out"_a);
    m.def("rope", &py_rope, "isa"_a, "heads"_a, "cosine"_a, "sine"_a);
    m.def("swiglu", &py_swiglu, "isa"_a, "gate"_a, "up"_a, "out"_a);
    m.def("weigh", &py_weigh, "isa"_a, "x"_a, "greatest"_a, "factor"_a, "out"_a);
    m.def("add", &py_add, "isa"_a, "x"_a, "out"_a);
    m.def("store_kv", &py_store_kv, "isa"_a, "k"_a, "v"_a, "slot"_a, "k_block"_a, "v_block"_a);
    m.def("attention", &py_attention, "isa"_a, "q"_a, "out"_a, "length"_a, "scale"_a, "pool"_a,
          "block_table"_a, "block_stride"_a, "k_offset"_a, "v_offset"_a, "by_segments"_a = false);
}

}  // namespace smolrun
