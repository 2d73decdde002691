// Loops that do nothing but what an instruction set can do fastest. What they reach is the ceiling
// that the kernels are measured against.
#pragma once

#include <cstddef>
#include <cstdint>

namespace smolrun {

// Multiplications and additions on registers alone.
struct ComputeProbe {
    int64_t operations;  // of one round; a multiplication and an addition are two
    void (*run)(int64_t rounds);
};

struct Probes {
    const char* name;  // of the instruction set, as in its Kernels
    // Loads every byte once, in order; `bytes` is a multiple of 1024, `data` of 64.
    void (*read)(const std::byte* data, int64_t bytes);
    ComputeProbe f32;    // float32 times float32, added to float32
    ComputeProbe int16;  // pairs of int16 products, added to int32
    ComputeProbe int8;   // fours of uint8 * int8 products, added to int32
};

extern const Probes kScalarProbes;
#ifdef SMOLRUN_X86
extern const Probes kAvx2Probes;
extern const Probes kAvx512Probes;
#endif

}  // namespace smolrun
