// What happens to one row at a time: normalisation, rotation, activation, routing. Lanes follow the index in the row.
#pragma once

#include "simd.h"

namespace SLIPSTREAM_ISA {

// out = x / sqrt(mean(x^2) + epsilon) * weight; `out` may be `x`.
void rms_norm(const float* x, const float* weight, int size, float epsilon, float* out);

// Rotate a head in place: (first half, second half) by the angles of `cosines` and `sines` [size].
void rotate(float* head, const float* cosines, const float* sines, int size);

// to += weight * from.
inline void add_scaled(const float* from, float weight, int size, float* to) {
    for (int i = 0; i < size; ++i) to[i] += weight * from[i];
}

// out = silu(gate) * up; size is a multiple of kLanes.
void silu_product(const float* gate, const float* up, int size, float* out);

// Softmax over the experts' logits, then the K largest, best first, equals by lowest id.
void route(const float* x, const float* router, int hidden, int num_experts, int num_chosen, bool normalizes,
           int* experts, float* weights);

}  // namespace SLIPSTREAM_ISA
