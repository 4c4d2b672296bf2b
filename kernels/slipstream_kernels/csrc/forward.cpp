#include <algorithm>

#include "decoder.h"
#include "rows.h"
#include "tiles.h"

namespace SLIPSTREAM_ISA {

constexpr int kMaxRun = 8;
constexpr int kRunsPerThread = 4;  // and more, where there are rows for it

// Places first <= place < end, whose rows are of one sequence.
struct Run {
    int first, end;
};

// One pass. The steps of a layer, each a phase whose tasks the threads share:
//
//   norm -> queries, keys, values -> rotate and write to the cache -> attend (-> round) -> attention out
//        -> add, norm and route (-> rows by expert) -> gate and up (-> round) -> down -> (next layer) add and norm ...
//
// Where matrices are int8, what they multiply is rounded once the whole row is there: a norm has it at hand, but heads
// and panels of a row are the work of several tasks. Parts for matrix tiles are made by each of these tasks.
//
// Behind its keys and values, the last layer is computed for rows whose logits are wanted alone: nobody else looks at it.
// There, place `i` of a buffer belongs to the i-th of these rows.
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
        const TileSession tiles;
        phases.run(num_rows, [&](int row) {
            embed(row);
            if (experts_out != nullptr) std::fill_n(experts_of(row, sizes.layers - 1), num_chosen, -1);
            norm_into(row, row, decoder.layers_[0]->attention_norm);
        });
        for (int index = 0; index < sizes.layers; ++index) layer(phases, index);
        head(phases);
    }

    void layer(Phases& phases, int index) {
        const Layer& layer = *decoder.layers_[index];
        const Routing routes = routing(index);
        const bool is_last = index + 1 == sizes.layers;
        const int num_places = is_last ? plan.num_logit_rows : num_rows;
        const auto row_at = [&](int place) { return is_last ? plan.logit_rows[place] : place; };
        matrix_product(phases, layer.qkv, scratch.normed, num_rows, scratch.qkv, decoder.qkv_width_);
        phases.run(num_rows, [&](int row) { rotate_and_write(layer, index, row); });
        if (num_places == 0) return;
        const std::vector<int32_t>& starts = is_last ? scratch.logit_runs : scratch.runs;
        const int num_runs = int(starts.size()) - 1;
        phases.run(sizes.kv_heads * num_runs, [&](int task) {
            const Run run{starts[task % num_runs], starts[task % num_runs + 1]};
            const auto attend_as = [&](auto stored) {
                attend_run<decltype(stored)>(phases.thread(), index, task / num_runs, run, row_at);
            };
            decoder.cache_.is_rounded() ? attend_as(uint16_t()) : attend_as(float());
        });
        if (scratch.attended.needs_whole_rows()) phases.run(num_places, [&](int place) { scratch.attended.convert(place); });
        matrix_product(phases, layer.attention_out, scratch.attended, num_places, scratch.delta, decoder.delta_width_);
        phases.run(
            num_places,
            [&](int place) {
                const int row = row_at(place);
                add_scaled(scratch.delta + size_t(place) * decoder.delta_width_, 1.0f, sizes.hidden, x(row));
                norm_into(row, place, layer.mlp_norm);
                choose_experts(layer, index, row, place);
            },
            [&] { group_by_expert(routes, num_places, decoder.num_experts_); });
        run_experts(phases, layer.mlp, routes, num_places, scratch.normed, scratch.expert_inputs, scratch.expert_out);
        phases.run(num_places, [&](int place) {
            const int row = row_at(place);
            add_experts(layer.mlp, routes, place, scratch.expert_out, x(row));
            norm_into(row, place, is_last ? decoder.final_norm_ : decoder.layers_[index + 1]->attention_norm);
        });
    }

    float* x(int row) { return scratch.x + size_t(row) * sizes.hidden; }

    void embed(int row) {
        const size_t first = size_t(plan.ids[row]) * sizes.hidden;
        float* const to = x(row);
        for (int i = 0; i < sizes.hidden; ++i) to[i] = decoder.embedding_.at(first + i);
    }

    void norm_into(int row, int place, const std::vector<float>& weight) {
        rms_norm(x(row), weight.data(), sizes.hidden, sizes.norm_eps, scratch.normed.row(place));
        scratch.normed.convert(place);
    }

    void rotate_and_write(const Layer& layer, int index, int row) {
        const int size = sizes.head_dim, num_queries = sizes.heads, num_keys = sizes.kv_heads;
        float* const queries = scratch.qkv + size_t(row) * decoder.qkv_width_;
        float* const keys = queries + num_queries * size;
        normalize(queries, num_queries, layer.query_norm);
        normalize(keys, num_keys, layer.key_norm);
        const size_t angle = size_t(plan.positions[row]) * size;
        for (int head = 0; head < num_queries + num_keys; ++head) {
            rotate(queries + head * size, decoder.cosines_ + angle, decoder.sines_ + angle, size);
        }
        for (int head = 0; head < num_keys; ++head) {
            decoder.cache_.write(index, head, cache_place(row), keys + head * size, keys + (num_keys + head) * size);
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

    CachePlace cache_place(int row) {
        const int slot = plan.node_slots[row], position = plan.positions[row];
        if (slot >= 0) return decoder.cache_.place_of_node(slot);
        return {table(row)[position / kBlock], position % kBlock};
    }

    // The query heads that share a key head, of all rows of a run.
    template <class Stored, class RowAt>
    void attend_run(int thread, int index, int kv_head, Run run, RowAt row_at) {
        const int size = sizes.head_dim, num_shared = sizes.heads / sizes.kv_heads, first = kv_head * num_shared * size;
        AttendingRow rows[kMaxRun];
        int number = 0;
        for (int place = run.first; place < run.end; ++place) {
            const int row = row_at(place), start = plan.ancestor_starts[row];
            rows[number++] = {scratch.qkv + size_t(row) * decoder.qkv_width_ + first, plan.ancestors + start,
                              plan.num_committed[row], plan.ancestor_starts[row + 1] - start,
                              scratch.attended.row(place) + first};
        }
        attend(decoder.cache_.head<Stored>(index, kv_head), table(row_at(run.first)), rows, number, num_shared, size,
               scratch.scores[thread]);
        for (int place = run.first; place < run.end; ++place) {
            scratch.attended.split(place, first, num_shared * size);
        }
    }

    // This layer's part of the routing buffers, see Scratch.
    Routing routing(int index) {
        const size_t choices = size_t(sizes.max_rows) * num_chosen;
        return {num_chosen,
                scratch.experts.data() + index * choices,
                scratch.expert_weights + index * choices,
                scratch.group_starts.data() + index * (decoder.num_experts_ + 1),
                scratch.group_choices.data() + index * choices,
                scratch.active.data() + index * decoder.num_experts_,
                scratch.num_active.data() + index};
    }

    void choose_experts(const Layer& layer, int index, int row, int place) {
        const Routing routes = routing(index);
        int32_t* const experts = routes.experts + place * num_chosen;
        float* const weights = routes.weights + place * num_chosen;
        if (sizes.experts == 0) {
            experts[0] = 0;
            weights[0] = 1;
            return;
        }
        route(scratch.normed.row(place), layer.router.data(), sizes.hidden, sizes.experts, num_chosen,
              sizes.normalizes_expert_weights != 0, experts, weights);
        if (experts_out != nullptr) std::copy(experts, experts + num_chosen, experts_of(row, index));
    }

    int32_t* experts_of(int row, int index) { return experts_out + (size_t(row) * sizes.layers + index) * num_chosen; }

    void head(Phases& phases) {
        matrix_product(phases, decoder.head_, scratch.normed, plan.num_logit_rows, logits, sizes.vocab);
    }
};

// Where runs of rows begin that attend together, since they are of one sequence and read the same keys: as long as all
// threads have work. The last run ends where `starts` does.
template <class RowAt>
void find_runs(const SlipstreamPlan& plan, int num_places, int num_kv_heads, RowAt row_at,
               std::vector<int32_t>& starts) {
    const int num_tasks = kRunsPerThread * slipstream::num_threads();
    const int longest = std::clamp(num_places * num_kv_heads / num_tasks, 1, kMaxRun);
    starts.clear();
    for (int place = 0; place < num_places; ++place) {
        const bool goes_on = place > 0 && plan.sequences[row_at(place)] == plan.sequences[row_at(place - 1)];
        if (!goes_on || place - starts.back() == longest) starts.push_back(place);
    }
    starts.push_back(num_places);
}

void Decoder::forward(const SlipstreamPlan& plan, float* logits, int32_t* experts) {
    while (int(scratch_.scores.size()) < slipstream::num_threads()) {
        scratch_.scores.push_back(memory_.take<float>(scores_size(sizes_.num_positions, sizes_.num_node_slots)));
    }
    find_runs(plan, plan.num_rows, sizes_.kv_heads, [](int place) { return place; }, scratch_.runs);
    find_runs(plan, plan.num_logit_rows, sizes_.kv_heads, [&](int place) { return plan.logit_rows[place]; },
              scratch_.logit_runs);
    ForwardPass pass{*this, plan, logits, experts};
    slipstream::run_pass([&](Phases& phases) { pass.walk(phases); });
}

}  // namespace SLIPSTREAM_ISA
