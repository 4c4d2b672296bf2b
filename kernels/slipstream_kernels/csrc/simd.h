// Vectors of one instruction set. Every source is compiled once per set into its own namespace (SLIPSTREAM_ISA).
//
// Contraction is off (-ffp-contract=off), so a fused multiply-add happens exactly where `fma` is written.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace SLIPSTREAM_ISA {

// A tile of a product keeps kMaxTileRows rows x kStripVectors vectors of sums in registers, beside the weights they are
// made of and one input.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32, kStripVectors = 4, kMaxTileRows = 6;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16, kStripVectors = 2, kMaxTileRows = 6;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16, kStripVectors = 2, kMaxTileRows = 6;
#endif

// Whether products are made of matrix tiles (tiles.h).
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define SLIPSTREAM_TILES 1
#else
#define SLIPSTREAM_TILES 0
#endif
constexpr bool kHasTiles = SLIPSTREAM_TILES;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

inline Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline Ints load(const int32_t* from) {
    Ints value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Of bf16.
inline Floats load(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// Not `Floats{} + value`: an addition of zero is no broadcast to a compiler that respects -0.
inline Floats splat(float value) {
#if defined(__AVX512F__)
    return _mm512_set1_ps(value);
#elif defined(__AVX2__)
    return _mm256_set1_ps(value);
#else
    return Floats{value, value, value, value};
#endif
}

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
    Floats out;
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return out;
#else
    return a * b + c;
#endif
}

// The same operation on one lane: what a vector computes lane by lane, a scalar loop may compute too.
inline float fma(float a, float b, float c) {
#if defined(__AVX2__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// sums[lane] += the four bytes of `quad`, from 0 to 128, times the four of weights[lane], from -127 to 127.
inline Ints add_products(Ints sums, uint32_t quad, Words weights) {
#if defined(__AVX512F__)
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_set1_epi32(int(quad)), (__m512i)weights);
    return (Ints)_mm512_add_epi32((__m512i)sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(int(quad)), (__m256i)weights);
    return (Ints)_mm256_add_epi32((__m256i)sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    for (int byte = 0; byte < 4; ++byte) {
        sums += ((Ints)(weights << (24 - 8 * byte)) >> 24) * int32_t(quad >> 8 * byte & 0xFF);
    }
    return sums;
#endif
}

inline Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }

inline Bytes low_bytes(Words value) { return __builtin_convertvector(value, Bytes); }

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

// Sum of the lanes, from the first to the last.
inline float sum_lanes(Floats value) {
    float total = value[0];
    for (int lane = 1; lane < kLanes; ++lane) total += value[lane];
    return total;
}

inline float max_lanes(Floats value) {
    float largest = value[0];
    for (int lane = 1; lane < kLanes; ++lane) largest = value[lane] > largest ? value[lane] : largest;
    return largest;
}

inline float bf16_to_float(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline float to_float(float value) { return value; }
inline float to_float(uint16_t bits) { return bf16_to_float(bits); }

// To the nearest, of two as near the even one.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (std::isnan(value)) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// e^x with a relative error below 2e-7; 0 below -87.3, as for -inf.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7 (remainder below 6e-9).
inline Floats exp(Floats x) {
    const Floats is_kept = (Floats)(x > -87.3f);
    const Floats bounded = max(x > 88.0f ? splat(88.0f) : x, splat(-87.3f));
    const Floats shifted = fma(bounded, splat(1.44269504f), splat(12582912.0f));  // rounds to an integer
    const Floats n = shifted - 12582912.0f;
    Floats r = fma(n, splat(-0.693359375f), bounded);
    r = fma(n, splat(2.12194440e-4f), r);
    Floats sum = splat(1.0f / 5040);
    sum = fma(sum, r, splat(1.0f / 720));
    sum = fma(sum, r, splat(1.0f / 120));
    sum = fma(sum, r, splat(1.0f / 24));
    sum = fma(sum, r, splat(1.0f / 6));
    sum = fma(sum, r, splat(0.5f));
    sum = fma(sum, r, splat(1.0f));
    sum = fma(sum, r, splat(1.0f));
    const Ints exponent = ((Ints)shifted - 0x4B400000) << 23;
    const Ints scaled = (Ints)sum + exponent;
    return (Floats)(scaled & (Ints)is_kept);
}

}  // namespace SLIPSTREAM_ISA
