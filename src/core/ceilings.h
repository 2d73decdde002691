// What this machine can do at most, measured.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace smolrun {

struct Ceiling {
    std::string name;           // "read", "f32", "int16", "int8"
    std::vector<double> rates;  // bytes or operations a second, one figure per sample
};

// Runs the probes of an instruction set on `threads` threads, `samples` times each, in turn. Reads
// go over `read_bytes` of memory, which should be more than the caches hold. Instructions that the
// set lacks are left out. std::invalid_argument for a number out of range or a set that this CPU
// does not run.
std::vector<Ceiling> measure_ceilings(std::string_view isa, int threads, int samples,
                                      int64_t read_bytes);

}  // namespace smolrun
