#include "attention.h"

#include <algorithm>

namespace SLIPSTREAM_ISA {
namespace {

constexpr int kGroup = 4;  // blocks, or ancestors, whose sums run side by side to hide the latency of an addition
constexpr int kBlockVectors = kBlock / kLanes;

// Scores of kCount blocks: every lane adds its products over the head from first to last.
//
// Weights have driven the cache out since the last pass, and a block is too short for the processor to foresee the
// next, so this asks for what comes: the keys of the next kCount blocks, and this block's values, line by line.
template <int kCount>
void block_scores(const HeadCache& cache, const int* table, int num_ahead, const float* head, int head_dim, float scale,
                  float* out) {
    Floats sums[kCount][kBlockVectors] = {};
    const float *keys[kCount], *values[kCount], *ahead[kCount];
    for (int b = 0; b < kCount; ++b) {
        keys[b] = cache.block_keys + table[b] * cache.block_stride;
        values[b] = cache.block_values + table[b] * cache.block_stride;
        ahead[b] = cache.block_keys + table[std::min(b + kCount, num_ahead)] * cache.block_stride;
    }
    for (int i = 0; i < head_dim; ++i) {
        const Floats value = splat(head[i]);
        for (int b = 0; b < kCount; ++b) {
            __builtin_prefetch(ahead[b] + i * kBlock);
            __builtin_prefetch(values[b] + i * kBlock);
            for (int v = 0; v < kBlockVectors; ++v) {
                sums[b][v] = fma(load(keys[b] + i * kBlock + v * kLanes), value, sums[b][v]);
            }
        }
    }
    for (int b = 0; b < kCount; ++b) {
        for (int v = 0; v < kBlockVectors; ++v) store(out + b * kBlock + v * kLanes, sums[b][v] * scale);
    }
}

// The same sums for keys in node slots.
template <int kCount>
void node_scores(const HeadCache& cache, const int* slots, const float* head, int head_dim, float scale, float* out) {
    float sums[kCount] = {};
    const float* keys[kCount];
    for (int a = 0; a < kCount; ++a) keys[a] = cache.node_keys + slots[a] * cache.node_stride;
    for (int i = 0; i < head_dim; ++i) {
        for (int a = 0; a < kCount; ++a) sums[a] = fma(keys[a][i], head[i], sums[a]);
    }
    for (int a = 0; a < kCount; ++a) out[a] = sums[a] * scale;
}

void all_scores(const HeadCache& cache, const Query& query, int head_dim, float* scores) {
    const float scale = 1.0f / std::sqrt(float(head_dim));
    const int num_blocks = (query.num_committed + kBlock - 1) / kBlock;
    int b = 0;
    for (; b + kGroup <= num_blocks; b += kGroup) {
        const int num_ahead = num_blocks - 1 - b;
        block_scores<kGroup>(cache, query.table + b, num_ahead, query.head, head_dim, scale, scores + b * kBlock);
    }
    for (; b < num_blocks; ++b) {
        const int num_ahead = num_blocks - 1 - b;
        block_scores<1>(cache, query.table + b, num_ahead, query.head, head_dim, scale, scores + b * kBlock);
    }
    float* const beyond = scores + query.num_committed;
    int a = 0;
    for (; a + kGroup <= query.num_ancestors; a += kGroup) {
        node_scores<kGroup>(cache, query.ancestors + a, query.head, head_dim, scale, beyond + a);
    }
    for (; a < query.num_ancestors; ++a) {
        node_scores<1>(cache, query.ancestors + a, query.head, head_dim, scale, beyond + a);
    }
}

// Scores to exponentials; returns their sum. Positions beyond the query's own become exact zeros.
float exponentials(int num_positions, float* scores) {
    const int padded = (num_positions + kBlock - 1) / kBlock * kBlock;
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

// out[i] += weight * values[i], over the vectors of a head. kVectors chains run side by side.
template <int kVectors>
void weighted_values(const HeadCache& cache, const Query& query, const float* weights, int head_dim, int first,
                     float scale, float* out) {
    Floats sums[kVectors] = {};
    int position = 0;
    for (; position < query.num_committed; ++position) {
        const float* const values = cache.block_values + query.table[position / kBlock] * cache.block_stride +
                                    position % kBlock * head_dim + first;
        const Floats weight = splat(weights[position]);
        for (int v = 0; v < kVectors; ++v) sums[v] = fma(load(values + v * kLanes), weight, sums[v]);
    }
    for (int a = 0; a < query.num_ancestors; ++a, ++position) {
        const float* const values = cache.node_values + query.ancestors[a] * cache.node_stride + first;
        const Floats weight = splat(weights[position]);
        for (int v = 0; v < kVectors; ++v) sums[v] = fma(load(values + v * kLanes), weight, sums[v]);
    }
    for (int v = 0; v < kVectors; ++v) store(out + first + v * kLanes, sums[v] * scale);
}

// One output at a time, for heads that are no multiple of the vector.
void weighted_value(const HeadCache& cache, const Query& query, const float* weights, int head_dim, int index,
                    float scale, float* out) {
    float sum = 0;
    int position = 0;
    for (; position < query.num_committed; ++position) {
        const float* const values = cache.block_values + query.table[position / kBlock] * cache.block_stride;
        sum = fma(values[position % kBlock * head_dim + index], weights[position], sum);
    }
    for (int a = 0; a < query.num_ancestors; ++a, ++position) {
        sum = fma(cache.node_values[query.ancestors[a] * cache.node_stride + index], weights[position], sum);
    }
    out[index] = sum * scale;
}

}  // namespace

void attend(const HeadCache& cache, const Query& query, int head_dim, float* scores, float* out) {
    all_scores(cache, query, head_dim, scores);
    const float scale = 1.0f / exponentials(query.num_committed + query.num_ancestors, scores);
    int i = 0;
    for (; i + 4 * kLanes <= head_dim; i += 4 * kLanes) weighted_values<4>(cache, query, scores, head_dim, i, scale, out);
    for (; i + kLanes <= head_dim; i += kLanes) weighted_values<1>(cache, query, scores, head_dim, i, scale, out);
    for (; i < head_dim; ++i) weighted_value(cache, query, scores, head_dim, i, scale, out);
}

}  // namespace SLIPSTREAM_ISA
