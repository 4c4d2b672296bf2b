#include "attention.h"

#include <algorithm>

namespace SLIPSTREAM_ISA {
namespace {

// What runs side by side to hide the latency of an addition: four sums a head, as many as stay in registers.
constexpr int kBlockVectors = kBlock / kLanes;
constexpr int kBlocks = std::max(4 / kBlockVectors, 1);
constexpr int kNodes = 4;

// kHeads query heads of one row that run side by side: what is loaded for one serves the other.
template <int kHeads>
struct Heads {
    const HeadCache& cache;
    const Query& query;
    const float* heads;
    int head_dim;
    float* scores;  // [kHeads, stride]
    int stride;
    float* out;

    int num_positions() const { return query.num_committed + query.num_ancestors; }

    // Scores of kCount blocks: every lane adds its products over the head from first to last.
    //
    // Weights have driven the cache out since the last pass, and a block is too short for the processor to foresee the
    // next, so this asks for what comes: the keys of the next kCount blocks, and these blocks' values, line by line.
    template <int kCount>
    void score_blocks(int first, int num_blocks, float scale) const {
        Floats sums[kHeads][kCount][kBlockVectors] = {};
        const float *keys[kCount], *values[kCount], *ahead[kCount];
        for (int b = 0; b < kCount; ++b) {
            keys[b] = cache.block_keys + query.table[first + b] * cache.block_stride;
            values[b] = cache.block_values + query.table[first + b] * cache.block_stride;
            const int next = std::min(first + b + kCount, num_blocks - 1);
            ahead[b] = cache.block_keys + query.table[next] * cache.block_stride;
        }
        for (int i = 0; i < head_dim; ++i) {
            for (int b = 0; b < kCount; ++b) {
                __builtin_prefetch(ahead[b] + i * kBlock);
                __builtin_prefetch(values[b] + i * kBlock);
                for (int v = 0; v < kBlockVectors; ++v) {
                    const Floats key = load(keys[b] + i * kBlock + v * kLanes);
                    for (int h = 0; h < kHeads; ++h) {
                        sums[h][b][v] = fma(key, splat(heads[h * head_dim + i]), sums[h][b][v]);
                    }
                }
            }
        }
        for (int h = 0; h < kHeads; ++h) {
            float* const to = scores + h * stride + first * kBlock;
            for (int b = 0; b < kCount; ++b) {
                for (int v = 0; v < kBlockVectors; ++v) store(to + b * kBlock + v * kLanes, sums[h][b][v] * scale);
            }
        }
    }

    // The same sums for keys in node slots.
    template <int kCount>
    void score_nodes(int first, float scale) const {
        float sums[kHeads][kCount] = {};
        const float* keys[kCount];
        for (int a = 0; a < kCount; ++a) keys[a] = cache.node_keys + query.ancestors[first + a] * cache.node_stride;
        for (int i = 0; i < head_dim; ++i) {
            for (int h = 0; h < kHeads; ++h) {
                const float value = heads[h * head_dim + i];
                for (int a = 0; a < kCount; ++a) sums[h][a] = fma(keys[a][i], value, sums[h][a]);
            }
        }
        for (int h = 0; h < kHeads; ++h) {
            float* const to = scores + h * stride + query.num_committed + first;
            for (int a = 0; a < kCount; ++a) to[a] = sums[h][a] * scale;
        }
    }

    void score_all() const {
        const float scale = 1.0f / std::sqrt(float(head_dim));
        const int num_blocks = (query.num_committed + kBlock - 1) / kBlock;
        int b = 0;
        for (; b + kBlocks <= num_blocks; b += kBlocks) score_blocks<kBlocks>(b, num_blocks, scale);
        for (; b < num_blocks; ++b) score_blocks<1>(b, num_blocks, scale);
        int a = 0;
        for (; a + kNodes <= query.num_ancestors; a += kNodes) score_nodes<kNodes>(a, scale);
        for (; a < query.num_ancestors; ++a) score_nodes<1>(a, scale);
    }

    // Call `add(values of a position, its index)` for every position in order.
    template <class Add>
    void for_values(Add add) const {
        int position = 0;
        for (int first = 0; first < query.num_committed; first += kBlock) {
            const float* values = cache.block_values + query.table[first / kBlock] * cache.block_stride;
            const int end = std::min(first + kBlock, query.num_committed);
            for (; position < end; ++position, values += head_dim) add(values, position);
        }
        for (int a = 0; a < query.num_ancestors; ++a, ++position) {
            add(cache.node_values + query.ancestors[a] * cache.node_stride, position);
        }
    }

    // kWidth vectors of every head's output, from index `first` on; scores hold exponentials by now.
    template <int kWidth>
    void mix_vectors(int first, const float* scales) const {
        Floats sums[kHeads][kWidth] = {};
        for_values([&](const float* values, int position) {
            for (int v = 0; v < kWidth; ++v) {
                const Floats value = load(values + first + v * kLanes);
                for (int h = 0; h < kHeads; ++h) {
                    sums[h][v] = fma(value, splat(scores[h * stride + position]), sums[h][v]);
                }
            }
        });
        for (int h = 0; h < kHeads; ++h) {
            float* const to = out + h * head_dim + first;
            for (int v = 0; v < kWidth; ++v) store(to + v * kLanes, sums[h][v] * scales[h]);
        }
    }

    // One output of every head, for sizes that are no multiple of the vector.
    void mix_one(int index, const float* scales) const {
        float sums[kHeads] = {};
        for_values([&](const float* values, int position) {
            for (int h = 0; h < kHeads; ++h) sums[h] = fma(values[index], scores[h * stride + position], sums[h]);
        });
        for (int h = 0; h < kHeads; ++h) out[h * head_dim + index] = sums[h] * scales[h];
    }

    void run() const;
};

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

template <int kHeads>
void Heads<kHeads>::run() const {
    score_all();
    float scales[kHeads];
    for (int h = 0; h < kHeads; ++h) scales[h] = 1.0f / exponentials(num_positions(), scores + h * stride);
    int i = 0;
    for (; i + 4 * kLanes <= head_dim; i += 4 * kLanes) mix_vectors<4>(i, scales);
    for (; i + kLanes <= head_dim; i += kLanes) mix_vectors<1>(i, scales);
    for (; i < head_dim; ++i) mix_one(i, scales);
}

}  // namespace

void attend(const HeadCache& cache, const Query& query, int head_dim, float* scores, float* out) {
    const int stride = scores_size(query.num_committed + query.num_ancestors) / 2;
    int head = 0;
    for (; head + 2 <= query.num_heads; head += 2) {
        Heads<2>{cache, query, query.heads + head * head_dim, head_dim, scores, stride, out + head * head_dim}.run();
    }
    if (head < query.num_heads) {
        Heads<1>{cache, query, query.heads + head * head_dim, head_dim, scores, stride, out + head * head_dim}.run();
    }
}

}  // namespace SLIPSTREAM_ISA
