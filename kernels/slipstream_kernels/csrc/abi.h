// What crosses from Python: plain structs, mirrored field by field in native.py.
#pragma once

#include <cstdint>

extern "C" {

// Tensors are handed over in the first two; kInt8 is only packed in, with a scale for every output.
enum SlipstreamType : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2 };

// Queries and keys are normalised not at all, per head, or over the whole projection.
enum SlipstreamQkNorm : int32_t { kNoNorm = 0, kPerHead = 1, kWhole = 2 };

// Which tensor of a layer (or of the model) is handed over.
enum SlipstreamPart : int32_t {
    kEmbedding = 0,
    kFinalNorm,
    kHead,
    kCosines,
    kSines,
    kAttentionNorm,
    kQkv,
    kQueryNorm,
    kKeyNorm,
    kAttentionOut,
    kMlpNorm,
    kRouter,
    kGateUp,
    kDown,
};

struct SlipstreamSizes {
    int32_t vocab, hidden, inner, layers, heads, kv_heads, head_dim;
    int32_t experts, experts_per_token;  // 0 for a dense model
    int32_t qk_norm, normalizes_expert_weights;
    int32_t packs_int8;  // products are of int8 and rows of bytes, the cache is bf16: for drafts, which nobody needs exact
    int32_t num_positions, num_blocks, num_node_slots, max_rows;
    float norm_eps;
};

// One forward pass; see slipstream/engine/plan.py for what the arrays mean.
struct SlipstreamPlan {
    int32_t num_rows, num_logit_rows, table_width;
    const int32_t *ids, *positions, *sequences, *block_tables, *num_committed, *node_slots;
    const int32_t *ancestor_starts, *ancestors, *logit_rows;
};

}  // extern "C"
