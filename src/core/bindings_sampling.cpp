// Drawing of tokens as Python sees it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <string>

#include "bindings.h"
#include "dispatch.h"
#include "python_arrays.h"
#include "sampling.h"

namespace nb = nanobind;

namespace smolrun {
namespace {

void require(bool holds, const char* what) {
    if (!holds) throw nb::value_error(what);
}

Array some_logits(nb::handle object) {
    Array logits(object, "logits", Element::float32, 1);
    require(logits.size(0) > 0, "logits: expected at least one");
    return logits;
}

bool py_all_finite(nb::handle object) {
    const Array logits = some_logits(object);
    return all_finite(logits.data<float>(), logits.size(0));
}

// Tens of microseconds: too short to let go of the GIL, which another thread would take.
int64_t py_draw(const std::string& isa, nb::handle object, double temperature, int64_t top_k,
                double top_p, double min_p, double random) {
    const Array logits = some_logits(object);
    const auto inverse = static_cast<float>(1 / temperature);
    require(temperature > 0 && std::isfinite(inverse) && inverse > 0, "temperature: out of range");
    require(top_p >= 0 && top_p <= 1, "top_p: expected 0 to 1");
    require(min_p >= 0 && min_p <= 1, "min_p: expected 0 to 1");
    require(random >= 0 && random < 1, "random: expected at least 0 and below 1");
    const float* const values = logits.data<float>();
    bool below = true;
    for (int64_t i = 0; i < logits.size(0); ++i) below &= values[i] < INFINITY;
    require(below, "logits: one is NaN or infinity");
    return draw(kernels_of(isa), values, logits.size(0), {inverse, top_k, top_p, min_p, random});
}

}  // namespace

void bind_sampling(nb::module_& m) {
    using namespace nb::literals;
    m.def("all_finite", &py_all_finite, "logits"_a);
    m.def("draw", &py_draw, "isa"_a, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
          "random"_a);
}

}  // namespace smolrun
