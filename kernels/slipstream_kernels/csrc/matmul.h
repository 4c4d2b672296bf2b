// Products of a few rows with a packed weight matrix: out[row][o] = sum over i of x[row][i] * weight[o][i].
//
// The sum runs over i from first to last in one fused multiply-add chain per output, outputs side by side in vectors.
// So a row's result does not depend on how many rows share the tile, on the tile's width, or on threads.
#pragma once

#include <cstddef>

#include "abi.h"
#include "simd.h"

namespace SLIPSTREAM_ISA {

constexpr int kVectors = 4;
constexpr int kPanel = kVectors * kLanes;  // outputs that are computed together

// A weight matrix [outputs, inner] in panels, each contiguous: for every pair of inner indices, kPanel words that hold
// two bf16 (the even index in the low half); or for every inner index kPanel fp32. A pass reads it once, in order.
class Packed {
   public:
    Packed() = default;
    Packed(const Packed&) = delete;
    Packed& operator=(const Packed&) = delete;
    ~Packed();

    // `order[o]` is the source row of output o, -1 for zeros; source is row-major [rows, inner]. False without memory.
    bool pack(const void* source, SlipstreamType type, int inner, const int* order, int num_outputs);

    int num_panels() const { return num_panels_; }
    int num_outputs() const { return num_outputs_; }
    int inner() const { return inner_; }
    size_t num_bytes() const { return panel_bytes_ * num_panels_; }

    // out[row][0..kPanel) of one panel for `num_rows` rows; `out` is row-major with stride kPanel.
    void product(int panel, const float* const* rows, int num_rows, float* out) const;

   private:
    char* data_ = nullptr;
    size_t panel_bytes_ = 0;
    int num_panels_ = 0, num_outputs_ = 0, inner_ = 0;
    SlipstreamType type_ = kFp32;
};

}  // namespace SLIPSTREAM_ISA
