#include "kernels/quantize_table.h"

namespace smolrun {

const Quantizers kAvx2Quantizers = quantizer_table("avx2");

}  // namespace smolrun
