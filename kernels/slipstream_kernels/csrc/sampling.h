// Choosing the token of one row of logits; slipstream_kernels/sampling.py is the definition.
#pragma once

#include <cstdint>

#include "sample_row.h"

namespace SLIPSTREAM_ISA {

// The token chosen: filters, noise, argmax.
int32_t choose_one(const float* logits, int64_t num_tokens, const SampleRow& how);

constexpr int32_t kNumChoices = 2;  // sampling.NUM_CHOICES

// The token chosen, then what would be chosen without it, and how sure each choice is; -1 where no token is left.
void best_choices(const float* logits, int64_t num_tokens, const SampleRow& how, int32_t* tokens, double* shares);

}  // namespace SLIPSTREAM_ISA
