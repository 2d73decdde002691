#include "kernels/quantize_table.h"

namespace smolrun {

const Quantizers kAvx512Quantizers = quantizer_table("avx512");

}  // namespace smolrun
