// Products of a few rows with a packed weight matrix: out[row][o] = sum over i of x[row][i] * weight[o][i].
//
// The sum runs over i from first to last in one fused multiply-add chain per output, outputs side by side in vectors;
// with int8 it is one of integers, exact in any order; with matrix tiles it is one of each of a row's parts (tiles.h). So
// a row's result does not depend on how many rows are multiplied together, nor on threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <vector>

#include "abi.h"
#include "inputs.h"
#include "memory.h"
#include "pool.h"
#include "simd.h"

namespace SLIPSTREAM_ISA {

using slipstream::Arena;

constexpr int kVectors = 4;
constexpr int kPanel = kVectors * kLanes;       // outputs that one task computes
constexpr int kStrip = kStripVectors * kLanes;  // outputs whose weights lie together
static_assert(kPanel % kStrip == 0 && (!kHasTiles || kPanel == kStrip));

constexpr int kRowsAtOnce = 48;  // rows whose outputs of a panel stay in the first-level cache

// A tensor as it is handed over, and what it is packed in.
struct Source {
    const void* data;
    SlipstreamType type, packed_type;

    float at(size_t index) const {
        return type == kBf16 ? bf16_to_float(static_cast<const uint16_t*>(data)[index])
                             : static_cast<const float*>(data)[index];
    }
};

// A weight matrix [outputs, inner] in strips of kStrip outputs, each contiguous: groups of kStrip words of four bytes, one
// group after the other. A word holds one fp32, two bf16 or four int8 of an output, the first inner index in its low bits.
// A pass reads it once, in order. Where products are made of tiles (tiles.h), strips of bf16 and int8 are in their order
// instead, and words are padded to whole tiles. With int8, weight = scale of its output * integer, the largest of an output being 127,
// and products are with rows that were rounded (Inputs).
class Packed {
   public:
    // `order[o]` is the source row of output o, -1 for zeros; source is row-major [rows, inner]. Weights lie in `memory`.
    void pack(const Source& source, int inner, const int* order, int num_outputs, Arena& memory);

    int num_panels() const { return num_panels_; }
    int num_outputs() const { return num_outputs_; }

    bool is_rounded() const { return type_ == kInt8; }

    // out[i][0..kPanel) of one panel for the rows at `places`, up to kRowsAtOnce; `out` is row-major with stride kPanel.
    // Where rows are read in tiles, places are neighbours.
    void product(int panel, const Inputs& inputs, const int* places, int num_rows, float* out) const;

   private:
    char* strip_of(int output) const { return data_ + size_t(output / kStrip) * strip_bytes_; }

    // `first` is where the output's row begins in the source.
    void pack_output(const Source& source, size_t first, int inner, int output);
    void pack_rounded(const Source& source, size_t first, int inner, int output);

    char* data_ = nullptr;
    size_t strip_bytes_ = 0;
    int num_panels_ = 0, num_outputs_ = 0;
    int num_words_ = 0;  // of an output
    SlipstreamType type_ = kFp32;
    // Of outputs, padded to panels, only with int8.
    std::vector<float> scales_;
    std::vector<int32_t> offsets_;  // kByteOfZero times all integers of an output: what it adds to every product
};

// Call `take(i, outputs of the panel)` for i = 0, 1, ...; `place(i)` is where the i-th row lies in `inputs`.
template <class Place, class Take>
void panel_product(const Packed& matrix, int panel, const Inputs& inputs, int num_rows, Place place, Take take) {
    alignas(64) float outputs[kRowsAtOnce * kPanel];
    int places[kRowsAtOnce];
    for (int first = 0; first < num_rows; first += kRowsAtOnce) {
        const int size = std::min(kRowsAtOnce, num_rows - first);
        for (int i = 0; i < size; ++i) places[i] = place(first + i);
        matrix.product(panel, inputs, places, size, outputs);
        for (int i = 0; i < size; ++i) take(first + i, outputs + i * kPanel);
    }
}

// out[row] = matrix * inputs[row], rows of `out` out_stride floats apart; a task is a panel of outputs. What a panel holds
// beyond out_stride is left out.
inline void matrix_product(slipstream::Phases& phases, const Packed& matrix, const Inputs& inputs, int num_rows, float* out,
                           int out_stride) {
    phases.run(matrix.num_panels(), [&](int panel) {
        const int first = panel * kPanel, width = std::min(kPanel, out_stride - first);
        const auto take = [&](int row, const float* outputs) {
            std::copy(outputs, outputs + width, out + size_t(row) * out_stride + first);
        };
        panel_product(matrix, panel, inputs, num_rows, [](int row) { return row; }, take);
    });
}

// The order of a matrix whose outputs stand as in its source.
inline std::vector<int> in_order(int size) {
    std::vector<int> order(size);
    std::iota(order.begin(), order.end(), 0);
    return order;
}

}  // namespace SLIPSTREAM_ISA
