#include "rows.h"

namespace SLIPSTREAM_ISA {
namespace {

constexpr int kMaxExperts = 1024;

float dot(const float* a, const float* b, int size) {
    Floats sums = {};
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) sums = fma(load(a + i), load(b + i), sums);
    float total = sum_lanes(sums);
    for (; i < size; ++i) total = fma(a[i], b[i], total);
    return total;
}

}  // namespace

void rms_norm(const float* x, const float* weight, int size, float epsilon, float* out) {
    const float scale = 1.0f / std::sqrt(dot(x, x, size) / size + epsilon);
    for (int i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

void rotate(float* head, const float* cosines, const float* sines, int size) {
    const int half = size / 2;
    for (int i = 0; i < half; ++i) {
        const float first = head[i], second = head[half + i];
        head[i] = first * cosines[i] - second * sines[i];
        head[half + i] = second * cosines[half + i] + first * sines[half + i];
    }
}

void silu_product(const float* gate, const float* up, int size, float* out) {
    for (int i = 0; i < size; i += kLanes) {
        const Floats value = load(gate + i);
        store(out + i, value / (1.0f + exp(-value)) * load(up + i));
    }
}

void route(const float* x, const float* router, int hidden, int num_experts, int num_chosen, bool normalizes,
           int* experts, float* weights) {
    float probs[kMaxExperts];
    float largest = -INFINITY;
    for (int e = 0; e < num_experts; ++e) {
        probs[e] = dot(x, router + size_t(e) * hidden, hidden);
        largest = probs[e] > largest ? probs[e] : largest;
    }
    float total = 0;
    for (int e = 0; e < num_experts; ++e) total += probs[e] = exp(splat(probs[e] - largest))[0];
    float chosen_total = 0;
    for (int k = 0; k < num_chosen; ++k) {
        int best = 0;
        for (int e = 1; e < num_experts; ++e) best = probs[e] > probs[best] ? e : best;
        experts[k] = best;
        weights[k] = probs[best] / total;
        chosen_total += weights[k];
        probs[best] = -1;
    }
    if (!normalizes) return;
    for (int k = 0; k < num_chosen; ++k) weights[k] /= chosen_total;
}

}  // namespace SLIPSTREAM_ISA
