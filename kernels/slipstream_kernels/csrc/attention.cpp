#include "attention.h"

#include <algorithm>
#include <type_traits>

namespace SLIPSTREAM_ISA {
namespace {

constexpr int kBlockVectors = kBlock / kLanes;

// What is computed with: vectors, or single values where the head's size is no multiple of them.
template <class Value, class Stored>
Value read(const Stored* from) {
    if constexpr (std::is_same_v<Value, Floats>) return load(from);
    else return to_float(*from);
}

template <class Value>
Value spread(float value) {
    if constexpr (std::is_same_v<Value, Floats>) return splat(value);
    else return value;
}

// kCount query heads that run side by side: what is loaded for one serves the others.
template <class Stored, int kCount>
struct Queries {
    // As many blocks, or vectors of the output, as leave their sums half of the registers: at most four, which hide the
    // latency of an addition.
    static constexpr int kBlocks = std::clamp(kRegisters / 2 / (kCount * kBlockVectors), 1, 4);
    static constexpr int kWidth = std::clamp(kRegisters / 2 / kCount, 1, 4);

    const HeadCache<Stored>& cache;
    const int* table;
    int head_dim;
    const AttendingRow* rows[kCount];
    const float* heads[kCount];
    float* outs[kCount];
    float* scores;  // [kCount, stride]
    int stride;

    // Scores of kNumber blocks: every lane adds its products over the head from first to last.
    //
    // Weights have driven the cache out since the last pass, and a block is too short for the processor to foresee the
    // next, so this asks for what comes: the keys of the next kNumber blocks, and these blocks' values, line by line.
    template <int kNumber, class BlockAt>
    void score_blocks(int first, int num_blocks, BlockAt block_at, float* to, int to_stride) const {
        Floats sums[kCount][kNumber][kBlockVectors] = {};
        const Stored *keys[kNumber], *values[kNumber], *ahead[kNumber];
        for (int b = 0; b < kNumber; ++b) {
            keys[b] = cache.keys_of(block_at(first + b));
            values[b] = cache.values_of(block_at(first + b));
            ahead[b] = cache.keys_of(block_at(std::min(first + b + kNumber, num_blocks - 1)));
        }
        for (int i = 0; i < head_dim; ++i) {
            for (int b = 0; b < kNumber; ++b) {
                __builtin_prefetch(ahead[b] + i * kBlock);
                __builtin_prefetch(values[b] + i * kBlock);
                for (int v = 0; v < kBlockVectors; ++v) {
                    const Floats key = load(keys[b] + i * kBlock + v * kLanes);
                    for (int q = 0; q < kCount; ++q) sums[q][b][v] = fma(key, splat(heads[q][i]), sums[q][b][v]);
                }
            }
        }
        const float scale = 1.0f / std::sqrt(float(head_dim));
        for (int q = 0; q < kCount; ++q) {
            float* const scores_of_query = to + q * to_stride + first * kBlock;
            for (int b = 0; b < kNumber; ++b) {
                for (int v = 0; v < kBlockVectors; ++v) {
                    store(scores_of_query + b * kBlock + v * kLanes, sums[q][b][v] * scale);
                }
            }
        }
    }

    template <class BlockAt>
    void score(int num_blocks, BlockAt block_at, float* to, int to_stride) const {
        int b = 0;
        for (; b + kBlocks <= num_blocks; b += kBlocks) score_blocks<kBlocks>(b, num_blocks, block_at, to, to_stride);
        for (; b < num_blocks; ++b) score_blocks<1>(b, num_blocks, block_at, to, to_stride);
    }

    // Blocks are scored whole for all queries; what lies behind a query's own committed positions gives way to its
    // ancestors, whose scores are picked out of their blocks'.
    void score_all(float* node_scores) const {
        int num_committed = 0, first_slot = INT32_MAX, last_slot = -1;
        for (const AttendingRow* row : rows) {
            num_committed = std::max(num_committed, row->num_committed);
            for (int a = 0; a < row->num_ancestors; ++a) {
                first_slot = std::min(first_slot, row->ancestors[a]);
                last_slot = std::max(last_slot, row->ancestors[a]);
            }
        }
        score(round_up(num_committed, kBlock) / kBlock, [&](int b) { return table[b]; }, scores, stride);
        if (last_slot < 0) return;
        const int first_block = first_slot / kBlock, num_blocks = last_slot / kBlock + 1 - first_block;
        const int node_stride = num_blocks * kBlock;
        const auto block_at = [&](int b) { return cache.first_node_block + first_block + b; };
        score(num_blocks, block_at, node_scores, node_stride);
        for (int q = 0; q < kCount; ++q) {
            const float* const from = node_scores + q * node_stride - first_block * kBlock;
            float* const to = scores + q * stride + rows[q]->num_committed;
            for (int a = 0; a < rows[q]->num_ancestors; ++a) to[a] = from[rows[q]->ancestors[a]];
        }
    }

