#include "decoder.h"

#include <algorithm>
#include <numeric>

#include "rows.h"

namespace SLIPSTREAM_ISA {
namespace {

constexpr int kRowsAtOnce = 48;  // rows of one product task: their outputs of a panel stay in the first-level cache

int round_up(int number, int multiple) { return (number + multiple - 1) / multiple * multiple; }

Buffer zeros(size_t size) { return Buffer(new float[size]()); }

// Not touched, so that the system hands out pages as they are used.
Buffer unset(size_t size) { return Buffer(new float[size]); }

std::vector<float> as_floats(const void* data, SlipstreamType type, size_t size) {
    std::vector<float> values(size);
    for (size_t i = 0; i < size; ++i) {
        values[i] = type == kBf16 ? bf16_to_float(static_cast<const uint16_t*>(data)[i])
                                  : static_cast<const float*>(data)[i];
    }
    return values;
}

std::vector<int> in_order(int size) {
    std::vector<int> order(size);
    std::iota(order.begin(), order.end(), 0);
    return order;
}

// Every panel holds as many gates as ups, so that one task has both of an output; what is beyond `inner` is zero.
std::vector<int> gates_beside_ups(int inner) {
    constexpr int kHalf = kPanel / 2;
    std::vector<int> order(size_t(round_up(inner, kHalf)) * 2);
    for (int o = 0; o < int(order.size()); ++o) {
        const int column = o / kPanel * kHalf + o % kHalf;
        order[o] = column >= inner ? -1 : o % kPanel < kHalf ? column : inner + column;
    }
    return order;
}

}  // namespace

Decoder::Decoder(const SlipstreamSizes& sizes)
    : sizes_(sizes),
      num_experts_(std::max(1, sizes.experts)),
      experts_per_token_(std::max(1, sizes.experts_per_token)),
      padded_hidden_(round_up(sizes.hidden, kPanel)),
      padded_inner_(round_up(sizes.inner, kPanel / 2)),
      qkv_width_(round_up((sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim, kPanel)),
      layers_(sizes.layers) {
    for (Layer& layer : layers_) {
        layer.gate_up = std::vector<Packed>(num_experts_);
        layer.down = std::vector<Packed>(num_experts_);
    }
    const size_t rows = sizes.max_rows, choices = rows * experts_per_token_, layers = sizes.layers;
    const size_t per_position = 2 * layers * sizes.kv_heads * sizes.head_dim;
    block_store_ = zeros(per_position * sizes.num_blocks * kBlock);
    node_store_ = zeros(per_position * std::max(1, sizes.num_node_slots));
    scratch_.x = unset(rows * sizes.hidden);
    scratch_.normed = unset(rows * sizes.hidden);
    scratch_.qkv = unset(rows * qkv_width_);
    scratch_.attended = unset(rows * sizes.heads * sizes.head_dim);
    scratch_.delta = unset(rows * padded_hidden_);
    scratch_.activated = unset(choices * padded_inner_);
    scratch_.expert_out = unset(choices * padded_hidden_);
    scratch_.experts.resize(layers * choices);
    scratch_.expert_weights = unset(layers * choices);
    scratch_.group_starts.resize(layers * (num_experts_ + 1));
    scratch_.group_choices.resize(layers * choices);
    scratch_.active.resize(layers * num_experts_);
    scratch_.num_active.resize(layers);
    scratch_.next_place.resize(num_experts_);
}

bool Decoder::set(SlipstreamPart part, int index, int expert, const void* data, SlipstreamType type) {
    const int hidden = sizes_.hidden, query = sizes_.heads * sizes_.head_dim, key = sizes_.kv_heads * sizes_.head_dim;
    const bool is_whole = sizes_.qk_norm == kWhole;
    Layer& layer = layers_[index];
    switch (part) {
        case kEmbedding: embedding_ = data, embedding_type_ = type; return true;
        case kFinalNorm: final_norm_ = as_floats(data, type, hidden); return true;
        case kHead: return head_.pack(data, type, hidden, in_order(sizes_.vocab).data(), sizes_.vocab);
        case kCosines: cosines_ = static_cast<const float*>(data); return type == kFp32;
        case kSines: sines_ = static_cast<const float*>(data); return type == kFp32;
        case kAttentionNorm: layer.attention_norm = as_floats(data, type, hidden); return true;
        case kQkv: return layer.qkv.pack(data, type, hidden, in_order(query + 2 * key).data(), query + 2 * key);
        case kQueryNorm: layer.query_norm = as_floats(data, type, is_whole ? query : sizes_.head_dim); return true;
        case kKeyNorm: layer.key_norm = as_floats(data, type, is_whole ? key : sizes_.head_dim); return true;
        case kAttentionOut: return layer.attention_out.pack(data, type, query, in_order(hidden).data(), hidden);
        case kMlpNorm: layer.mlp_norm = as_floats(data, type, hidden); return true;
        case kRouter: layer.router = as_floats(data, type, size_t(sizes_.experts) * hidden); return true;
        case kGateUp:
        case kDown: return set_mlp(part, layer, expert, data, type);
    }
    return false;
}

bool Decoder::set_mlp(SlipstreamPart part, Layer& layer, int expert, const void* data, SlipstreamType type) {
    const int hidden = sizes_.hidden, inner = sizes_.inner;
    if (part == kDown) return layer.down[expert].pack(data, type, inner, in_order(hidden).data(), hidden);
    const std::vector<int> order = gates_beside_ups(inner);
    return layer.gate_up[expert].pack(data, type, hidden, order.data(), int(order.size()));
}

// Blocks: [layer][block][kv head][keys, values][kBlock * head_dim]. Nodes: [layer][slot][kv head][keys, values][head_dim].
float* Decoder::block_keys(int layer, int kv_head, int block) const {
    const size_t place = (size_t(layer) * sizes_.num_blocks + block) * sizes_.kv_heads + kv_head;
    return block_store_.get() + place * 2 * kBlock * sizes_.head_dim;
}

float* Decoder::block_values(int layer, int kv_head, int block) const {
    return block_keys(layer, kv_head, block) + kBlock * sizes_.head_dim;
}

float* Decoder::node_keys(int layer, int kv_head, int slot) const {
    const size_t place = (size_t(layer) * sizes_.num_node_slots + slot) * sizes_.kv_heads + kv_head;
    return node_store_.get() + place * 2 * sizes_.head_dim;
}

float* Decoder::node_values(int layer, int kv_head, int slot) const {
    return node_keys(layer, kv_head, slot) + sizes_.head_dim;
}

HeadCache Decoder::head_cache(int layer, int kv_head) const {
    const long stride = 2L * sizes_.kv_heads * sizes_.head_dim;
    return {block_keys(layer, kv_head, 0), block_values(layer, kv_head, 0), node_keys(layer, kv_head, 0),
            node_values(layer, kv_head, 0), stride * kBlock, stride};
}

void Decoder::keep(int num_moves, const int32_t* moves) {
    const int size = sizes_.head_dim;
    for (int move = 0; move < num_moves; ++move) {
        const int slot = moves[3 * move], block = moves[3 * move + 1], offset = moves[3 * move + 2];
        for (int layer = 0; layer < sizes_.layers; ++layer) {
            for (int head = 0; head < sizes_.kv_heads; ++head) {
                const float *keys = node_keys(layer, head, slot), *values = node_values(layer, head, slot);
                float* const to = block_keys(layer, head, block);
                for (int i = 0; i < size; ++i) to[i * kBlock + offset] = keys[i];
                std::copy(values, values + size, block_values(layer, head, block) + offset * size);
            }
        }
    }
}

size_t Decoder::num_weight_bytes() const {
    size_t total = head_.num_bytes();
    for (const Layer& layer : layers_) {
        total += layer.qkv.num_bytes() + layer.attention_out.num_bytes() + layer.router.size() * sizeof(float);
        for (const Packed& matrix : layer.gate_up) total += matrix.num_bytes();
        for (const Packed& matrix : layer.down) total += matrix.num_bytes();
    }
    return total;
}

// One walk through a pass. The steps of a layer, each a phase whose tasks the threads share:
//
//   norm -> queries, keys, values -> rotate and write to the cache -> attend -> attention out
//        -> add, norm and route -> gate and up -> down -> (next layer) add and norm ...
struct ForwardPass {
    Decoder& decoder;
    const SlipstreamPlan& plan;
    float* logits;
    int32_t* experts_out;

    const SlipstreamSizes& sizes = decoder.sizes_;
    Scratch& scratch = decoder.scratch_;
    int num_rows = plan.num_rows;
    int num_chosen = decoder.experts_per_token_;

    void walk(Phases& phases) {
        phases.run(num_rows, [&](int row) {
            embed(row);
            norm_into(row, decoder.layers_.empty() ? decoder.final_norm_ : decoder.layers_[0].attention_norm);
        });
        for (int index = 0; index < sizes.layers; ++index) layer(phases, index);
        head(phases);
    }

    void layer(Phases& phases, int index) {
        const Layer& layer = decoder.layers_[index];
        const bool is_last = index + 1 == sizes.layers;
        product(phases, layer.qkv, scratch.normed.get(), sizes.hidden, scratch.qkv.get(), decoder.qkv_width_);
        phases.run(num_rows, [&](int row) { rotate_and_write(layer, index, row); });
        const int groups = num_rows < 8 ? sizes.heads : 1;  // few rows: every head is a task
        phases.run(num_rows * groups, [&](int task) {
            const int heads = sizes.heads / groups, first = task % groups * heads;
            for (int head = first; head < first + heads; ++head) attend_head(phases.thread(), index, task / groups, head);
        });
        product(phases, layer.attention_out, scratch.attended.get(), sizes.heads * sizes.head_dim, scratch.delta.get(),
                decoder.padded_hidden_);
        phases.run(
            num_rows,
            [&](int row) {
                add(x(row), scratch.delta.get() + size_t(row) * decoder.padded_hidden_, 1.0f);
                norm_into(row, layer.mlp_norm);
                choose_experts(layer, index, row);
            },
            [&] { group_by_expert(index); });
        mlp(phases, layer, index);
        phases.run(num_rows, [&](int row) {
            mix(index, row);
            norm_into(row, is_last ? decoder.final_norm_ : decoder.layers_[index + 1].attention_norm);
        });
    }

    float* x(int row) { return scratch.x.get() + size_t(row) * sizes.hidden; }
    float* normed(int row) { return scratch.normed.get() + size_t(row) * sizes.hidden; }

    void embed(int row) {
        const size_t first = size_t(plan.ids[row]) * sizes.hidden;
        float* const to = x(row);
        for (int i = 0; i < sizes.hidden; ++i) {
            to[i] = decoder.embedding_type_ == kBf16
                        ? bf16_to_float(static_cast<const uint16_t*>(decoder.embedding_)[first + i])
                        : static_cast<const float*>(decoder.embedding_)[first + i];
        }
    }

    void norm_into(int row, const std::vector<float>& weight) {
        rms_norm(x(row), weight.data(), sizes.hidden, sizes.norm_eps, normed(row));
    }

    void add(float* to, const float* from, float weight) {
        for (int i = 0; i < sizes.hidden; ++i) to[i] += weight * from[i];
    }

    // out[row] = matrix * in[row] for all rows; a task is a panel of outputs.
    void product(Phases& phases, const Packed& matrix, const float* in, int in_stride, float* out, int out_stride) {
        phases.run(matrix.num_panels(), [&](int panel) {
            const int width = std::min(kPanel, out_stride - panel * kPanel);
            const auto input = [&](int row) { return in + size_t(row) * in_stride; };
            panel_product(matrix, panel, num_rows, input, [&](int row, const float* outputs) {
                std::copy(outputs, outputs + width, out + size_t(row) * out_stride + panel * kPanel);
            });
        });
    }

    // Call `take(row, outputs of the panel)` for every row; `input(row)` is what the row multiplies.
    template <class Input, class Take>
    void panel_product(const Packed& matrix, int panel, int count, Input input, Take take) {
        alignas(64) float outputs[kRowsAtOnce * kPanel];
        const float* inputs[kRowsAtOnce];
        for (int first = 0; first < count; first += kRowsAtOnce) {
            const int size = std::min(kRowsAtOnce, count - first);
            for (int row = 0; row < size; ++row) inputs[row] = input(first + row);
            matrix.product(panel, inputs, size, outputs);
            for (int row = 0; row < size; ++row) take(first + row, outputs + row * kPanel);
        }
    }

    void rotate_and_write(const Layer& layer, int index, int row) {
        const int size = sizes.head_dim, num_queries = sizes.heads, num_keys = sizes.kv_heads;
        float* const queries = scratch.qkv.get() + size_t(row) * decoder.qkv_width_;
        float* const keys = queries + num_queries * size;
        normalize(queries, num_queries, layer.query_norm);
        normalize(keys, num_keys, layer.key_norm);
        const size_t angle = size_t(plan.positions[row]) * size;
        for (int head = 0; head < num_queries + num_keys; ++head) {
            rotate(queries + head * size, decoder.cosines_ + angle, decoder.sines_ + angle, size);
        }
        for (int head = 0; head < num_keys; ++head) {
            write(index, row, head, keys + head * size, keys + (num_keys + head) * size);
        }
    }

    void normalize(float* heads, int count, const std::vector<float>& weight) {
        if (sizes.qk_norm == kWhole) rms_norm(heads, weight.data(), count * sizes.head_dim, sizes.norm_eps, heads);
        if (sizes.qk_norm != kPerHead) return;
        for (int head = 0; head < count; ++head) {
            float* const one = heads + head * sizes.head_dim;
            rms_norm(one, weight.data(), sizes.head_dim, sizes.norm_eps, one);
        }
    }

    const int32_t* table(int row) { return plan.block_tables + size_t(plan.sequences[row]) * plan.table_width; }

    void write(int index, int row, int head, const float* key, const float* value) {
        const int size = sizes.head_dim, slot = plan.node_slots[row];
        if (slot >= 0) {
            std::copy(key, key + size, decoder.node_keys(index, head, slot));
            std::copy(value, value + size, decoder.node_values(index, head, slot));
            return;
        }
        const int position = plan.positions[row], block = table(row)[position / kBlock], offset = position % kBlock;
        float* const keys = decoder.block_keys(index, head, block);
        for (int i = 0; i < size; ++i) keys[i * kBlock + offset] = key[i];
        std::copy(value, value + size, decoder.block_values(index, head, block) + offset * size);
    }

    void attend_head(int thread, int index, int row, int head) {
        const int first = plan.ancestor_starts[row], size = sizes.head_dim;
        const Query query{scratch.qkv.get() + size_t(row) * decoder.qkv_width_ + head * size, table(row),
                          plan.ancestors + first, plan.num_committed[row], plan.ancestor_starts[row + 1] - first};
        attend(decoder.head_cache(index, head * sizes.kv_heads / sizes.heads), query, size,
               scratch.scores[thread].get(), scratch.attended.get() + (size_t(row) * sizes.heads + head) * size);
    }

    int32_t* chosen(int index, int row) {
        return scratch.experts.data() + (size_t(index) * sizes.max_rows + row) * num_chosen;
    }
    float* chosen_weights(int index, int row) {
        return scratch.expert_weights.get() + (size_t(index) * sizes.max_rows + row) * num_chosen;
    }
    int32_t* starts(int index) { return scratch.group_starts.data() + index * (decoder.num_experts_ + 1); }
    int32_t* choices(int index) { return scratch.group_choices.data() + size_t(index) * sizes.max_rows * num_chosen; }

    void choose_experts(const Layer& layer, int index, int row) {
        int32_t* const experts = chosen(index, row);
        float* const weights = chosen_weights(index, row);
        if (sizes.experts == 0) {
            experts[0] = 0;
            weights[0] = 1;
            return;
        }
        route(normed(row), layer.router.data(), sizes.hidden, sizes.experts, num_chosen,
              sizes.normalizes_expert_weights != 0, experts, weights);
        if (experts_out == nullptr) return;
        std::copy(experts, experts + num_chosen, experts_out + (size_t(row) * sizes.layers + index) * num_chosen);
    }

    // Counting sort of the rows' choices by expert.
    void group_by_expert(int index) {
        const int num_choices = num_rows * num_chosen, num_experts = decoder.num_experts_;
        const int32_t* const experts = chosen(index, 0);
        int32_t *const begin = starts(index), *const active = scratch.active.data() + index * num_experts;
        std::fill(begin, begin + num_experts + 1, 0);
        for (int choice = 0; choice < num_choices; ++choice) ++begin[experts[choice] + 1];
        int num_active = 0;
        for (int expert = 0; expert < num_experts; ++expert) {
            if (begin[expert + 1] > 0) active[num_active++] = expert;
            begin[expert + 1] += begin[expert];
        }
        std::vector<int32_t>& next = scratch.next_place;
        std::copy(begin, begin + num_experts, next.begin());
        for (int choice = 0; choice < num_choices; ++choice) choices(index)[next[experts[choice]]++] = choice;
        scratch.num_active[index] = num_active;
    }

    void mlp(Phases& phases, const Layer& layer, int index) {
        constexpr int kHalf = kPanel / 2;
        const int width = decoder.padded_inner_;
        const auto hidden_row = [&](int choice) { return normed(choice / num_chosen); };
        expert_product(phases, layer.gate_up, index, hidden_row, [&](int choice, int panel, const float* outputs) {
            silu_product(outputs, outputs + kHalf, kHalf, scratch.activated.get() + size_t(choice) * width + panel * kHalf);
        });
        const auto activated_row = [&](int choice) { return scratch.activated.get() + size_t(choice) * width; };
        expert_product(phases, layer.down, index, activated_row, [&](int choice, int panel, const float* outputs) {
            float* const to = scratch.expert_out.get() + size_t(choice) * decoder.padded_hidden_ + panel * kPanel;
            std::copy(outputs, outputs + kPanel, to);
        });
    }

    // One product per expert with the choices that fell on it; a task is a panel of an expert.
    template <class Input, class Take>
    void expert_product(Phases& phases, const std::vector<Packed>& matrices, int index, Input input, Take take) {
        const int num_panels = matrices[0].num_panels();
        phases.run(scratch.num_active[index] * num_panels, [&](int task) {
            const int expert = scratch.active[index * decoder.num_experts_ + task / num_panels];
            const int panel = task % num_panels, first = starts(index)[expert];
            const int32_t* const mine = choices(index) + first;
            panel_product(
                matrices[expert], panel, starts(index)[expert + 1] - first, [&](int i) { return input(mine[i]); },
                [&](int i, const float* outputs) { take(mine[i], panel, outputs); });
        });
    }

    // Best expert first: the order of the sum belongs to the row.
    void mix(int index, int row) {
        for (int rank = 0; rank < num_chosen; ++rank) {
            const size_t choice = size_t(row) * num_chosen + rank;
            add(x(row), scratch.expert_out.get() + choice * decoder.padded_hidden_, chosen_weights(index, row)[rank]);
        }
    }

    void head(Phases& phases) {
        const auto input = [&](int row) { return normed(plan.logit_rows[row]); };
        phases.run(decoder.head_.num_panels(), [&](int panel) {
            const int first = panel * kPanel, width = std::min(kPanel, sizes.vocab - first);
            panel_product(decoder.head_, panel, plan.num_logit_rows, input, [&](int row, const float* outputs) {
                std::copy(outputs, outputs + width, logits + size_t(row) * sizes.vocab + first);
            });
        });
    }
};

void Decoder::forward(const SlipstreamPlan& plan, float* logits, int32_t* experts) {
    while (int(scratch_.scores.size()) < slipstream::num_threads()) {
        scratch_.scores.push_back(unset(round_up(sizes_.num_positions, kBlock) + kBlock));
    }
    ForwardPass pass{*this, plan, logits, experts};
    slipstream::run_pass([](void* context, Phases& phases) { static_cast<ForwardPass*>(context)->walk(phases); }, &pass);
}

}  // namespace SLIPSTREAM_ISA
