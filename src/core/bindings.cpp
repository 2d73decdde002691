// The module smolrun._core. Every array that comes from Python is checked here or in what this
// file calls, before the GIL is released: shape, type, contiguity and the range of every index.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "dispatch.h"

namespace nb = nanobind;

namespace {

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (std::string_view name : smolrun::supported_isas()) names.emplace_back(name);
    return names;
}

}  // namespace

NB_MODULE(_core, module) {
    module.def("isas", &isas);
    module.def("default_isa", [] { return isas().back(); });
    smolrun::bind_kernels(module);
}
