// Choosing the token of one row of logits; slipstream_kernels/sampling.py is the definition.
#pragma once

#include <cstdint>

#include "sample_row.h"

namespace SLIPSTREAM_ISA {

// The token chosen: filters, noise, argmax.
int32_t choose_one(const float* logits, int64_t num_tokens, const SampleRow& how);

// What the softmax at a temperature (at 0: at 1) gives a token.
double share_of(const float* logits, int64_t num_tokens, double temperature, int32_t token);

}  // namespace SLIPSTREAM_ISA
