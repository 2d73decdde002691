// Draws a token by its logits: temperature, top-k, top-p, min-p, and one random number.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace smolrun {

struct Draw {
    float inverse_temperature;
    int64_t top_k;  // keep so many of the likeliest; 0: all
    double top_p;   // then the fewest that together reach this share; 1: all
    double min_p;   // then those at least so many times as likely as the likeliest; 0: all
    double random;  // [0, 1): where the draw falls on the running sum of what is kept
};

// Whether no number of x[count] is NaN or infinite.
bool all_finite(const float* x, int64_t count);

// A token of logits[count], none of which is NaN, or infinity but for -infinity; count is at least
// 1. Of equally likely tokens the first are kept. Sums are in double, in an order that depends on
// nothing but the arguments. std::invalid_argument where every logit is -infinity.
int64_t draw(const Kernels& kernels, const float* logits, int64_t count, const Draw& how);

}  // namespace smolrun
