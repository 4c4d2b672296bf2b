// Cells of survival estimates, and calibration curves: `slipstream.drafting.survival` says what they are.
#pragma once

#include <algorithm>
#include <cstdint>

namespace SLIPSTREAM_ISA {

constexpr int32_t kNumDepths = 8, kNumBins = 20;
constexpr int32_t kDepthCells[] = {0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7};
constexpr double kScoreEdges[] = {0.01, 0.03, 0.06, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97};
constexpr int32_t kNumScoreLevels = 1 + int32_t(sizeof kScoreEdges / sizeof *kScoreEdges);

inline int32_t score_level(double score) {
    int32_t level = 0;
    for (const double edge : kScoreEdges) level += score >= edge;  // a NaN is below all
    return level;
}

inline int32_t depth_cell(int32_t depth) {
    constexpr int32_t kLast = int32_t(sizeof kDepthCells / sizeof *kDepthCells) - 1;
    return kDepthCells[std::min(depth, kLast)];
}

// Another trial of a calibration curve, [3, kNumBins]: trials, the sum of their predictions, accepted.
inline void count_on(double* curve, double predicted, bool has_come) {
    const int32_t bin = std::min(int32_t(predicted * kNumBins), kNumBins - 1);
    curve[bin] += 1.0;
    curve[kNumBins + bin] += predicted;
    curve[2 * kNumBins + bin] += has_come;
}

}  // namespace SLIPSTREAM_ISA
