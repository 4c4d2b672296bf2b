// How one row's token is chosen, as Python hands it over.
#pragma once

#include <cstdint>

namespace SLIPSTREAM_ISA {

// `sampling.ROW`, field by field.
struct SampleRow {
    int64_t seed;
    double temperature, top_p, min_p;
    int32_t top_k, sample_index, redraw, position;
};

}  // namespace SLIPSTREAM_ISA
