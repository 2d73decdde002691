// smolrun._core.quantize: float rows into blocks.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "dispatch.h"
#include "pack.h"
#include "python_arrays.h"
#include "quantize.h"

namespace nb = nanobind;

namespace smolrun {
namespace {

WeightType weight_type(const std::string& name, const char* argument) {
    for (int i = 0; i < kFileTypes; ++i) {
        if (name == kBlockLayouts[i].name) return static_cast<WeightType>(i);
    }
    throw nb::value_error((std::string(argument) + ": unknown weight type '" + name + "'").c_str());
}

void py_quantize(const std::string& isa, const std::string& type_name,
                 const std::string& source_name, nb::handle source, nb::handle importance,
                 nb::handle out) {
    const WeightType type = weight_type(type_name, "type");
    const WeightType source_type = weight_type(source_name, "source_type");
    if (!is_float(source_type)) {
        throw nb::value_error(("source_type: must be a float type, not " + source_name).c_str());
    }
    const Array from(source, "source", Element::uint8, 2);
    const int64_t rows = from.size(0), columns = from.size(1) / layout(source_type).bytes;
    if (columns == 0 || from.size(1) % layout(source_type).bytes != 0 ||
        columns % layout(type).weights != 0) {
        throw nb::value_error(("source: rows of " + std::to_string(from.size(1)) +
                               " bytes are not whole blocks of " + type_name)
                                  .c_str());
    }
    Array to(out, "out", Element::uint8, 2, true);
    to.expect_shape({rows, row_bytes(type, columns)});
    std::optional<Array> weights;
    if (!importance.is_none()) {
        weights.emplace(importance, "importance", Element::float32, 1);
        weights->expect_shape({columns});
        const float* const values = weights->data<float>();
        if (!std::all_of(values, values + columns,
                         [](float x) { return std::isfinite(x) && x >= 0; })) {
            throw nb::value_error("importance: must be finite and not negative");
        }
    }
    QuantizeResult result;
    try {
        const FileRows file_rows{source_type, rows, columns, from.data<std::byte>(), 0, false};
        const GilReleased released;
        result = quantize_rows(isa, file_rows, weights ? weights->data<float>() : nullptr, type,
                               to.data<std::byte>());
    } catch (const std::invalid_argument& error) {
        throw nb::value_error(error.what());
    }
    if (result.kind == QuantizeResult::not_finite) {
        throw nb::value_error(("row " + std::to_string(result.row) + ", column " +
                               std::to_string(result.column) + ": not a finite number")
                                  .c_str());
    }
    if (result.kind == QuantizeResult::too_large) {
        throw nb::value_error(
            ("about row " + std::to_string(result.row) + ": too large for " + type_name).c_str());
    }
}

}  // namespace

void bind_quantize(nb::module_& module) {
    using namespace nb::literals;
    module.def("quantize", &py_quantize, "isa"_a, "type"_a, "source_type"_a, "source"_a,
               "importance"_a.none(), "out"_a);
}

}  // namespace smolrun
