#include "experts.h"

#include <algorithm>
#include <numeric>

#include "rows.h"

namespace SLIPSTREAM_ISA {
namespace {

constexpr int kHalf = kPanel / 2;

// Every panel holds as many gates as ups, so that one task has both of an output; what is beyond `inner` is zero.
std::vector<int> gates_beside_ups(int inner) {
    std::vector<int> order(size_t(round_up(inner, kHalf)) * 2);
    for (int o = 0; o < int(order.size()); ++o) {
        const int column = o / kPanel * kHalf + o % kHalf;
        order[o] = column >= inner ? -1 : o % kPanel < kHalf ? column : inner + column;
    }
    return order;
}

}  // namespace

Experts::Experts(int num_experts, int hidden, int inner)
    : hidden_(hidden),
      inner_(inner),
      activated_width_(round_up(inner, kHalf)),
      out_width_(round_up(hidden, kPanel)),
      gate_up_(num_experts),
      down_(num_experts) {}

void Experts::set_gate_up(int expert, const Source& source, Arena& memory) {
    const std::vector<int> order = gates_beside_ups(inner_);
    gate_up_[expert].pack(source, hidden_, order.data(), int(order.size()), memory);
}

void Experts::set_down(int expert, const Source& source, Arena& memory) {
    down_[expert].pack(source, inner_, in_order(hidden_).data(), hidden_, memory);
}

void group_by_expert(const Routing& routing, int num_rows, int num_experts) {
    const int num_choices = num_rows * routing.num_chosen;
    int32_t* const starts = routing.starts;
    std::fill(starts, starts + num_experts + 1, 0);
    for (int choice = 0; choice < num_choices; ++choice) ++starts[routing.experts[choice] + 1];
    int num_active = 0;
    for (int expert = 0; expert < num_experts; ++expert) {
        if (starts[expert + 1] > 0) routing.active[num_active++] = expert;
        starts[expert + 1] += starts[expert];
    }
    // Counting sort: starts[e] walks through the group of e, and so ends where the group of e + 1 begins.
    for (int choice = 0; choice < num_choices; ++choice) routing.choices[starts[routing.experts[choice]]++] = choice;
    for (int expert = num_experts; expert > 0; --expert) starts[expert] = starts[expert - 1];
    starts[0] = 0;
    const auto count = [&](int32_t expert) { return starts[expert + 1] - starts[expert]; };
    std::sort(routing.active, routing.active + num_active, [&](int32_t a, int32_t b) {
        return count(a) != count(b) ? count(a) > count(b) : a < b;
    });
    *routing.num_active = num_active;
}

struct ExpertPass {
    const Experts& experts;
    const Routing& routing;

    // One product per active expert with the choices that fell on it; a task is a panel of an expert. Experts with many
    // rows come first and keep a core busy, those with few wait for memory: side by side they need both at once.
    // `place(i)` is where routing.choices[i] has its row of inputs; `take(i, panel, outputs)`.
    template <class Place, class Take>
    void product(Phases& phases, const std::vector<Packed>& matrices, const Inputs& inputs, Place place,
                 Take take) const {
        const int num_panels = matrices[0].num_panels();
        phases.run(*routing.num_active * num_panels, [&](int task) {
            const int expert = routing.active[task / num_panels], panel = task % num_panels;
            const int first = routing.starts[expert], count = routing.starts[expert + 1] - first;
            panel_product(
                matrices[expert], panel, inputs, count, [&](int i) { return place(first + i); },
                [&](int i, const float* outputs) { take(first + i, panel, outputs); });
        });
    }

    void run(Phases& phases, int num_rows, const Inputs& rows, const ExpertInputs& inputs, float* out) const {
        const auto& [grouped, activated] = inputs;
        const int num_choices = num_rows * routing.num_chosen;
        const auto row_of = [&](int i) { return routing.choices[i] / routing.num_chosen; };
        const auto itself = [](int i) { return i; };
        const auto activate = [&](int i, int panel, const float* outputs) {
            silu_product(outputs, outputs + kHalf, kHalf, activated.row(i) + panel * kHalf);
            activated.split(i, panel * kHalf, kHalf);
        };
        // Tiles are loaded from rows side by side, as those of one row or of the only expert are.
        if (kHasTiles && num_rows > 1 && experts.num_experts() > 1) {
            phases.run(num_choices, [&](int i) { grouped.copy(i, rows, row_of(i)); });
            product(phases, experts.gate_up_, grouped, itself, activate);
        } else {
            product(phases, experts.gate_up_, rows, row_of, activate);
        }
        if (activated.needs_whole_rows()) phases.run(num_choices, [&](int i) { activated.convert(i); });
        product(phases, experts.down_, activated, itself, [&](int i, int panel, const float* outputs) {
            float* const to = out + size_t(routing.choices[i]) * experts.out_width_ + panel * kPanel;
            std::copy(outputs, outputs + kPanel, to);
        });
    }
};

void run_experts(Phases& phases, const Experts& experts, const Routing& routing, int num_rows, const Inputs& rows,
                 const ExpertInputs& inputs, float* out) {
    ExpertPass{experts, routing}.run(phases, num_rows, rows, inputs, out);
}

void add_experts(const Experts& experts, const Routing& routing, int row, const float* out, float* to) {
    for (int rank = 0; rank < routing.num_chosen; ++rank) {
        const size_t choice = size_t(row) * routing.num_chosen + rank;
        add_scaled(out + choice * experts.out_width(), routing.weights[choice], experts.hidden(), to);
    }
}

}  // namespace SLIPSTREAM_ISA
