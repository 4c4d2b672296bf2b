// Token Recycling: the matrix, and the scores of the tokens that may follow one; recycling.py is the definition.
#pragma once

#include <algorithm>

#include "noise.h"
#include "sample_row.h"

namespace SLIPSTREAM_ISA {

constexpr int kWidth = 8;  // entries of a row: `recycling.WIDTH`
constexpr int kNumParts = kWidth / kWide;
constexpr int32_t kRoot = -1;
constexpr double kEmpty = -__builtin_inf();
constexpr uint16_t kExponentBits = 0x7C00;  // of fp16; all set: an infinity or NaN

// `recycling.GrowthRule`, field by field.
struct Rule {
    double error_scale, depth_penalty, rank_share, unknown_penalty, rank_probs[kWidth];
};

struct Matrix {
    const void* ids;
    const uint16_t* logprobs;
    int32_t id_bytes, vocab_size;

    int32_t id(int64_t at) const {
        return id_bytes == 2 ? static_cast<const uint16_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
    }
};

// Exact; what is no number is an empty entry.
inline double from_half(uint16_t bits) {
    const uint16_t exponent = (bits & kExponentBits) >> 10, fraction = bits & 0x3FF;
    if (exponent == 31) return kEmpty;
    double magnitude = fraction * 0x1p-24;
    if (exponent != 0) {
        const uint64_t wide = uint64_t(exponent + 1008) << 52 | uint64_t(fraction) << 42;
        std::memcpy(&magnitude, &wide, sizeof magnitude);
    }
    return bits & 0x8000 ? -magnitude : magnitude;
}

// ------------------------------------------------------------------------------------- noise of a row's eight tokens

// `fixed_log` on every lane.
inline Doubles fixed_logs(Doubles values) {
    const Weights exponents = ((Weights)values - 0x3FE6A09E667F3BCD) >> 52;
    const Doubles mantissas = (Doubles)((Weights)values - (exponents << 52));
    const Doubles ratios = (mantissas - 1.0) / (mantissas + 1.0);
    const Doubles squares = ratios * ratios;
    Doubles series = Doubles{} + 1.0 / 19;
    for (int odd = 17; odd >= 3; odd -= 2) series = series * squares + 1.0 / odd;
    const Doubles doubled = ratios + ratios;
    return __builtin_convertvector(exponents, Doubles) * 0.693147180559945309417 +
           (doubled + doubled * (squares * series));
}

// `gumbel(random_bits(key, token))` of every lane's token: each lane runs the counter of its own token.
inline Doubles noise_of(const NoiseKey& key, Wide tokens) {
    Wide c0 = tokens / kTokensPerCounter, c1 = Wide{} + key.position;
    Wide c2 = Wide{} + key.sample_index, c3 = Wide{} + key.redraw;
    const Wide multiplier0 = Wide{} + kMultiplier0, multiplier1 = Wide{} + kMultiplier1;
    for (int round = 0; round < kNumRounds; ++round) {
        const Wide product0 = multiply_low(c0, multiplier0), product1 = multiply_low(c2, multiplier1);
        c0 = (product1 >> 32) ^ c1 ^ key.keys0[round];
        c1 = product1;
        c2 = (product0 >> 32) ^ c3 ^ key.keys1[round];
        c3 = product0;
    }
    const Wide which = tokens % kTokensPerCounter;
    const Wide bits = (which < 2 ? (which == 0 ? c0 : c1) : (which == 2 ? c2 : c3)) & 0xFFFFFFFF;
    const Doubles uniform = (__builtin_convertvector((Weights)bits, Doubles) + 0.5) * 0x1p-32;
    return -fixed_logs(-fixed_logs(uniform));
}

// --------------------------------------------------------------------------------------------------- one row's scores

// The candidates behind one node; an entry without a score above -inf is none.
struct Children {
    int32_t tokens[kWidth];
    double scores[kWidth];
};

inline Doubles load_doubles(const double* from) {
    Doubles value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store_doubles(double* to, Doubles value) { std::memcpy(to, &value, sizeof value); }

// Scores of the tokens that may follow, for one request.
class Scorer {
   public:
    Scorer(const Matrix& matrix, const SampleRow& draw, const Rule& rule)
        : matrix_(matrix),
          rule_(rule),
          temperature_(draw.temperature),
          first_position_(uint32_t(draw.position)),
          key_(noise_key(uint64_t(draw.seed), uint32_t(draw.sample_index), uint32_t(draw.redraw), 0)) {}

    // The candidates behind `token`, at `depth` (1: the root's children), when their parent has `score`.
    void children_of(int32_t token, int32_t depth, double score, Children& out) {
        double values[kWidth];
        if (!read(token, out.tokens, values)) {
            if (!read(matrix_.vocab_size, out.tokens, values)) {
                std::fill_n(out.scores, kWidth, kEmpty);
                return;
            }
            score -= rule_.unknown_penalty;
        }
        key_.position = first_position_ + uint32_t(depth - 1);
        double largest = kEmpty;
        for (int part = 0; part < kNumParts; ++part) weigh(part * kWide, out.tokens, values);
        for (int rank = 0; rank < kWidth; ++rank) largest = std::max(largest, values[rank]);
        int64_t sum = 0;
        for (int part = 0; part < kNumParts; ++part) {
            const Doubles relative = load_doubles(values + part * kWide) - largest;
            store_doubles(values + part * kWide, relative);
            const Weights weights = fixed_weights(relative);
            for (int lane = 0; lane < kWide; ++lane) sum += weights[lane];
        }
        const double log_sum = fixed_log(double(sum) * 0x1p-42);
        for (int rank = 0; rank < kWidth; ++rank) {
            out.scores[rank] = score + ((values[rank] - log_sum) - rule_.depth_penalty);
        }
    }

   private:
    // The entries of a row; whether there is one that is not empty.
    bool read(int32_t row, int32_t* tokens, double* logprobs) const {
        bool is_known = false;
        for (int rank = 0; rank < kWidth; ++rank) {
            const int64_t at = int64_t(row) * kWidth + rank;
            tokens[rank] = matrix_.id(at);
            logprobs[rank] = from_half(matrix_.logprobs[at]);
            is_known |= logprobs[rank] != kEmpty;
        }
        return is_known;
    }

    // What the softmax is taken of, in place of the log-probabilities from rank `first` on.
    void weigh(int first, const int32_t* tokens, double* values) const {
        const Doubles logprobs = load_doubles(values + first);
        Doubles value = logprobs;
        if (rule_.rank_share != 0.0) {
            const Doubles stored = __builtin_convertvector(fixed_weights(logprobs), Doubles) * 0x1p-42;
            value = fixed_logs(stored * (1.0 - rule_.rank_share) +
                               load_doubles(rule_.rank_probs + first) * rule_.rank_share);
        }
        if (temperature_ != 0.0) {
            Wide ids;
            for (int lane = 0; lane < kWide; ++lane) ids[lane] = uint64_t(tokens[first + lane]);
            value = value + noise_of(key_, ids) * temperature_;
        }
        value = value / rule_.error_scale;
        store_doubles(values + first, logprobs > kEmpty ? value : Doubles{} + kEmpty);
    }

    const Matrix& matrix_;
    const Rule& rule_;
    const double temperature_;
    const uint32_t first_position_;
    NoiseKey key_;
};

}  // namespace SLIPSTREAM_ISA
