// The C interface of one instruction set: the decoder, and its ops one by one for tests and measurements.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "decoder.h"
#include "export.h"
#include "rows.h"
#include "tiles.h"

namespace isa = SLIPSTREAM_ISA;
using slipstream::Phases;

namespace {

// What `make` returns, or `otherwise` where memory runs out.
template <class Make, class Result>
auto with_memory(Make make, Result otherwise) -> decltype(make()) {
    try {
        return make();
    } catch (const std::bad_alloc&) {
        return otherwise;
    }
}

// Rows as products read them, in memory that lasts from call to call.
class OpRows {
   public:
    const isa::Inputs& with_room(int num_rows, int inner, isa::Form form) {
        if (num_rows > num_rows_) {
            inputs_ = isa::Inputs(num_rows, inner, form, memory_);
            num_rows_ = num_rows;
        }
        return inputs_;
    }

    const isa::Inputs& holding(const float* x, int num_rows, int inner, isa::Form form) {
        with_room(num_rows, inner, form);
        for (int row = 0; row < num_rows; ++row) {
            std::copy_n(x + size_t(row) * inner, inner, inputs_.row(row));
            inputs_.convert(row);
        }
        return inputs_;
    }

   private:
    slipstream::Arena memory_;
    isa::Inputs inputs_;
    int num_rows_ = 0;
};

struct Matrix {
    slipstream::Arena memory;
    isa::Packed weights;
    OpRows rows;
};

struct ExpertLayer {
    slipstream::Arena memory;
    isa::Experts weights;
    OpRows rows, grouped, activated;
    isa::Form form;
};

}  // namespace

