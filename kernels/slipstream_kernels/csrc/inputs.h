// Rows that products read: floats, and beside them what else a product may read, bytes or bf16 parts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory.h"
#include "simd.h"

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

// A float is the sum of so many bf16, each the upper half of what those before it leave: 24 bits in three times eight.
constexpr int kParts = 3;

// Rows as tiles are loaded from them, `stride` bytes apart: of every row its bytes, or its parts, the largest first.
struct TileRows {
    const uint8_t* data;
    long stride;
};

// What products with a matrix read: the floats of a row, its parts where the processor multiplies tiles of bf16, or,
// where matrices are int8, its bytes.
enum class Form { kFloats, kParts, kBytes };

constexpr Form form_for(bool packs_int8) {
    return packs_int8 ? Form::kBytes : kHasTiles ? Form::kParts : Form::kFloats;
}

// Where the rows lie; a copy shows the same ones.
class Inputs {
   public:
    Inputs() = default;

    // Room for so many rows of `inner` values: floats, and beside them the other form.
    Inputs(int num_rows, int inner, Form form, slipstream::Arena& memory);

    float* row(int place) const { return floats_ + size_t(place) * stride_; }

    // Make the other form of a row that is whole now.
    void convert(int place) const;

    // Make the parts of some values of a row, others of which may not be there yet; nothing if it has none.
    void split(int place, int first, int size) const;

    // Whether rows have a form that `split` does not make.
    bool needs_whole_rows() const { return form_ == Form::kBytes; }

    // Take over a row of others of the same form, converted as it is.
    void copy(int place, const Inputs& others, int from) const;

    // Of rows that were converted, from this place on.
    RoundedRow rounded(int place) const { return {other_of(place), scales_[place]}; }
    TileRows tile_rows(int place) const { return {other_of(place), other_stride_}; }

   private:
    void round(int place) const;
    int num_tile_rows() const { return form_ == Form::kParts ? kParts : 1; }
    uint8_t* other_of(int place) const { return other_ + size_t(place) * num_tile_rows() * other_stride_; }

    Form form_ = Form::kFloats;
    int inner_ = 0, stride_ = 0, other_stride_ = 0;  // in floats, and in bytes
    float* floats_ = nullptr;
    uint8_t* other_ = nullptr;
    float* scales_ = nullptr;  // of rows of bytes
};

}  // namespace SLIPSTREAM_ISA
