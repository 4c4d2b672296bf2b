// Choosing tokens and reporting log-probabilities; slipstream_kernels/sampling.py and logprobs.py are the definition, of
// all but shares bit for bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "export.h"
#include "logits.h"
#include "noise.h"
#include "pool.h"
#include "sampling.h"

namespace SLIPSTREAM_ISA {
namespace {

constexpr int64_t kTokensWorthSharing = 1 << 16;  // below it, waking another thread costs what it saves

// ------------------------------------------------------------------------------------------------------- filters

constexpr int kSideBySide = 4;  // vectors of weights
constexpr int kManyWeights = kSideBySide * kWide;

// Weights of kManyWeights logits from `from` on.
template <bool kDivides>
inline void weights_at(const float* from, double largest, double temperature, Weights (&weights)[kSideBySide]) {
    Doubles x[kSideBySide];
    for (int v = 0; v < kSideBySide; ++v) {
        HalfFloats logits;
        std::memcpy(&logits, from + v * kWide, sizeof logits);
        x[v] = __builtin_convertvector(logits, Doubles) - largest;
        if constexpr (kDivides) x[v] = x[v] / temperature;
    }
    fixed_weights(x, weights);
}

// Calls `use(first token, weights of kManyWeights tokens)` for the whole row, the tokens behind its end with weight 0.
template <bool kDivides, class Use>
void each_weight_divided(const Row& row, double temperature, Use use) {
    Weights weights[kSideBySide];
    int64_t at = 0;
    for (; at + kManyWeights <= row.num_tokens; at += kManyWeights) {
        weights_at<kDivides>(row.logits + at, row.largest, temperature, weights);
        use(at, weights);
    }
    if (at == row.num_tokens) return;
    float last[kManyWeights];
    std::fill(std::copy(row.logits + at, row.logits + row.num_tokens, last), last + kManyWeights, -kInfinity);
    weights_at<kDivides>(last, row.largest, temperature, weights);
    use(at, weights);
}

// A division by 1 changes nothing, but takes as long as all the rest.
template <class Use>
void each_weight(const Row& row, double temperature, Use use) {
    temperature == 1.0 ? each_weight_divided<false>(row, temperature, use)
                       : each_weight_divided<true>(row, temperature, use);
}

int64_t sum_from(const std::vector<int64_t>& weights, int64_t smallest) {
    int64_t sum = 0;
    for (const int64_t weight : weights) sum += weight >= smallest ? weight : 0;
    return sum;
}

// The largest number in [reaches, falls_short) for which `is_reached` holds; it does for `reaches`.
template <class IsReached>
int64_t last_reached(int64_t reaches, int64_t falls_short, IsReached is_reached) {
    while (falls_short - reaches > 1) {
        const int64_t middle = reaches + (falls_short - reaches) / 2;
        (is_reached(middle) ? reaches : falls_short) = middle;
    }
    return reaches;
}

// Which weights top-p keeps: those above `weight`, and the first `num_equal` of those that equal it.
struct Nucleus {
    int64_t weight, num_equal;
};

// The weight at which the sum, most likely first, reaches `top_p` of the whole. Nothing is sorted: bisection finds the
// power of two below it, then the weight itself among those between two powers.
Nucleus nucleus_of(const std::vector<int64_t>& weights, double top_p) {
    const double limit = double(sum_from(weights, 0)) * top_p;
    if (!(limit > 0.0)) return {*std::max_element(weights.begin(), weights.end()), 1};
    const int64_t power = last_reached(
        0, kWeightBits + 1, [&](int64_t bit) { return double(sum_from(weights, int64_t(1) << bit)) >= limit; });
    const int64_t low = int64_t(1) << power, high = low * 2;
    std::vector<int64_t>& between = scratch.between;
    between.resize(weights.size() + 1);
    size_t num_between = 0;
    for (const int64_t weight : weights) {
        between[num_between] = weight;
        num_between += weight >= low && weight < high;
    }
    between.resize(num_between);
    const int64_t above = sum_from(weights, high);
    const auto sum = [&](int64_t smallest) { return double(above + sum_from(between, smallest)); };
    const int64_t weight = last_reached(low, high, [&](int64_t smallest) { return sum(smallest) >= limit; });
    int64_t before = above + sum_from(between, weight + 1), num_equal = 0;
    for (; num_equal < int64_t(weights.size()) && double(before) < limit; before += weight) ++num_equal;
    return {weight, num_equal};
}

void remove_below(std::vector<float>& logits, const std::vector<int64_t>& weights, int64_t smallest) {
    for (size_t token = 0; token < logits.size(); ++token) {
        logits[token] = weights[token] >= smallest ? logits[token] : -kInfinity;
    }
}

// The row with the logits that the filters remove at -inf.
Row filtered(const Row& row, const SampleRow& how) {
    std::vector<float>& kept = scratch.kept;
    kept.assign(row.logits, row.logits + row.num_tokens);
    if (how.top_k > 0 && how.top_k < row.num_tokens) {
        const float smallest = kth_largest(row.logits, row.num_tokens, how.top_k);
        for (float& logit : kept) logit = logit >= smallest ? logit : -kInfinity;
    }
    const Row out{kept.data(), row.num_tokens, row.largest};
    if (how.top_p >= 1.0 && how.min_p <= 0.0) return out;
    std::vector<int64_t>& weights = scratch.weights;
    weights.resize(size_t(row.num_tokens + kManyWeights));
    each_weight(out, how.temperature, [&](int64_t at, const Weights (&some)[kSideBySide]) {
        std::memcpy(weights.data() + at, &some, sizeof some);
    });
    weights.resize(size_t(row.num_tokens));
    if (how.top_p < 1.0) {
        const Nucleus nucleus = nucleus_of(weights, how.top_p);
        int64_t num_equal = nucleus.num_equal;
        remove_below(kept, weights, nucleus.weight);
        for (size_t token = 0; token < kept.size(); ++token) {
            if (weights[token] == nucleus.weight && num_equal-- <= 0) kept[token] = -kInfinity;
        }
    }
    remove_below(kept, weights, int64_t(std::ceil(how.min_p * double(kLargestWeight))));
    return out;
}

// -------------------------------------------------------------------------------------------------------- choice

NoiseKey key_of(const SampleRow& how) {
    return noise_key(uint64_t(how.seed), uint32_t(how.sample_index), uint32_t(how.redraw), uint32_t(how.position));
}

struct Scored {
    int32_t token = -1;
    double score = -INFINITY;
};

// The search for the largest scores x + G. A score is computed only where a cheap bound says that it could win.
//
// The bound. Let b be the random bits, c = 2^32 - 1 - b their complement and u = (b + 1/2) / 2^32. From
// -log u >= 1 - u follows G = -log(-log u) <= -log(1 - u) = ln 2 (32 - log2(c + 1/2)), and c + 1/2 >= 2 y with
// y = floor(c / 2). Read as an integer, the bits of the float y are at most 2^23 (127 + log2 y): between powers of two
// they are a chord of the concave log2. So G <= ln 2 (158 - bits / 2^23), and never more than 33 ln 2. Scaled
// logits are bounded from above by a slope a little too flat (they are at most 0), by more than they are rounded; kSlack
// covers every other rounding in single precision.
template <int kNumBest>
class Search {
   public:
    Search(const Row& row, const SampleRow& how)
        : row_(row),
          temperature_(how.temperature),
          slope_(float(std::min((1.0 - 1e-6) / how.temperature, double(FLT_MAX)))),
          key_(key_of(how)) {}

