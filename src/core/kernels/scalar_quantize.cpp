#include "kernels/quantize_table.h"

namespace smolrun {

const Quantizers kScalarQuantizers = quantizer_table("scalar");

}  // namespace smolrun