    // Call `add(values of a position, its index)` for committed positions first <= position < end in order.
    template <class Add>
    void for_committed(int first, int end, Add add) const {
        for (int position = first; position < end;) {
            const Stored* values = cache.values_of(table[position / kBlock]) + position % kBlock * head_dim;
            const int stop = std::min(position / kBlock * kBlock + kBlock, end);
            for (; position < stop; ++position, values += head_dim) add(values, position);
        }
    }

    template <class Add>
    void for_ancestors(const AttendingRow& row, Add add) const {
        for (int a = 0; a < row.num_ancestors; ++a) {
            const int slot = row.ancestors[a], block = cache.first_node_block + slot / kBlock;
            add(cache.values_of(block) + slot % kBlock * head_dim, row.num_committed + a);
        }
    }

    // kNumber values of every query's output, from index `first` on; scores hold exponentials by now.
    template <class Value, int kNumber>
    void mix(int first, int num_shared, const float* scales) const {
        constexpr int kSize = sizeof(Value) / sizeof(float);
        Value sums[kCount][kNumber] = {};
        for_committed(0, num_shared, [&](const Stored* values, int position) {
            for (int v = 0; v < kNumber; ++v) {
                const Value value = read<Value>(values + first + v * kSize);
                for (int q = 0; q < kCount; ++q) {
                    sums[q][v] = fma(value, spread<Value>(scores[q * stride + position]), sums[q][v]);
                }
            }
        });
        for (int q = 0; q < kCount; ++q) {
            const auto add = [&](const Stored* values, int position) {
                const Value weight = spread<Value>(scores[q * stride + position]);
                for (int v = 0; v < kNumber; ++v) {
                    sums[q][v] = fma(read<Value>(values + first + v * kSize), weight, sums[q][v]);
                }
            };
            for_committed(num_shared, rows[q]->num_committed, add);
            for_ancestors(*rows[q], add);
            for (int v = 0; v < kNumber; ++v) {
                const Value mixed = sums[q][v] * spread<Value>(scales[q]);
                std::memcpy(outs[q] + first + v * kSize, &mixed, sizeof mixed);
            }
        }
    }

    void run(float* node_scores) const;
};

// Scores to exponentials; returns their sum. Positions beyond the query's own become exact zeros.
float exponentials(int num_positions, float* scores) {
    const int padded = round_up(num_positions, kBlock);
    for (int i = num_positions; i < padded; ++i) scores[i] = -INFINITY;
    Floats largest = splat(-INFINITY);
    for (int i = 0; i < padded; i += kLanes) largest = max(largest, load(scores + i));
    const Floats shift = splat(max_lanes(largest));
    Floats sums = {};
    for (int i = 0; i < padded; i += kLanes) {
        const Floats value = exp(load(scores + i) - shift);
        sums += value;
        store(scores + i, value);
    }
    return sum_lanes(sums);
}

template <class Stored, int kCount>
void Queries<Stored, kCount>::run(float* node_scores) const {
    score_all(node_scores);
    float scales[kCount];
    int num_shared = INT32_MAX;
    for (int q = 0; q < kCount; ++q) {
        scales[q] = 1.0f / exponentials(rows[q]->num_positions(), scores + q * stride);
        num_shared = std::min(num_shared, rows[q]->num_committed);
    }
    int i = 0;
    for (; i + kWidth * kLanes <= head_dim; i += kWidth * kLanes) mix<Floats, kWidth>(i, num_shared, scales);
    for (; i + kLanes <= head_dim; i += kLanes) mix<Floats, 1>(i, num_shared, scales);
    for (; i < head_dim; ++i) mix<float, 1>(i, num_shared, scales);
}

}  // namespace

template <class Stored>
void attend(const HeadCache<Stored>& cache, const int* table, const AttendingRow* rows, int num_rows, int num_heads,
            int head_dim, float* scores) {
    int stride = 0;
    for (int row = 0; row < num_rows; ++row) stride = std::max(stride, round_up(rows[row].num_positions(), kBlock));
    float* const node_scores = scores + kMaxTogether * stride;
    const int num_queries = num_rows * num_heads;
    int query = 0;
    const auto run_while_left = [&](auto count) {
        Queries<Stored, count> together{cache, table, head_dim, {}, {}, {}, scores, stride};
        for (; query + count <= num_queries; query += count) {
            for (int q = 0; q < count; ++q) {
                const AttendingRow& row = rows[(query + q) / num_heads];
                const int first = (query + q) % num_heads * head_dim;
                together.rows[q] = &row;
                together.heads[q] = row.heads + first;
                together.outs[q] = row.out + first;
            }
            together.run(node_scores);
        }
    };
    run_while_left(std::integral_constant<int, kMaxTogether>());
    run_while_left(std::integral_constant<int, 2>());
    run_while_left(std::integral_constant<int, 1>());
}

template void attend(const HeadCache<float>&, const int*, const AttendingRow*, int, int, int, float*);
template void attend(const HeadCache<uint16_t>&, const int*, const AttendingRow*, int, int, int, float*);

}  // namespace SLIPSTREAM_ISA
