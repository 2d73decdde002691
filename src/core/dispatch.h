// Which kernel tables this CPU can run, and the one a name stands for.
#pragma once

#include <string_view>
#include <vector>

#include "kernels.h"

namespace smolrun {

// Instruction sets that this CPU and operating system run, slowest first; "scalar" always.
std::vector<std::string_view> supported_isas();

// The kernels of one of them. std::invalid_argument for a name that is unknown or that this CPU
// does not run.
const Kernels& kernels_of(std::string_view isa);

}  // namespace smolrun
