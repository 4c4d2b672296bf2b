// A chain drafted token after token by a small decoder, in one call: pass, choose, and again.
#include <algorithm>
#include <cmath>
#include <vector>

#include "decoder.h"
#include "export.h"
#include "sampling.h"
#include "survival.h"

namespace SLIPSTREAM_ISA {
namespace {

// The tokens that end a request's output: `sampling.StopTokens`, field by field; those of request b end before ends[b].
struct StopTokens {
    const int32_t *ids, *ends;

    bool has(int32_t request, int32_t token) const {
        const int32_t first = request > 0 ? ends[request - 1] : 0;
        return std::find(ids + first, ids + ends[request], token) != ids + ends[request];
    }
};

// `chain._ChainPlan`, field by field; B requests, in the order of the first pass's rows of logits.
struct ChainPlan {
    int32_t num_requests, width;  // of `tokens` and `scores`
    const int32_t *slots, *max_tokens;
    const int32_t* bases;    // where each request's cached text begins: positions of the cache count from there
    const SampleRow* draws;  // at the position of each request's first drafted token
    StopTokens stops;
    int32_t* tokens;         // out [B, width, kNumChoices]: the chain's token, then what might stand in its place
    double* scores;          // out [B, width, kNumChoices]: how sure the draft is of each
    int32_t* lengths;        // out [B]
    double min_survival;     // a chain whose next token would survive less often is not continued
    double pass_tokens;      // what a pass costs, in tokens: none is made that promises less above min_survival
    const double* survivals[2];  // at temperature 0, above it: [depths, score levels]; null: the scores themselves
};

// Of the token behind those drafted so far: where its choices are written, and how it is drawn.
int64_t place_of_next(const ChainPlan& chain, int32_t request) {
    return (int64_t(request) * chain.width + chain.lengths[request]) * kNumChoices;
}

SampleRow draw_of_next(const ChainPlan& chain, int32_t request) {
    SampleRow draw = chain.draws[request];
    draw.position += chain.lengths[request];
    return draw;
}

double survival_of(const ChainPlan& chain, double temperature, int32_t depth, double score) {
    const double* const estimates = chain.survivals[temperature != 0.0];
    return estimates == nullptr ? score : estimates[depth_cell(depth) * kNumScoreLevels + score_level(score)];
}

// Rows of the passes behind the first: each growing chain's newest token, at its own position.
class Rows {
   public:
    void clear() { ids_.clear(), positions_.clear(), slots_.clear(), requests_.clear(); }

    void add(int32_t request, int32_t slot, int32_t id, int32_t position) {
        requests_.push_back(request);
        slots_.push_back(slot);
        ids_.push_back(id);
        positions_.push_back(position);
    }

    int32_t number() const { return int32_t(ids_.size()); }
    int32_t request(int32_t row) const { return requests_[size_t(row)]; }

    SlipstreamPlan plan(const SlipstreamPlan& like) {
        const size_t number = ids_.size();
        committed_.assign(positions_.begin(), positions_.end());
        for (int32_t& one : committed_) ++one;
        no_nodes_.assign(number, -1);
        starts_.assign(number + 1, 0);
        wanted_.resize(number);
        for (size_t row = 0; row < number; ++row) wanted_[row] = int32_t(row);
        SlipstreamPlan plan = like;
        plan.num_rows = plan.num_logit_rows = int32_t(number);
        plan.ids = ids_.data();
        plan.positions = positions_.data();
        plan.sequences = slots_.data();
        plan.num_committed = committed_.data();
        plan.node_slots = no_nodes_.data();
        plan.ancestor_starts = starts_.data();
        plan.ancestors = starts_.data();
        plan.logit_rows = wanted_.data();
        return plan;
    }

   private:
    std::vector<int32_t> requests_, ids_, positions_, slots_, committed_, no_nodes_, starts_, wanted_;
};

// The choices behind each growing chain, from its row of logits.
void choose_next(const ChainPlan& chain, const Rows& growing, const float* logits, int32_t vocab_size) {
    const auto choose = [&](int row) {
        const int32_t request = growing.request(row);
        const int64_t place = place_of_next(chain, request);
        best_choices(logits + int64_t(row) * vocab_size, vocab_size, draw_of_next(chain, request), chain.tokens + place,
                     chain.scores + place);
    };
    if (growing.number() == 1) return choose(0);
    // Behind a pass all threads are awake, so that two rows are enough: four at temperature 1 take 0.05 ms less.
    slipstream::run_pass([&](slipstream::Phases& phases) { phases.run(growing.number(), choose); });
}

void draft(Decoder& decoder, const SlipstreamPlan& first, int32_t vocab_size, float* logits, const ChainPlan& chain) {
    static thread_local Rows growing, next;
    static thread_local std::vector<double> paths;
    paths.assign(size_t(chain.num_requests), 1.0);
    growing.clear();
    for (int32_t request = 0; request < chain.num_requests; ++request) {
        chain.lengths[request] = 0;
        growing.add(request, chain.slots[request], 0, 0);  // the first pass has its own places
    }
    decoder.forward(first, logits, nullptr);
    while (true) {
        choose_next(chain, growing, logits, vocab_size);
        next.clear();
        double promised = 0.0;
        for (int32_t row = 0; row < growing.number(); ++row) {
            const int32_t request = growing.request(row), length = chain.lengths[request];
            const int64_t place = place_of_next(chain, request);
            const SampleRow draw = draw_of_next(chain, request);
            const int32_t token = chain.tokens[place];
            const double score = chain.scores[place];
            chain.lengths[request] = length + 1;
            double& path = paths[size_t(request)];
            path *= survival_of(chain, draw.temperature, length + 1, score);
            // The next token survives its forerunners as they survived theirs, on average.
            const double next_path = path * std::pow(path, 1.0 / (length + 1));
            const bool can_go_on = length + 1 < chain.max_tokens[request] && !chain.stops.has(request, token);
            if (can_go_on && next_path >= chain.min_survival) {
                promised += next_path - chain.min_survival;
                next.add(request, chain.slots[request], token, draw.position - chain.bases[request]);
            }
        }
        if (next.number() == 0 || promised < chain.pass_tokens) return;
        std::swap(growing, next);
        decoder.forward(growing.plan(first), logits, nullptr);
    }
}

}  // namespace
}  // namespace SLIPSTREAM_ISA

extern "C" {

// The first pass brings the cache level and ends with a row of logits for each request of the chain plan.
void SLIPSTREAM_EXPORT(draft_chain)(void* decoder, const SlipstreamPlan* first, int32_t vocab_size, float* logits,
                                    const void* chain) {
    using namespace SLIPSTREAM_ISA;
    draft(*static_cast<Decoder*>(decoder), *first, vocab_size, logits, *static_cast<const ChainPlan*>(chain));
}

}  // extern "C"
