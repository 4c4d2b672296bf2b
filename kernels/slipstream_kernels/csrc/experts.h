// The MLP of one layer: every row goes through the experts chosen for it, and each expert's weights are read once.
#pragma once

#include <vector>

#include "matmul.h"
#include "pool.h"

namespace SLIPSTREAM_ISA {

using slipstream::Phases;

// Gate, up and down of every expert; a dense MLP is one expert.
class Experts {
   public:
    Experts(int num_experts, int hidden, int inner);
    Experts(Experts&&) = default;

    // Source matrices are row-major: gate and up stacked [2 * inner, hidden], down [hidden, inner].
    void set_gate_up(int expert, const Source& source, Arena& memory);
    void set_down(int expert, const Source& source, Arena& memory);

    int num_experts() const { return int(gate_up_.size()); }
    int hidden() const { return hidden_; }
    // Values per choice of `activated` and of `out` below.
    int activated_width() const { return activated_width_; }
    int out_width() const { return out_width_; }

   private:
    friend struct ExpertPass;

    int hidden_, inner_, activated_width_, out_width_;
    std::vector<Packed> gate_up_, down_;
};

// Which experts the rows chose. A choice is row * num_chosen + rank.
struct Routing {
    int num_chosen;
    int32_t* experts;     // [T, K], best first
    float* weights;       // [T, K]
    int32_t* starts;      // [E + 1]: where an expert's choices begin in `choices`
    int32_t* choices;     // [T * K], by expert, then ascending
    int32_t* active;      // [E]: experts that were chosen, those with most rows first
    int32_t* num_active;  // [1]
};

// Fill starts, choices, active and num_active from `experts`.
void group_by_expert(const Routing& routing, int num_rows, int num_experts);

// What the experts' products read, a row for every choice, those of an expert side by side.
struct ExpertInputs {
    Inputs grouped;    // [T * K, hidden]: the rows themselves, where products read neighbours alone
    Inputs activated;  // [T * K, inner], padded to half panels: silu(gate) * up
};

// out[choice] = down * (silu(gate) * up) of its row. Rows were converted if they have another form.
void run_experts(Phases& phases, const Experts& experts, const Routing& routing, int num_rows, const Inputs& rows,
                 const ExpertInputs& inputs, float* out);

// to[0..hidden) += weight * out of every choice of a row, best expert first: the order of the sum belongs to the row.
void add_experts(const Experts& experts, const Routing& routing, int row, const float* out, float* to);

}  // namespace SLIPSTREAM_ISA