    // The tokens with the largest scores, best first, equals by lowest id; of fewer, the others are -1.
    const Scored* run() {
        int32_t likeliest[kNumBest];
        const int64_t number = std::min<int64_t>(kNumBest, row_.num_tokens);
        if constexpr (kNumBest == 1) {
            likeliest[0] = int32_t(first_of(row_.logits, row_.num_tokens, largest_of(row_.logits, row_.num_tokens)));
        } else {
            best_ids(row_, number, likeliest);
        }
        for (int64_t one = 0; one < number; ++one) consider(likeliest[one], random_bits(key_, likeliest[one]));
        // The filters may have left no more than these.
        if (kNumBest > 1 && best_[kNumBest - 1].token < 0) return best_;
        for (int64_t first = 0; first < row_.num_tokens; first += kBlockTokens) search_block(first);
        return best_;
    }

   private:
    static constexpr double kSlack = 1e-3;
    static constexpr int kVectors = kBlockTokens / kLanes;

    double score(int64_t token, uint32_t bits) const {
        return (double(row_.logits[token]) - double(row_.largest)) / temperature_ + gumbel(bits);
    }

    Floats bounds_of_scaled(Floats logits) const { return max(logits - row_.largest, splat(-FLT_MAX)) * slope_; }

    static Floats bounds_of_noise(Ints bits) {
        const Floats halves = __builtin_convertvector((Ints)(~(Words)bits >> 1), Floats);
        return 109.5172505f - __builtin_convertvector((Ints)halves, Floats) * 8.26295829e-8f;
    }

