// A decoder with its cache: weights packed for this instruction set, and one call for a whole forward pass.
#pragma once

#include <memory>
#include <vector>

#include "abi.h"
#include "cache.h"
#include "experts.h"

namespace SLIPSTREAM_ISA {

struct Layer {
    explicit Layer(Experts experts) : mlp(std::move(experts)) {}

    std::vector<float> attention_norm, query_norm, key_norm, mlp_norm, router;
    Packed qkv, attention_out;
    Experts mlp;
};

// What one pass works on; every buffer is allocated once, for `max_rows` rows.
struct Scratch {
    Inputs normed;      // [T, hidden]
    Inputs attended;    // [T, heads * head_dim]
    ExpertInputs expert_inputs;
    float* x;           // residual stream [T, hidden]
    float* qkv;         // [T, (heads + 2 kv heads) * head_dim], padded to panels
    float* delta;       // what attention adds [T, hidden], padded to panels
    float* expert_out;  // [T * K, hidden], padded to panels
    // Per layer, since a thread that comes late may still look at an earlier layer's while others work on a later one.
    std::vector<int32_t> experts;       // [L, T, K]
    float* expert_weights;              // [L, T, K]
    std::vector<int32_t> group_starts;  // [L, E + 1]: where an expert's choices begin in group_choices
    std::vector<int32_t> group_choices; // [L, T * K]: row * K + rank
    std::vector<int32_t> active;        // [L, E]: experts with a row, those with most first
    std::vector<int32_t> num_active;    // [L]
    std::vector<int32_t> runs, logit_runs;  // of all rows, and of those with logits: see `runs_of`
    std::vector<float*> scores;             // per thread
};

class Decoder {
   public:
    explicit Decoder(const SlipstreamSizes& sizes);

    // Take over a tensor; false if the part is unknown or of a type it cannot have. Throws std::bad_alloc.
    bool set(SlipstreamPart part, int layer, int expert, const void* data, SlipstreamType type);

    // Logits [num_logit_rows, vocab]; experts [T, L, K] unless null or dense: -1 in the last layer of rows without logits.
    void forward(const SlipstreamPlan& plan, float* logits, int32_t* experts);

    // `moves` holds (node slot, block, offset) triples.
    void keep(int num_moves, const int32_t* moves);

   private:
    friend struct ForwardPass;

    SlipstreamSizes sizes_;
    slipstream::Arena memory_;  // of weights, cache and buffers
    Cache cache_;
    int num_experts_, experts_per_token_, delta_width_, qkv_width_;
    Source embedding_{};
    const float *cosines_ = nullptr, *sines_ = nullptr;
    std::vector<float> final_norm_;
    Packed head_;
    std::vector<std::unique_ptr<Layer>> layers_;
    Scratch scratch_;
};

}  // namespace SLIPSTREAM_ISA
