// The scalar kernels, cut in two files: products of weights, and the rest.
#pragma once

#include "kernels.h"

namespace smolrun::scalar {

Kernels::Linear linear(WeightType type);
Kernels::Linear fast_linear(WeightType type);
Kernels::Dequantize dequantize(WeightType type);

}  // namespace smolrun::scalar
