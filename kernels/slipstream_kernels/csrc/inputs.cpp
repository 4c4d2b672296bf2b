#include "inputs.h"

#include <algorithm>
#include <cfloat>

#include "simd.h"

namespace SLIPSTREAM_ISA {
namespace {

// 1.5 * 2^23, where floats are one apart: the low byte of x / scale + kToBytes is kByteOfZero plus the integer nearest.
constexpr float kToBytes = 12582912.0f + kByteOfZero;

// Values from one row to the next. Rows a power of two apart would all fall into the same few lines of the first-level
// cache; one line more spreads them.
int stride_of(int inner, int per_line) { return round_up(inner, per_line) + per_line; }

// The largest magnitude of a row; not finite if any value is not.
float largest_magnitude(const float* row, int size) {
    Floats largest = {}, not_finite = {};  // value - value is 0, or not a number where the value is not finite
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Floats value = load(row + i);
        largest = max(largest, max(value, -value));
        not_finite += value - value;
    }
    float largest_one = max_lanes(largest), not_finite_one = sum_lanes(not_finite);
    for (; i < size; ++i) {
        largest_one = std::max(largest_one, std::fabs(row[i]));
        not_finite_one += row[i] - row[i];
    }
    return largest_one + not_finite_one;
}

}  // namespace

Inputs::Inputs(int num_rows, int inner, bool with_bytes, slipstream::Arena& memory)
    : inner_(inner),
      stride_(stride_of(inner, kLine / int(sizeof(float)))),
      byte_stride_(stride_of(inner, kLine)),
      floats_(memory.take<float>(size_t(num_rows) * stride_)) {
    if (!with_bytes) return;
    bytes_ = memory.take<uint8_t>(size_t(num_rows) * byte_stride_);
    scales_ = memory.take<float>(num_rows);
}

void Inputs::round(int place) const {
    if (!has_bytes()) return;
    const float* const from = row(place);
    uint8_t* const to = bytes_ + size_t(place) * byte_stride_;
    const float largest = largest_magnitude(from, inner_);
    const float scale = largest < FLT_MIN * kMostSteps ? FLT_MIN : largest / kMostSteps, inverse = 1.0f / scale;
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
