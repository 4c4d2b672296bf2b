// How one row's token is chosen, and what ends an output, as Python hands them over.
#pragma once

#include <algorithm>
#include <cstdint>

namespace SLIPSTREAM_ISA {

// `sampling.ROW`, field by field.
struct SampleRow {
    int64_t seed;
    double temperature, top_p, min_p;
    int32_t top_k, sample_index, redraw, position;
};

// The tokens that end a request's output: `sampling.StopTokens`, field by field; those of request b end before ends[b].
struct StopTokens {
    const int32_t *ids, *ends;

    bool has(int32_t request, int32_t token) const {
        const int32_t first = request > 0 ? ends[request - 1] : 0;
        return std::find(ids + first, ids + ends[request], token) != ids + ends[request];
    }
};

}  // namespace SLIPSTREAM_ISA
