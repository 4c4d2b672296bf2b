// Attention of query heads over committed positions in blocks, then over the query's ancestors in a draft tree.
//
// There is exactly one key per position 0..n-1, so lanes and chunks follow absolute positions: scores, their
// exponentials' sum and the weighted values come out the same whether a key was read from a block or a node slot.
#pragma once

#include "simd.h"

namespace SLIPSTREAM_ISA {

constexpr int kBlock = 16;  // positions per block of the cache

// Where one layer's and key head's keys and values lie. A block holds keys as [head_dim][kBlock] (lanes are positions)
// and values as [kBlock][head_dim]; a node slot holds [head_dim] each. Strides are in floats.
struct HeadCache {
    const float *block_keys, *block_values;
    const float *node_keys, *node_values;
    long block_stride, node_stride;
};

// One row's query heads that share a key head [num_heads, head_dim], its committed positions in the blocks of `table`,
// and its ancestors' node slots in order of depth.
struct Query {
    const float* heads;
    int num_heads;
    const int* table;
    const int* ancestors;
    int num_committed, num_ancestors;
};

// Floats that `attend` needs for scores.
inline int scores_size(int num_positions) { return 2 * ((num_positions + kBlock - 1) / kBlock * kBlock + kBlock); }

// out[num_heads, head_dim]; `scores` has room for scores_size of the query's positions.
void attend(const HeadCache& cache, const Query& query, int head_dim, float* scores, float* out);

}  // namespace SLIPSTREAM_ISA
