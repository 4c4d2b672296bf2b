// Random bits, and logarithm and exponential that come out the same on every device: noise.py defines them.
//
// Every operation is an IEEE double addition, multiplication or division, rounded on its own: contraction is off.
#pragma once

#include "simd.h"

namespace SLIPSTREAM_ISA {

constexpr int kWide = kLanes / 2;

typedef double Doubles __attribute__((vector_size(kWide * 8)));
typedef uint64_t Wide __attribute__((vector_size(kWide * 8)));
typedef int64_t Weights __attribute__((vector_size(kWide * 8)));
typedef float HalfFloats __attribute__((vector_size(kWide * 4)));

constexpr int kWeightBits = 42;
constexpr int64_t kLargestWeight = int64_t(1) << kWeightBits;

constexpr int kNumRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kKeyStep0 = 0x9E3779B9, kKeyStep1 = 0xBB67AE85;
constexpr int kTokensPerCounter = 4;

// What all tokens of a row share: the counter but for its first word, and the key of every round.
struct NoiseKey {
    uint32_t position, sample_index, redraw;
    uint32_t keys0[kNumRounds], keys1[kNumRounds];
};

inline NoiseKey noise_key(uint64_t seed, uint32_t sample_index, uint32_t redraw, uint32_t position) {
    NoiseKey key{position, sample_index, redraw, {}, {}};
    for (uint32_t round = 0; round < kNumRounds; ++round) {
        key.keys0[round] = uint32_t(seed) + round * kKeyStep0;
        key.keys1[round] = uint32_t(seed >> 32) + round * kKeyStep1;
    }
    return key;
}

inline uint32_t random_bits(const NoiseKey& key, int64_t token) {
    uint32_t c0 = uint32_t(token / kTokensPerCounter), c1 = key.position, c2 = key.sample_index, c3 = key.redraw;
    for (int round = 0; round < kNumRounds; ++round) {
        const uint64_t product0 = uint64_t(c0) * kMultiplier0, product1 = uint64_t(c2) * kMultiplier1;
        c0 = uint32_t(product1 >> 32) ^ c1 ^ key.keys0[round];
        c1 = uint32_t(product1);
        c2 = uint32_t(product0 >> 32) ^ c3 ^ key.keys1[round];
        c3 = uint32_t(product0);
    }
    const uint32_t outputs[kTokensPerCounter] = {c0, c1, c2, c3};
    return outputs[token % kTokensPerCounter];
}

// Products of the low halves of the lanes; what the high halves hold does not matter.
inline Wide multiply_low(Wide a, Wide b) {
#if defined(__AVX512F__)
    return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
    return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// Random bits of tokens [4 * first_counter, + 4 * kNumGroups * kWide), in order. A lane holds a counter's word in its
// low half; several groups of lanes at once hide the latency of the products.
constexpr int kNumGroups = 2;
constexpr int kBlockTokens = kTokensPerCounter * kNumGroups * kWide;

inline void random_block(const NoiseKey& key, uint32_t first_counter, uint32_t* bits) {
    Wide c0[kNumGroups], c1[kNumGroups], c2[kNumGroups], c3[kNumGroups];
    for (int group = 0; group < kNumGroups; ++group) {
        c0[group] = Wide{};
        for (int lane = 0; lane < kWide; ++lane) c0[group][lane] = first_counter + uint32_t(group * kWide + lane);
        c1[group] = Wide{} + key.position;
        c2[group] = Wide{} + key.sample_index;
        c3[group] = Wide{} + key.redraw;
    }
    const Wide multiplier0 = Wide{} + kMultiplier0, multiplier1 = Wide{} + kMultiplier1;
    for (int round = 0; round < kNumRounds; ++round) {
        const Wide key0 = Wide{} + key.keys0[round], key1 = Wide{} + key.keys1[round];
        for (int group = 0; group < kNumGroups; ++group) {
            const Wide product0 = multiply_low(c0[group], multiplier0), product1 = multiply_low(c2[group], multiplier1);
            c0[group] = (product1 >> 32) ^ c1[group] ^ key0;
            c1[group] = product1;
            c2[group] = (product0 >> 32) ^ c3[group] ^ key1;
            c3[group] = product0;
        }
    }
    for (int group = 0; group < kNumGroups; ++group) {
        const Wide front = (c0[group] & 0xFFFFFFFF) | (c1[group] << 32);
        const Wide back = (c2[group] & 0xFFFFFFFF) | (c3[group] << 32);
        for (int lane = 0; lane < kWide; ++lane) {
            const int token = kTokensPerCounter * (group * kWide + lane);
            const uint64_t words[2] = {front[lane], back[lane]};
            std::memcpy(bits + token, words, sizeof words);
        }
    }
}

// Natural logarithm of a positive normal number; noise.py states the bound.
inline double fixed_log(double value) {
    int64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const int64_t exponent = (bits - 0x3FE6A09E667F3BCD) >> 52;
    bits -= exponent * (int64_t(1) << 52);
    double mantissa;
    std::memcpy(&mantissa, &bits, sizeof mantissa);
    const double ratio = (mantissa - 1.0) / (mantissa + 1.0);
    const double square = ratio * ratio;
    double series = 1.0 / 19;
    for (int odd = 17; odd >= 3; odd -= 2) series = series * square + 1.0 / odd;
    const double doubled = ratio + ratio;
    return double(exponent) * 0.693147180559945309417 + (doubled + doubled * (square * series));
}

inline double gumbel(uint32_t bits) { return -fixed_log(-fixed_log((double(bits) + 0.5) * 0x1p-32)); }

// 1 / n!, from n = 11 down to 0.
constexpr double kExpTerms[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                                1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0,        1.0};

// exp(x) for x <= 0 in whole units of 2^-42, half to even; NaN gives 0. noise.py states the bound. Each is one long chain
// of operations, so several vectors go side by side.
template <int kVectors>
inline void fixed_weights(const Doubles (&x)[kVectors], Weights (&weights)[kVectors]) {
    const Doubles round_to_integer = Doubles{} + 0x1.8p52;
    Doubles shifted[kVectors], rest[kVectors], series[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        const Doubles bounded = x[v] > -64.0 ? x[v] : Doubles{} - 64.0;
        shifted[v] = bounded * (1.0 / 0.693147180559945309417) + round_to_integer;
        const Doubles power = shifted[v] - round_to_integer;
        rest[v] = (bounded - power * 0.693147180369123816490) - power * 1.90821492927058770002e-10;
        series[v] = Doubles{} + kExpTerms[0];
    }
    for (int term = 1; term < 12; ++term) {
        for (int v = 0; v < kVectors; ++v) series[v] = series[v] * rest[v] + kExpTerms[term];
    }
    for (int v = 0; v < kVectors; ++v) {
        const Weights scale = ((Weights)shifted[v] + (1023 + kWeightBits)) << 52;  // the low bits of `shifted` are the integer
        const Doubles weight = series[v] * (Doubles)scale + 0x1p52;
        weights[v] = (Weights)weight - (int64_t(0x433) << 52);
    }
}

inline Weights fixed_weights(Doubles x) {
    Weights weights[1];
    fixed_weights<1>({x}, weights);
    return weights[0];
}

}  // namespace SLIPSTREAM_ISA
