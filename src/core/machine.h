// What this machine is: the processor's name and flags, and how many cores this process may use.
#pragma once

#include <string>
#include <vector>

namespace smolrun {

struct Machine {
    std::string cpu_name;            // "" where the system does not say
    std::vector<std::string> flags;  // the kernel's names: "avx2", "asimddp"
    int affinity;                    // logical CPUs this process may run on
    int physical_cores;              // distinct cores among them
};

Machine this_machine();

}  // namespace smolrun
