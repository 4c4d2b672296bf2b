#include "inputs.h"

#include <algorithm>
#include <cfloat>

#include "simd.h"

namespace SLIPSTREAM_ISA {
namespace {

constexpr int kLine = 64;  // bytes

// The low byte of the sum's bits is kByteOfZero plus the integer that x / scale rounds to.
constexpr float kToBytes = 12582912.0f + kByteOfZero;

// Values from one row to the next. Rows a power of two apart would all fall into the same few lines of the first-level
// cache; one line more spreads them.
int stride_of(int inner, int per_line) { return (inner + per_line - 1) / per_line * per_line + per_line; }

// The largest of the magnitudes; what is not a number if any of them is not finite.
float largest_of(const float* row, int size) {
    Floats largest = {}, nothing = {};
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Floats value = load(row + i);
        largest = max(largest, max(value, -value));
        nothing += value - value;
    }
    float one = max_lanes(largest), nought = sum_lanes(nothing);
    for (; i < size; ++i) {
        one = std::max(one, std::fabs(row[i]));
        nought += row[i] - row[i];
    }
    return one + nought;
}

}  // namespace

Inputs::Inputs(int num_rows, int inner, bool rounds, slipstream::Arena& memory)
    : inner_(inner),
      stride_(stride_of(inner, kLine / int(sizeof(float)))),
      byte_stride_(stride_of(inner, kLine)),
      floats_(memory.take<float>(size_t(num_rows) * stride_)) {
    if (!rounds) return;
    bytes_ = memory.take<uint8_t>(size_t(num_rows) * byte_stride_);
    scales_ = memory.take<float>(num_rows);
}

void Inputs::round(int place) const {
    if (!rounds()) return;
    const float* const from = row(place);
    uint8_t* const to = bytes_ + size_t(place) * byte_stride_;
    const float largest = largest_of(from, inner_);
    const float scale = largest < FLT_MIN * kByteOfZero ? FLT_MIN : largest / kByteOfZero, inverse = 1.0f / scale;
    int i = 0;
    for (; i + kLanes <= inner_; i += kLanes) {
        const Bytes bytes = low_bytes((Words)fma(load(from + i), splat(inverse), splat(kToBytes)));
        std::memcpy(to + i, &bytes, sizeof bytes);
    }
    for (; i < inner_; ++i) {
        const float sum = fma(from[i], inverse, kToBytes);
        std::memcpy(to + i, &sum, 1);
    }
    scales_[place] = scale;
}

}  // namespace SLIPSTREAM_ISA
