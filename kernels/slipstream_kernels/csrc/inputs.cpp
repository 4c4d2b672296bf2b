#include "inputs.h"

#include <algorithm>
#include <cfloat>

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

Inputs::Inputs(int num_rows, int inner, Form form, slipstream::Arena& memory)
    : form_(form),
      inner_(inner),
      stride_(stride_of(inner, kLine / int(sizeof(float)))),
      floats_(memory.take<float>(size_t(num_rows) * stride_)) {
    if (form == Form::kBytes) {
        other_stride_ = stride_of(inner, kLine);
        other_ = memory.take<uint8_t>(size_t(num_rows) * other_stride_);
        scales_ = memory.take<float>(num_rows);
    } else if (form == Form::kParts) {
        other_stride_ = stride_of(inner * int(sizeof(uint16_t)), kLine);
        const size_t size = size_t(num_rows) * num_tile_rows() * other_stride_;
        other_ = memory.take<uint8_t>(size);
        // Tiles read whole lines. Where values end within one, what follows them is zero, now and for ever.
        if (inner * sizeof(uint16_t) % kLine != 0) std::memset(other_, 0, size);
    }
}

void Inputs::convert(int place) const {
    if (needs_whole_rows()) round(place);
    split(place, 0, inner_);
}

void Inputs::copy(int place, const Inputs& others, int from) const {
    std::copy_n(others.row(from), inner_, row(place));
    if (form_ == Form::kFloats) return;
    std::copy_n(others.other_of(from), size_t(num_tile_rows()) * other_stride_, other_of(place));
    if (form_ == Form::kBytes) scales_[place] = others.scales_[from];
}

void Inputs::round(int place) const {
    const float* const from = row(place);
    uint8_t* const to = other_of(place);
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

void Inputs::split(int place, int first, int size) const {
    if (form_ != Form::kParts) return;
    const float* const from = row(place);
    uint8_t* const to = other_of(place);
    const auto split_some = [&](int i, Floats rest, int number) {
        for (int part = 0; part < kParts; ++part) {
            const Words upper = (Words)rest & 0xFFFF0000u;
            const Halves halves = __builtin_convertvector(upper >> 16, Halves);
            std::memcpy(to + part * other_stride_ + i * sizeof(uint16_t), &halves, number * sizeof(uint16_t));
            rest -= (Floats)upper;
        }
    };
    int i = first;
    for (; i + kLanes <= first + size; i += kLanes) split_some(i, load(from + i), kLanes);
    if (i == first + size) return;
    Floats last = {};
    std::memcpy(&last, from + i, (first + size - i) * sizeof(float));
    split_some(i, last, first + size - i);
}

}  // namespace SLIPSTREAM_ISA
