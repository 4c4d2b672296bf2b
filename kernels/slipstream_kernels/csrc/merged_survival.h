// What the candidates for one node survive beside each other: `slipstream.drafting.merged_survival` says how.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace SLIPSTREAM_ISA {

constexpr int32_t kNumSources = 3, kNumSets = 1 << kNumSources, kNumWeights = kNumSources + 1;
constexpr double kSurest = 1e-4;  // no survival counts as less than this, or as nearer to 1
constexpr double kRate = 0.15, kKept = 0.9999, kLeastSquare = 1.0;

// What its drafters say of a candidate. Bit s of `sources` is set if source s proposes it; then that many log-odds.
struct Said {
    int32_t sources = 0;
    double log_odds[kNumSources] = {};

    void add(int32_t source, double survival) {
        const double bounded = std::min(std::max(survival, kSurest), 1.0 - kSurest);
        const double odds = std::log(bounded / (1.0 - bounded));
        log_odds[source] = sources >> source & 1 ? std::max(log_odds[source], odds) : odds;
        sources |= 1 << source;
    }
};

// `merging._MergedWeights`, field by field.
struct MergedSurvival {
    double *weights, *squares;  // [kNumSets, kNumWeights]
    double* curve;              // [3, kNumBins]

    double utility(const Said& said) const {
        const double* const own = weights + said.sources * kNumWeights;
        double sum = own[kNumSources];
        for (int32_t source = 0; source < kNumSources; ++source) sum += own[source] * said.log_odds[source];
        return sum;
    }

    // Of the log-likelihood of what came behind one node.
    struct Gradient {
        int32_t seen = 0;  // bit by set
        double of[kNumSets][kNumWeights] = {};

        void add(const Said& said, double surprise) {
            double* const own = of[said.sources];
            for (int32_t source = 0; source < kNumSources; ++source) own[source] += surprise * said.log_odds[source];
            own[kNumSources] += surprise;
            seen |= 1 << said.sources;
        }
    };

    void learn(const Gradient& gradient) const {
        for (int32_t set = 0; set < kNumSets; ++set) {
            if (!(gradient.seen >> set & 1)) continue;
            for (int32_t one = 0; one < kNumWeights; ++one) {
                const double slope = gradient.of[set][one];
                double& square = squares[set * kNumWeights + one];
                square = std::max(kKept * square + slope * slope, kLeastSquare);
                weights[set * kNumWeights + one] += kRate * slope / std::sqrt(square);
            }
        }
    }
};

}  // namespace SLIPSTREAM_ISA
