// Rows that products read: floats, and where matrices are rounded, bytes too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory.h"

namespace SLIPSTREAM_ISA {

// A row of bytes 64 + q with |q| <= 64, which stand for scale * q; the scale of a row that is not finite is not either.
//
// They are so small because AVX2 adds the products of two bytes with two weights up in 16 bits: 2 * 128 * 127 fit.
struct RoundedRow {
    const uint8_t* bytes;
    float scale;
};

constexpr int kByteOfZero = 64;

class Inputs {
   public:
    Inputs() = default;

    // Room for so many rows of `inner` values, in bytes too if that is `rounds`.
    Inputs(int num_rows, int inner, bool rounds, slipstream::Arena& memory);

    float* row(int place) const { return floats_ + size_t(place) * stride_; }
    RoundedRow rounded(int place) const { return {bytes_ + size_t(place) * byte_stride_, scales_[place]}; }
    bool rounds() const { return bytes_ != nullptr; }

    // Round a row that is whole now; nothing where there are no bytes.
    void round(int place) const;

   private:
    int inner_ = 0, stride_ = 0, byte_stride_ = 0;
    float* floats_ = nullptr;
    uint8_t* bytes_ = nullptr;
    float* scales_ = nullptr;
};

}  // namespace SLIPSTREAM_ISA