extern "C" {

auto SLIPSTREAM_EXPORT(decoder_new)(const SlipstreamSizes* sizes) -> void* {
    return with_memory([&]() -> void* { return new isa::Decoder(*sizes); }, nullptr);
}

void SLIPSTREAM_EXPORT(decoder_free)(void* decoder) { delete static_cast<isa::Decoder*>(decoder); }

int SLIPSTREAM_EXPORT(decoder_set)(void* decoder, int32_t part, int32_t layer, int32_t expert, const void* data,
                                   int32_t type) {
    const auto set = [&] {
        return static_cast<isa::Decoder*>(decoder)->set(SlipstreamPart(part), layer, expert, data, SlipstreamType(type));
    };
    return with_memory(set, false);
}

void SLIPSTREAM_EXPORT(decoder_forward)(void* decoder, const SlipstreamPlan* plan, float* logits, int32_t* experts) {
    static_cast<isa::Decoder*>(decoder)->forward(*plan, logits, experts);
}

void SLIPSTREAM_EXPORT(decoder_keep)(void* decoder, int32_t num_moves, const int32_t* moves) {
    static_cast<isa::Decoder*>(decoder)->keep(num_moves, moves);
}

auto SLIPSTREAM_EXPORT(matrix_new)(const void* data, int32_t type, int32_t packed_type, int32_t outputs, int32_t inner)
    -> void* {
    return with_memory(
        [&]() -> void* {
            auto matrix = std::make_unique<Matrix>();
            const isa::Source source{data, SlipstreamType(type), SlipstreamType(packed_type)};
            matrix->weights.pack(source, inner, isa::in_order(outputs).data(), outputs, matrix->memory);
            return matrix.release();
        },
        nullptr);
}

void SLIPSTREAM_EXPORT(matrix_free)(void* matrix) { delete static_cast<Matrix*>(matrix); }

// out[rows, outputs] = x[rows, inner] * matrix^T.
void SLIPSTREAM_EXPORT(matrix_product)(void* matrix, const float* x, int32_t num_rows, int32_t inner, float* out) {
    auto& [memory, weights, rows] = *static_cast<Matrix*>(matrix);
    const isa::Inputs& inputs = rows.holding(x, num_rows, inner, isa::form_for(weights.is_rounded()));
    slipstream::run_pass([&](Phases& phases) {
        const isa::TileSession tiles;
        isa::matrix_product(phases, weights, inputs, num_rows, out, weights.num_outputs());
    });
}

auto SLIPSTREAM_EXPORT(experts_new)(int32_t num_experts, int32_t hidden, int32_t inner, int32_t packs_int8) -> void* {
    return new ExpertLayer{{}, isa::Experts(num_experts, hidden, inner), {}, {}, {}, isa::form_for(packs_int8 != 0)};
}

void SLIPSTREAM_EXPORT(experts_free)(void* experts) { delete static_cast<ExpertLayer*>(experts); }

int SLIPSTREAM_EXPORT(experts_set)(void* experts, int32_t expert, const void* gate_up, const void* down, int32_t type) {
    auto& layer = *static_cast<ExpertLayer*>(experts);
    const SlipstreamType packed_type = layer.form == isa::Form::kBytes ? kInt8 : SlipstreamType(type);
    const auto matrix = [&](const void* data) { return isa::Source{data, SlipstreamType(type), packed_type}; };
    const auto set = [&] {
        layer.weights.set_gate_up(expert, matrix(gate_up), layer.memory);
        layer.weights.set_down(expert, matrix(down), layer.memory);
        return true;
    };
    return with_memory(set, false);
}

// out[row] = sum over its chosen experts of weight * down(silu(gate) * up).
void SLIPSTREAM_EXPORT(experts_run)(void* experts, const float* x, int32_t num_rows, int32_t num_chosen,
                                    int32_t* chosen, float* chosen_weights, float* out) {
    auto& layer = *static_cast<ExpertLayer*>(experts);
    const isa::Experts& weights = layer.weights;
    const int num_experts = weights.num_experts(), num_choices = num_rows * num_chosen;
    std::vector<int32_t> starts(num_experts + 1), choices(num_choices), active(num_experts), num_active(1);
    const isa::Routing routing{num_chosen,     chosen,        chosen_weights,   starts.data(),
                               choices.data(), active.data(), num_active.data()};
    isa::group_by_expert(routing, num_rows, num_experts);
    const isa::Inputs& rows = layer.rows.holding(x, num_rows, weights.hidden(), layer.form);
    const isa::ExpertInputs inputs{layer.grouped.with_room(num_choices, weights.hidden(), layer.form),
                                   layer.activated.with_room(num_choices, weights.activated_width(), layer.form)};
    std::vector<float> expert_out(size_t(num_choices) * weights.out_width());
    slipstream::run_pass([&](Phases& phases) {
        const isa::TileSession tiles;
        isa::run_experts(phases, weights, routing, num_rows, rows, inputs, expert_out.data());
    });
    for (int row = 0; row < num_rows; ++row) {
        float* const to = out + size_t(row) * weights.hidden();
        std::fill(to, to + weights.hidden(), 0.0f);
        isa::add_experts(weights, routing, row, expert_out.data(), to);
    }
}

// Query heads that share one key head, of rows [num_rows, num_heads, size] whose neighbours of one sequence attend together.
// Keys and values lie as attention.h says, blocks contiguous, those of node slots from `first_node_block` on.
void SLIPSTREAM_EXPORT(tree_attention)(const float* queries, const float* keys, const float* values,
                                       int32_t first_node_block, int32_t num_blocks, const int32_t* sequences,
                                       const int32_t* tables, int32_t table_width, const int32_t* num_committed,
                                       const int32_t* ancestor_starts, const int32_t* ancestors, int32_t num_rows,
                                       int32_t num_heads, int32_t size, float* out) {
    const isa::HeadCache<float> cache{keys, values, long(isa::kBlock) * size, first_node_block};
    std::vector<isa::AttendingRow> rows;
    for (int32_t row = 0; row < num_rows; ++row) {
        const int64_t place = int64_t(row) * num_heads * size;
        rows.push_back({queries + place, ancestors + ancestor_starts[row], num_committed[row],
                        ancestor_starts[row + 1] - ancestor_starts[row], out + place});
    }
    const int num_positions = table_width * isa::kBlock, num_slots = (num_blocks - first_node_block) * isa::kBlock;
    std::vector<float> scores(isa::scores_size(num_positions + num_slots, num_slots));
    for (int32_t first = 0, end = 0; first < num_rows; first = end) {
        while (end < num_rows && sequences[end] == sequences[first]) ++end;
        isa::attend(cache, tables + int64_t(sequences[first]) * table_width, rows.data() + first, end - first, num_heads,
                    size, scores.data());
    }
}

void SLIPSTREAM_EXPORT(rms_norm)(const float* x, const float* weight, int32_t num_rows, int32_t size, float epsilon,
                                 float* out) {
    for (int row = 0; row < num_rows; ++row) isa::rms_norm(x + row * size, weight, size, epsilon, out + row * size);
}

void SLIPSTREAM_EXPORT(rotate)(float* heads, const float* cosines, const float* sines, int32_t num_heads, int32_t size) {
    for (int head = 0; head < num_heads; ++head) isa::rotate(heads + head * size, cosines, sines, size);
}

void SLIPSTREAM_EXPORT(route)(const float* x, const float* router, int32_t num_rows, int32_t hidden, int32_t num_experts,
                              int32_t num_chosen, int32_t normalizes, int32_t* experts, float* weights) {
    for (int row = 0; row < num_rows; ++row) {
        isa::route(x + row * hidden, router, hidden, num_experts, num_chosen, normalizes != 0,
                   experts + row * num_chosen, weights + row * num_chosen);
    }
}

void SLIPSTREAM_EXPORT(exp)(const float* x, int32_t size, float* out) {
    for (int i = 0; i < size; ++i) out[i] = isa::exp(isa::splat(x[i]))[0];
}

}  // extern "C"
