#include "kernels/avx512_vector.h"
// The instruction set comes before what is written on it.
#include "kernels/simd_table.h"

namespace smolrun {

const Kernels kAvx512Kernels = table("avx512");

}  // namespace smolrun
