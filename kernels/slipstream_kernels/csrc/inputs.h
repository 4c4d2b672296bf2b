// Rows that products read: floats, and where matrices are rounded, bytes too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory.h"

namespace SLIPSTREAM_ISA {

using slipstream::kLine;

inline int round_up(int number, int multiple) { return (number + multiple - 1) / multiple * multiple; }

constexpr int kMostSteps = 64;  // a rounded value is that many steps of its row at most
constexpr uint8_t kByteOfZero = kMostSteps;

// A row of bytes kByteOfZero + q, which stand for scale * q; the scale of a row that is not finite is not either.
//
// Steps are so few because AVX2 adds the products of two bytes with two weights up in 16 bits: 2 * 128 * 127 fit.
struct RoundedRow {
    const uint8_t* bytes;
    float scale;
};

// Where the rows lie; a copy shows the same ones.
class Inputs {
   public:
    Inputs() = default;

    // Room for so many rows of `inner` values, with bytes beside the floats or without.
    Inputs(int num_rows, int inner, bool with_bytes, slipstream::Arena& memory);

    float* row(int place) const { return floats_ + size_t(place) * stride_; }

    bool has_bytes() const { return bytes_ != nullptr; }
    // Make the bytes of a row that is whole now; nothing where there are none.
    void round(int place) const;
    // Of a row that was rounded.
    RoundedRow rounded(int place) const { return {bytes_ + size_t(place) * byte_stride_, scales_[place]}; }

   private:
    int inner_ = 0, stride_ = 0, byte_stride_ = 0;
    float* floats_ = nullptr;
    uint8_t* bytes_ = nullptr;
    float* scales_ = nullptr;
};

}  // namespace SLIPSTREAM_ISA
