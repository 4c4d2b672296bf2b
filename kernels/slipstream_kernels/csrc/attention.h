// Attention of query heads over committed positions in blocks, then over the row's ancestors in a draft tree.
//
// There is exactly one key per position 0..n-1, so lanes and chunks follow absolute positions: scores, their
// exponentials' sum and the weighted values come out the same whether a key was read from a block or a node slot, and
// whatever other rows attend together with this one.
#pragma once

#include "inputs.h"

namespace SLIPSTREAM_ISA {

constexpr int kBlock = 16;  // positions per block of the cache

// Where one layer's and key head's keys and values lie, as floats or, for uint16_t, bf16. A block holds keys as
// [head_dim][kBlock] (lanes are positions) and values as [kBlock][head_dim]; node slots lie in blocks of their own.
template <class Stored>
struct HeadCache {
    const Stored *keys, *values;  // of block 0
    long stride;                  // from block to block
    int first_node_block;

    const Stored* keys_of(int block) const { return keys + block * stride; }
    const Stored* values_of(int block) const { return values + block * stride; }
};

// The query heads of one row that share a key head [num_heads, head_dim], how many positions are committed before it,
// its ancestors' node slots in order of depth, and where what it attends to goes [num_heads, head_dim].
struct AttendingRow {
    const float* heads;
    const int* ancestors;
    int num_committed, num_ancestors;
    float* out;

    int num_positions() const { return num_committed + num_ancestors; }
};

constexpr int kMaxTogether = 4;  // query heads, of one row or several, that run side by side

// Floats that `attend` needs for scores.
inline size_t scores_size(int num_positions, int num_node_slots) {
    return size_t(kMaxTogether) * (round_up(num_positions, kBlock) + round_up(num_node_slots, kBlock));
}

// `num_rows` rows of one sequence, whose committed positions lie in the blocks of `table`. `scores` has room for
// scores_size of their positions and of all node slots.
template <class Stored>
void attend(const HeadCache<Stored>& cache, const int* table, const AttendingRow* rows, int num_rows, int num_heads,
            int head_dim, float* scores);

}  // namespace SLIPSTREAM_ISA
