#include "kernels/avx2_vector.h"
// The instruction set comes before what is written on it.
#include "kernels/simd_table.h"

namespace smolrun {

const Kernels kAvx2Kernels = table("avx2");

}  // namespace smolrun
