// The parts of the extension module, one function each.
#pragma once

#include <nanobind/nanobind.h>

namespace smolrun {

void bind_kernels(nanobind::module_& module);  // bindings_kernels.cpp: the submodule `kernels`

}  // namespace smolrun
