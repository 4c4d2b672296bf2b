// A row of logits: its largest, what reaches a bound, its k-th largest; and the buffers of a thread that chooses.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "simd.h"

namespace SLIPSTREAM_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// Buffers of one thread, kept between calls; each is named by what it holds.
struct Scratch {
    std::vector<float> rewritten, kept, maxima, candidates;
    std::vector<int64_t> weights, between;
    std::vector<int32_t> ids;
};
thread_local Scratch scratch;

// Logits whose largest is finite; the others are finite, -inf or NaN, and a NaN is never chosen.
struct Row {
    const float* logits;
    int64_t num_tokens;
    float largest;
};

// Bit i is set unless a[i] < b[i]: a NaN sets it.
inline uint32_t lanes_not_less(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ);
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(!(a[lane] < b[lane])) << lane;
    return bits;
#endif
}

// `number` values from `from`, which may be less than a vector holds; -inf behind them.
inline Floats load_padded(const float* from, int64_t number) {
    if (number >= kLanes) return load(from);
    Floats value = splat(-kInfinity);
    for (int64_t lane = 0; lane < number; ++lane) value[lane] = from[lane];
    return value;
}

// Call `visit(token)` for tokens in ascending order whose value is at least `bound`, until it returns true.
template <class Visit>
void each_at_least(const float* values, int64_t number, float bound, Visit visit) {
    for (int64_t at = 0; at < number; at += kLanes) {
        for (uint32_t lanes = lanes_not_less(load_padded(values + at, number - at), splat(bound)); lanes;
             lanes &= lanes - 1) {
            const int64_t token = at + __builtin_ctz(lanes);
            if (token < number && values[token] >= bound && visit(token)) return;
        }
    }
}

float largest_of(const float* values, int64_t number) {
    constexpr int kChains = 4;
    Floats largest[kChains];
    for (Floats& one : largest) one = splat(-kInfinity);
    int64_t at = 0;
    for (; at + kChains * kLanes <= number; at += kChains * kLanes) {
        for (int chain = 0; chain < kChains; ++chain) {
            largest[chain] = max(load(values + at + chain * kLanes), largest[chain]);  // a NaN is not larger
        }
    }
    for (; at < number; at += kLanes) largest[0] = max(load_padded(values + at, number - at), largest[0]);
    return max_lanes(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

int64_t first_of(const float* values, int64_t number, float value) {
    int64_t first = 0;
    each_at_least(values, number, value, [&](int64_t token) { return first = token, true; });
    return first;
}

// A row whose largest logit is an infinity (or that has none but NaN) is a row of equals among the tokens that have it.
Row finite_row(const float* logits, int64_t num_tokens) {
    const float largest = largest_of(logits, num_tokens);
    if (largest > -kInfinity && largest < kInfinity) return {logits, num_tokens, largest};
    std::vector<float>& rewritten = scratch.rewritten;
    rewritten.resize(size_t(num_tokens));
    for (int64_t token = 0; token < num_tokens; ++token) {
        rewritten[size_t(token)] = largest == -kInfinity || logits[token] == largest ? 0.0f : -kInfinity;
    }
    return {rewritten.data(), num_tokens, 0.0f};
}

// A bound that at least `number` values reach (if as many are no NaN): the `number`-th largest among the maxima of
// disjoint segments of 16 values.
float bound_of_top(const float* values, int64_t num_values, int64_t number) {
    constexpr int kSegment = 16;
    std::vector<float>& maxima = scratch.maxima;
    maxima.clear();
    int64_t at = 0;
    for (; at + kSegment * kLanes <= num_values; at += kSegment * kLanes) {
        Floats largest = splat(-kInfinity);
        for (int one = 0; one < kSegment; ++one) largest = max(load(values + at + one * kLanes), largest);
        for (int lane = 0; lane < kLanes; ++lane) maxima.push_back(largest[lane]);
    }
    for (; at < num_values; ++at) maxima.push_back(values[at] == values[at] ? values[at] : -kInfinity);
    if (int64_t(maxima.size()) < number) return -kInfinity;
    std::nth_element(maxima.begin(), maxima.begin() + (number - 1), maxima.end(), std::greater<float>());
    return maxima[size_t(number - 1)];
}

float kth_largest(const float* values, int64_t num_values, int64_t k) {
    std::vector<float>& candidates = scratch.candidates;
    candidates.clear();
    each_at_least(values, num_values, bound_of_top(values, num_values, k),
                  [&](int64_t token) { return candidates.push_back(values[token]), false; });
    if (int64_t(candidates.size()) < k) return -kInfinity;
    std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), std::greater<float>());
    return candidates[size_t(k - 1)];
}

// The `number` (at most as many as there are) largest logits' tokens, best first, equals by lowest id.
inline void best_ids(const Row& row, int64_t number, int32_t* out) {
    const auto value_of = [&](int32_t token) {
        const float logit = row.logits[token];
        return logit == logit ? logit : -kInfinity;
    };
    std::vector<int32_t>& ids = scratch.ids;
    ids.clear();
    const float bound = bound_of_top(row.logits, row.num_tokens, number);
    if (bound == -kInfinity) {
        for (int32_t token = 0; token < row.num_tokens; ++token) ids.push_back(token);
    } else {
        each_at_least(row.logits, row.num_tokens, bound,
                      [&](int64_t token) { return ids.push_back(int32_t(token)), false; });
    }
    std::partial_sort(ids.begin(), ids.begin() + number, ids.end(), [&](int32_t one, int32_t other) {
        const float value = value_of(one), other_value = value_of(other);
        return value > other_value || (value == other_value && one < other);
    });
    std::copy_n(ids.begin(), number, out);
}

// The sum of e^(logit - largest), in single precision.
inline float sum_of_exponentials(const Row& row) {
    Floats sums = splat(0.0f);
    for (int64_t at = 0; at < row.num_tokens; at += kLanes) {
        const Floats relative = load_padded(row.logits + at, row.num_tokens - at) - row.largest;
        sums = sums + exp(relative);  // of a NaN, 0
    }
    return sum_lanes(sums);
}

}  // namespace
}  // namespace SLIPSTREAM_ISA
