#include "decoder.h"

#include <algorithm>

namespace SLIPSTREAM_ISA {
namespace {

std::vector<float> floats_of(const Source& source, size_t size) {
    std::vector<float> values(size);
    for (size_t i = 0; i < size; ++i) values[i] = source.at(i);
    return values;
}

}  // namespace

Decoder::Decoder(const SlipstreamSizes& sizes)
    : sizes_(sizes),
      cache_(sizes, memory_),
      num_experts_(std::max(1, sizes.experts)),
      experts_per_token_(std::max(1, sizes.experts_per_token)),
      delta_width_(round_up(sizes.hidden, kPanel)),
      qkv_width_(round_up((sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim, kPanel)) {
    for (int layer = 0; layer < sizes.layers; ++layer) {
        layers_.push_back(std::make_unique<Layer>(Experts(num_experts_, sizes.hidden, sizes.inner)));
    }
    const size_t rows = sizes.max_rows, choices = rows * experts_per_token_, layers = sizes.layers;
    scratch_.x = memory_.take<float>(rows * sizes.hidden);
    const auto inputs = [&](int number, int inner) { return Inputs(number, inner, form_for(sizes.packs_int8 != 0), memory_); };
    scratch_.normed = inputs(sizes.max_rows, sizes.hidden);
    scratch_.qkv = memory_.take<float>(rows * qkv_width_);
    scratch_.attended = inputs(sizes.max_rows, sizes.heads * sizes.head_dim);
    scratch_.delta = memory_.take<float>(rows * delta_width_);
    scratch_.expert_inputs = {inputs(int(choices), sizes.hidden), inputs(int(choices), layers_[0]->mlp.activated_width())};
    scratch_.expert_out = memory_.take<float>(choices * layers_[0]->mlp.out_width());
    scratch_.experts.resize(layers * choices);
    scratch_.expert_weights = memory_.take<float>(layers * choices);
    scratch_.group_starts.resize(layers * (num_experts_ + 1));
    scratch_.group_choices.resize(layers * choices);
    scratch_.active.resize(layers * num_experts_);
    scratch_.num_active.resize(layers);
    for (std::vector<int32_t>* runs : {&scratch_.runs, &scratch_.logit_runs}) runs->reserve(rows + 1);
}

bool Decoder::set(SlipstreamPart part, int index, int expert, const void* data, SlipstreamType type) {
    const int hidden = sizes_.hidden, query = sizes_.heads * sizes_.head_dim, key = sizes_.kv_heads * sizes_.head_dim;
    const bool is_whole = sizes_.qk_norm == kWhole;
    const Source whole{data, type, type};
    const Source matrix{data, type, sizes_.packs_int8 ? kInt8 : type};
    Layer& layer = *layers_[index];
    switch (part) {
        case kEmbedding: embedding_ = whole; break;
        case kFinalNorm: final_norm_ = floats_of(whole, hidden); break;
        case kHead: head_.pack(matrix, hidden, in_order(sizes_.vocab).data(), sizes_.vocab, memory_); break;
        case kCosines: cosines_ = static_cast<const float*>(data); return type == kFp32;
        case kSines: sines_ = static_cast<const float*>(data); return type == kFp32;
        case kAttentionNorm: layer.attention_norm = floats_of(whole, hidden); break;
        case kQkv: layer.qkv.pack(matrix, hidden, in_order(query + 2 * key).data(), query + 2 * key, memory_); break;
        case kQueryNorm: layer.query_norm = floats_of(whole, is_whole ? query : sizes_.head_dim); break;
        case kKeyNorm: layer.key_norm = floats_of(whole, is_whole ? key : sizes_.head_dim); break;
        case kAttentionOut: layer.attention_out.pack(matrix, query, in_order(hidden).data(), hidden, memory_); break;
        case kMlpNorm: layer.mlp_norm = floats_of(whole, hidden); break;
        case kRouter: layer.router = floats_of(whole, size_t(sizes_.experts) * hidden); break;
        case kGateUp: layer.mlp.set_gate_up(expert, matrix, memory_); break;
        case kDown: layer.mlp.set_down(expert, matrix, memory_); break;
        default: return false;
    }
    return true;
}

void Decoder::keep(int num_moves, const int32_t* moves) {
    for (int move = 0; move < num_moves; ++move, moves += 3) {
        cache_.copy(cache_.place_of_node(moves[0]), {moves[1], moves[2]});
    }
}

}  // namespace SLIPSTREAM_ISA
