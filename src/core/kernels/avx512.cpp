#include "kernels/avx512_vector.h"
// The instruction set comes before what is written on it.
#include "kernels/avx512_bfloat16.h"
#include "kernels/simd_table.h"

namespace smolrun {
namespace {

consteval Kernels with_bfloat16(Kernels kernels) {
    kernels.fast_linear[static_cast<int>(WeightType::BF16)] = multiply_bfloat16;
    kernels.round_to_bfloat16 = round_to_bfloat16;
    return kernels;
}

}  // namespace

const Kernels kAvx512Kernels = with_bfloat16(table("avx512"));

}  // namespace smolrun