    void search_block(int64_t first) {
        constexpr float kLargestNoise = 22.875f;
        Floats scaled[kVectors];
        Floats largest = splat(-FLT_MAX);
        for (int one = 0; one < kVectors; ++one) {
            const int64_t at = first + one * kLanes;
            scaled[one] = bounds_of_scaled(at < row_.num_tokens ? load_padded(row_.logits + at, row_.num_tokens - at)
                                                                : splat(-kInfinity));
            largest = max(scaled[one], largest);
        }
        if (!lanes_not_less(largest + kLargestNoise, threshold_)) return;
        uint32_t bits[kBlockTokens];
        random_block(key_, uint32_t(first / kTokensPerCounter), bits);
        for (int one = 0; one < kVectors; ++one) {
            Ints some;
            std::memcpy(&some, bits + one * kLanes, sizeof some);
            for (uint32_t lanes = lanes_not_less(scaled[one] + bounds_of_noise(some), threshold_); lanes;
                 lanes &= lanes - 1) {
                const int64_t index = one * kLanes + __builtin_ctz(lanes);
                if (first + index < row_.num_tokens) consider(first + index, bits[index]);
            }
        }
    }

    void consider(int64_t token, uint32_t bits) {
        Scored next{int32_t(token), score(token, bits)};
        if (!(next.score > -INFINITY)) return;
        for (Scored& one : best_) {
            if (one.token == next.token) return;
            if (next.score > one.score || (next.score == one.score && next.token < one.token)) std::swap(one, next);
        }
        threshold_ = splat(float(best_[kNumBest - 1].score - kSlack));
    }

    const Row row_;
    const double temperature_;
    const float slope_;
    const NoiseKey key_;
    Scored best_[kNumBest];
    Floats threshold_ = splat(-kInfinity);
};

bool is_filtered(const SampleRow& how) { return how.top_k > 0 || how.top_p < 1.0 || how.min_p > 0.0; }

}  // namespace

int32_t choose_one(const float* logits, int64_t num_tokens, const SampleRow& how) {
    const Row row = finite_row(logits, num_tokens);
    if (how.temperature == 0.0) return int32_t(first_of(row.logits, num_tokens, row.largest));
    return Search<1>(is_filtered(how) ? filtered(row, how) : row, how).run()[0].token;
}

void best_choices(const float* logits, int64_t num_tokens, const SampleRow& how, int32_t* tokens, double* shares) {
    constexpr int kNumCompared = 8;  // sampling._NUM_COMPARED
    const Row row = finite_row(logits, num_tokens);
    Scored best[kNumCompared];
    if (how.temperature == 0.0) {
        int32_t likeliest[kNumCompared];
        const int64_t number = std::min<int64_t>(kNumCompared, num_tokens);
        best_ids(row, number, likeliest);
        for (int64_t rank = 0; rank < number; ++rank) {
            if (row.logits[likeliest[rank]] > -kInfinity) best[rank] = {likeliest[rank], row.logits[likeliest[rank]]};
        }
    } else {
        Search<kNumCompared> search(is_filtered(how) ? filtered(row, how) : row, how);
        std::copy_n(search.run(), kNumCompared, best);
    }
    const double scale = how.temperature == 0.0 ? 1.0 : how.temperature;
    const auto weight = [&](const Scored& one) { return std::exp((one.score - best[0].score) * scale); };
    double sum = 0.0;
    for (const Scored& one : best) sum += weight(one);
    for (int rank = 0; rank < kNumChoices; ++rank) {
        tokens[rank] = best[rank].token;
        shares[rank] = weight(best[rank]) / sum;
    }
}

namespace {

// --------------------------------------------------------------------------------------------- log-probabilities

void logprobs_of_one(const Row& row, int32_t token, int64_t num_top, float* out, int32_t* top_ids, float* top_out) {
    Weights sums = {};
    each_weight(row, 1.0, [&](int64_t, const Weights (&some)[kSideBySide]) {
        for (const Weights& one : some) sums += one;
    });
    int64_t sum = 0;
    for (int lane = 0; lane < kWide; ++lane) sum += sums[lane];
    const double log_sum = fixed_log(double(sum) * 0x1p-42);
    const auto logprob = [&](int32_t id) {
        const double relative = double(row.logits[id]) - double(row.largest);
        return relative == relative ? float(relative - log_sum) : -kInfinity;
    };
    *out = logprob(token);
    if (num_top > 0) best_ids(row, num_top, top_ids);
    for (int64_t rank = 0; rank < num_top; ++rank) top_out[rank] = logprob(top_ids[rank]);
}

// ------------------------------------------------------------------------------------------------ rows of a step

// Run `task(row)` for every row, on all threads if there is enough to do. Rows share nothing.
template <class Task>
void for_rows(int64_t num_rows, int64_t num_tokens, Task task) {
    if (num_rows * num_tokens < kTokensWorthSharing || slipstream::num_threads() == 1) {
        for (int64_t row = 0; row < num_rows; ++row) task(row);
        return;
    }
    slipstream::run_pass([&](slipstream::Phases& phases) { phases.run(int(num_rows), task); });
}

}  // namespace
}  // namespace SLIPSTREAM_ISA

extern "C" {

// `chosen[x]` for each of `num_rows` rows of `num_tokens` logits, `row_stride` floats apart.
void SLIPSTREAM_EXPORT(choose)(const float* logits, int64_t row_stride, int64_t num_rows, int64_t num_tokens,
                               const void* rows, int32_t* chosen) {
    using namespace SLIPSTREAM_ISA;
    const SampleRow* const how = static_cast<const SampleRow*>(rows);
    for_rows(num_rows, num_tokens,
             [=](int64_t row) { chosen[row] = choose_one(logits + row * row_stride, num_tokens, how[row]); });
}

// `best_choices` of each row: `tokens` and `shares` [num_rows, kNumChoices].
void SLIPSTREAM_EXPORT(best_choices)(const float* logits, int64_t row_stride, int64_t num_rows, int64_t num_tokens,
                                     const void* rows, int32_t* tokens, double* shares) {
    using namespace SLIPSTREAM_ISA;
    const SampleRow* const how = static_cast<const SampleRow*>(rows);
    for_rows(num_rows, num_tokens, [=](int64_t row) {
        best_choices(logits + row * row_stride, num_tokens, how[row], tokens + row * kNumChoices,
                     shares + row * kNumChoices);
    });
}

// Log-probabilities of `num_rows` rows named by `row_ids`: of `tokens[g]`, and of the `num_top` best of each row.
void SLIPSTREAM_EXPORT(top_logprobs)(const float* logits, int64_t row_stride, int64_t num_tokens,
                                     const int32_t* row_ids, const int32_t* tokens, int64_t num_rows, int64_t num_top,
                                     float* logprobs, int32_t* top_ids, float* top_logprobs) {
    using namespace SLIPSTREAM_ISA;
    for_rows(num_rows, num_tokens, [=](int64_t row) {
        logprobs_of_one(finite_row(logits + row_ids[row] * row_stride, num_tokens), tokens[row], num_top,
                        logprobs + row, top_ids + row * num_top, top_logprobs + row * num_top);
    });
}

// The noise of one row's tokens [0, num_tokens), by the same operations as `choose`.
void SLIPSTREAM_EXPORT(gumbel_noise)(const void* row, int64_t num_tokens, double* noise) {
    using namespace SLIPSTREAM_ISA;
    const NoiseKey key = key_of(*static_cast<const SampleRow*>(row));
    for (int64_t first = 0; first < num_tokens; first += kBlockTokens) {
        uint32_t bits[kBlockTokens];
        random_block(key, uint32_t(first / kTokensPerCounter), bits);
        for (int64_t token = first; token < std::min<int64_t>(first + kBlockTokens, num_tokens); ++token) {
            noise[token] = gumbel(bits[token - first]);
        }
    }
}

}  // extern "C"
