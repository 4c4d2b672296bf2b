// One tree a request from the candidates of all drafters, and the budget of a step; merging.py says what they mean.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "export.h"
#include "lookup.h"
#include "recycling.h"
#include "survival.h"

namespace SLIPSTREAM_ISA {
namespace {

// `merging.DRAFTERS`, in order. The last one is what the others' candidates for one node are together.
enum Drafter : int32_t { kChain, kRecycling, kLookup, kPool, kMerged, kNumDrafters };

// What the candidates of one drafter are worth at one kind of temperature: `merging.Cells`, field by field.
struct Cells {
    const double* survivals;   // [ranks, places, levels]: estimates
    double *tried, *accepted;  // the same shape: counts since the estimates were made
    double* curve;             // [3, kNumBins]: trials, the sum of their predictions, accepted
    int64_t num_levels;
};

constexpr int32_t kNumRanks = 8, kNumBins = 20;
constexpr int32_t kMaxContinuations = 4;  // of a look-up
constexpr int32_t kMaxCandidates = 1 + kWidth + 2 * kMaxContinuations;

int32_t match_level(int32_t length) {
    constexpr int32_t kEnds[] = {0, 1, 2, 4, 8, 16, 32};
    int32_t level = 0;
    for (const int32_t end : kEnds) level += length > end;
    return level > 0 ? level - 1 : 0;
}

// What a drafter proposed behind a node, and the cell that predicted how often such a candidate is accepted.
struct Proposal {
    int32_t token, drafter, cell;
    double survival;
};

// A node of a request's tree, or its root. `survival` is that of the whole path; bit i of `agreeing` says that text i
// (the chain, then continuations) reads as the path does; what was proposed behind the node are the request's proposals
// [first, end), none if nothing was looked for.
struct Node {
    int32_t token, parent, depth;
    uint32_t agreeing;
    double survival;
    int32_t first, end;
};

struct Candidate {
    Node node;
    int32_t order;

    bool operator<(const Candidate& other) const {
        return node.survival < other.node.survival || (node.survival == other.node.survival && order > other.order);
    }
};

// How often one request went on with one of the candidates behind it, beside how often it should have.
class Predictability {
   public:
    void note(double expected, bool has_come) {
        tried_ = kKept * tried_ + 1.0;
        expected_ = kKept * expected_ + std::min(expected, 1.0);
        came_ = kKept * came_ + has_come;
    }

    // The survival that candidates of this request have, where those of all requests have `survival`.
    double corrected(double survival) const {
        const double odds = (came_ + kFaith) / (tried_ - came_ + kFaith);
        const double expected_odds = (expected_ + kFaith) / (tried_ - expected_ + kFaith);
        const double ratio = odds / expected_odds;
        return survival * ratio / (1.0 - survival + survival * ratio);
    }

   private:
    static constexpr double kKept = 0.95;  // what older tokens still count for with every new one
    static constexpr double kFaith = 2.0;  // so many came, and so many did not, before any was seen

    double tried_ = 0.0, expected_ = 0.0, came_ = 0.0;
};

// What is kept of the request in a slot: its text, and the tree that its next tokens will judge.
struct Slot {
    SuffixAutomaton text;
    std::vector<Node> nodes;
    std::vector<Proposal> proposals;
    Predictability predictability;
    bool is_sampled = false;

    void forget_tree() {
        nodes.clear();
        proposals.clear();
    }
};

// `merging._Plan`, field by field.
struct Plan {
    int32_t num_requests, num_choosing, num_matrices, id_bytes, vocab_size, chain_width, max_step_nodes;
    int32_t drafters;  // bit d: whether drafter d takes part, where that is not seen from what it is given
    double token_rate, min_survival;
    const int32_t* slots;
    const SampleRow* draws;
    const int32_t* limits;  // [B, 4]: matrix (-1: none), root, nodes, depth
    const uint64_t* scopes;
    const int32_t *new_tokens, *new_ends;
    const int32_t *chain_tokens, *chain_lengths;  // [B, chain_width], [B]
    const double* chain_scores;
    const void* const* matrix_ids;
    const uint16_t* const* matrix_logprobs;
    const Rule* rule;
    const Cells* cells;  // [2, kNumDrafters]: at temperature 0, above it
    const double* step_s;
    int32_t *tokens, *parents, *ends;
    double* figures;  // out: expected tokens, candidates judged
};

struct Merger {
    Merger(int32_t num_slots, int64_t pool_tokens) : slots(size_t(num_slots)), pool(pool_tokens) {}

    std::vector<Slot> slots;
    OutputPool pool;
};

// ------------------------------------------------------------------------------------------------------- one tree

// Grows the tree of one request, best first.
class Growth {
   public:
    Growth(const Plan& plan, int32_t request, Merger& merger)
        : limits_(plan.limits + 4 * int64_t(request)),
          slot_(merger.slots[size_t(plan.slots[request])]),
          cells_(plan.cells + (plan.draws[request].temperature != 0.0 ? kNumDrafters : 0)),
          chain_{plan.chain_tokens + int64_t(request) * plan.chain_width, plan.chain_lengths[request], false, 0},
          chain_scores_(plan.chain_scores + int64_t(request) * plan.chain_width),
          min_survival_(plan.min_survival),
          has_matrix_(limits_[0] >= 0),
          matrix_(has_matrix_ ? Matrix{plan.matrix_ids[limits_[0]], plan.matrix_logprobs[limits_[0]], plan.id_bytes,
                                       plan.vocab_size}
                              : Matrix{nullptr, nullptr, plan.id_bytes, plan.vocab_size}),
          scorer_(matrix_, plan.draws[request], *plan.rule) {
        slot_.forget_tree();
        slot_.is_sampled = plan.draws[request].temperature != 0.0;
        const SuffixAutomaton& text = slot_.text;
        if (plan.drafters >> kLookup & 1) add_texts(kLookup, text.continuations(kMaxContinuations, 1, found_));
        if (plan.drafters >> kPool & 1) {
            add_texts(kPool, merger.pool.look_up(plan.scopes[request], text.tokens(), text.num_tokens(), limits_[3],
                                                 kMaxContinuations, found_));
        }
    }

    void run() {
        const int32_t max_nodes = limits_[2], max_depth = limits_[3];
        heap_.clear();
        slot_.nodes.push_back({limits_[1], -1, 0, ~0u, 1.0, 0, 0});
        for (int32_t node = 0;; node = int32_t(slot_.nodes.size()) - 1) {
            if (slot_.nodes[size_t(node)].depth < max_depth) expand(node);
            if (heap_.empty() || node == max_nodes) return;
            std::pop_heap(heap_.begin(), heap_.end());
            const Node next = heap_.back().node;
            heap_.pop_back();
            if (next.survival < min_survival_) return;
            slot_.nodes.push_back(next);
        }
    }

   private:
    // A token that some drafters propose behind one node.
    struct Meeting {
        int32_t token;
        uint32_t agreeing;
        int32_t sources;  // who proposes it: 1 the chain, 2 Token Recycling, 4 a look-up
        double survival;  // the largest of theirs
    };

    void add_texts(Drafter drafter, int32_t number) {
        for (int32_t one = 0; one < number; ++one) texts_[num_texts_++] = {found_[one], drafter};
    }

    void expand(int32_t index) {
        const Node node = slot_.nodes[size_t(index)];
        const int32_t depth = node.depth + 1;
        num_meetings_ = 0;
        first_here_ = slot_.proposals.size();
        slot_.nodes[size_t(index)].first = int32_t(first_here_);
        if ((node.agreeing & 1) && node.depth < chain_.num_tokens) {
            propose(kChain, chain_.tokens[node.depth], 0, depth, score_level(chain_scores_[node.depth]), 1);
        }
        look_up(node, depth);
        if (has_matrix_) recycle(node, depth);
        merge(index, depth);
        slot_.nodes[size_t(index)].end = int32_t(slot_.proposals.size());
    }

    void look_up(const Node& node, int32_t depth) {
        int32_t rank = 0;
        for (int32_t one = 0; one < num_texts_; ++one) {
            const Text& text = texts_[one];
            if (one > 0 && texts_[one - 1].drafter != text.drafter) rank = 0;
            const uint32_t bit = 2u << one;
            const Continuation& next = text.continuation;
            if (!(node.agreeing & bit) || (!next.is_loop && node.depth >= next.num_tokens)) continue;
            const int32_t token = next.tokens[node.depth % next.num_tokens];
            if (join(token, text.drafter, bit)) continue;
            propose(text.drafter, token, rank++, depth, match_level(next.match_length), bit);
        }
    }

    void recycle(const Node& node, int32_t depth) {
        Children children;
        scorer_.children_of(node.token, depth, 0.0, children);
        int32_t order[kWidth];
        for (int32_t place = 0; place < kWidth; ++place) order[place] = place;
        std::stable_sort(order, order + kWidth,
                         [&](int32_t one, int32_t other) { return children.scores[one] > children.scores[other]; });
        for (int32_t rank = 0; rank < kWidth; ++rank) {
            const double score = children.scores[order[rank]];
            if (!(score > kEmpty)) break;
            propose(kRecycling, children.tokens[order[rank]], rank, depth, score_level(std::exp(score)), 0);
        }
    }

    // Whether this drafter has proposed the token behind this node before; then another text of its agrees.
    bool join(int32_t token, int32_t drafter, uint32_t bit) {
        for (size_t at = first_here_; at < slot_.proposals.size(); ++at) {
            const Proposal& earlier = slot_.proposals[at];
            if (earlier.token != token || earlier.drafter != drafter) continue;
            meeting_of(token).agreeing |= bit;
            return true;
        }
        return false;
    }

    void propose(int32_t drafter, int32_t token, int32_t rank, int32_t depth, int32_t level, uint32_t bit) {
        const double survival = note(drafter, token, rank, place_of(depth), level);
        Meeting& meeting = meeting_of(token);
        meeting.agreeing |= bit;
        meeting.sources |= 1 << std::min(drafter, int32_t(kLookup));
        meeting.survival = std::max(meeting.survival, survival);
    }

    // Remember a candidate and its cell; its survival.
    double note(int32_t drafter, int32_t token, int32_t rank, int32_t place, int32_t level) {
        const int32_t row = std::min(rank, kNumRanks - 1) * kNumPlaces + place;
        const int32_t cell = row * int32_t(cells_[drafter].num_levels) + level;
        const double survival = cells_[drafter].survivals[cell];
        slot_.proposals.push_back({token, drafter, cell, survival});
        return survival;
    }

    Meeting& meeting_of(int32_t token) {
        for (int32_t one = 0; one < num_meetings_; ++one) {
            if (meetings_[one].token == token) return meetings_[one];
        }
        return meetings_[num_meetings_++] = {token, 0, 0, 0.0};
    }

    // At most one of several siblings is accepted: what they claim together is cut down to 1.
    void merge(int32_t parent, int32_t depth) {
        double claimed = 0.0;
        for (int32_t one = 0; one < num_meetings_; ++one) claimed += meetings_[one].survival;
        const double scale = claimed > 1.0 ? 1.0 / claimed : 1.0;
        std::stable_sort(meetings_, meetings_ + num_meetings_,
                         [](const Meeting& one, const Meeting& other) { return one.survival > other.survival; });
        const Node above = slot_.nodes[size_t(parent)];
        for (int32_t rank = 0; rank < num_meetings_; ++rank) {
            const Meeting& meeting = meetings_[rank];
            note(kMerged, meeting.token, rank, meeting.sources, score_level(meeting.survival * scale));
            double& own = slot_.proposals.back().survival;
            own = slot_.predictability.corrected(own);
            const double survival = above.survival * own;
            heap_.push_back({{meeting.token, parent, depth, meeting.agreeing & above.agreeing, survival, 0, 0},
                             int32_t(slot_.proposals.size())});
            std::push_heap(heap_.begin(), heap_.end());
        }
    }

    struct Text {
        Continuation continuation;
        int32_t drafter;
    };

    const int32_t* const limits_;
    Slot& slot_;
    const Cells* const cells_;
    const Continuation chain_;
    const double* const chain_scores_;
    const double min_survival_;
    const bool has_matrix_;
    const Matrix matrix_;
    Scorer scorer_;
    Continuation found_[kMaxContinuations];
    Text texts_[2 * kMaxContinuations];
    int32_t num_texts_ = 0;
    Meeting meetings_[kMaxCandidates];
    int32_t num_meetings_ = 0;
    size_t first_here_ = 0;  // where what is proposed behind the node in hand begins

    static thread_local std::vector<Candidate> heap_;
};

thread_local std::vector<Candidate> Growth::heap_;

// --------------------------------------------------------------------------------------------------------- budget

struct Place {
    double survival;
    int32_t request, node;
};

// The nodes of all requests by falling survival, parents first; `budget.py` shows that the best set is a prefix.
std::vector<Place> by_survival(const Plan& plan, const Merger& merger) {
    std::vector<Place> places;
    for (int32_t request = 0; request < plan.num_requests; ++request) {
        const std::vector<Node>& nodes = merger.slots[size_t(plan.slots[request])].nodes;
        for (int32_t node = 1; node < int32_t(nodes.size()); ++node) {
            places.push_back({nodes[size_t(node)].survival, request, node});
        }
    }
    std::stable_sort(places.begin(), places.end(),
                     [](const Place& one, const Place& other) { return one.survival > other.survival; });
    return places;
}

// How many of the places are worth verifying together; writes how many tokens the step should give with them.
size_t best_number(const Plan& plan, const std::vector<Place>& places) {
    const size_t most = std::min(places.size(), size_t(plan.max_step_nodes));
    double tokens = plan.num_choosing, best_tokens = tokens;
    double best_worth = tokens - plan.token_rate * plan.step_s[0];
    size_t best = 0;
    for (size_t number = 1; number <= most; ++number) {
        tokens += places[number - 1].survival;
        const double worth = tokens - plan.token_rate * plan.step_s[number];
        if (worth > best_worth) {
            best = number;
            best_worth = worth;
            best_tokens = tokens;
        }
    }
    plan.figures[0] = best_tokens;
    return best;
}

void write_trees(const Plan& plan, const Merger& merger, const std::vector<Place>& places, size_t number) {
    static thread_local std::vector<std::vector<int32_t>> numbers;  // of the chosen nodes, per request; -1: left out
    numbers.resize(std::max(numbers.size(), size_t(plan.num_requests)));
    for (int32_t request = 0; request < plan.num_requests; ++request) {
        numbers[size_t(request)].assign(merger.slots[size_t(plan.slots[request])].nodes.size(), -1);
    }
    for (size_t one = 0; one < number; ++one) numbers[size_t(places[one].request)][size_t(places[one].node)] = 0;
    int32_t end = 0;
    for (int32_t request = 0; request < plan.num_requests; ++request) {
        const std::vector<Node>& nodes = merger.slots[size_t(plan.slots[request])].nodes;
        std::vector<int32_t>& places_of = numbers[size_t(request)];
        const int32_t first = end;
        for (size_t node = 1; node < nodes.size(); ++node) {
            if (places_of[node] < 0) continue;
            places_of[node] = end - first;
            plan.tokens[end] = nodes[node].token;
            plan.parents[end++] = nodes[node].parent > 0 ? places_of[size_t(nodes[node].parent)] : kRoot;
        }
        plan.ends[request] = end;
    }
}

// ------------------------------------------------------------------------------------------------------- learning

void count_trial(const Cells& cells, const Proposal& proposal, bool is_accepted) {
    cells.tried[proposal.cell] += 1.0;
    cells.accepted[proposal.cell] += is_accepted;
    const int32_t bin = std::min(int32_t(proposal.survival * kNumBins), kNumBins - 1);
    cells.curve[bin] += 1.0;
    cells.curve[kNumBins + bin] += proposal.survival;
    cells.curve[2 * kNumBins + bin] += is_accepted;
}

// Judge what was proposed along the path that the tokens took; returns how many trials there were.
int64_t judge(const Plan& plan, Slot& slot, const int32_t* tokens, int32_t number) {
    const Cells* const cells = plan.cells + (slot.is_sampled ? kNumDrafters : 0);
    int64_t num_trials = 0;
    int32_t node = 0;
    for (int32_t at = 0; at < number && node >= 0 && !slot.nodes.empty(); ++at) {
        const Node& here = slot.nodes[size_t(node)];
        double expected = 0.0;
        bool has_come = false;
        for (int32_t one = here.first; one < here.end; ++one) {
            const Proposal& proposal = slot.proposals[size_t(one)];
            const bool is_accepted = proposal.token == tokens[at];
            if (proposal.drafter == kMerged) {
                expected += cells[kMerged].survivals[proposal.cell];
                has_come |= is_accepted;
            }
            count_trial(cells[proposal.drafter], proposal, is_accepted);
        }
        if (here.end > here.first) slot.predictability.note(expected, has_come);
        num_trials += here.end - here.first;
        const int32_t parent = node;
        node = -1;
        for (int32_t child = parent + 1; child < int32_t(slot.nodes.size()) && node < 0; ++child) {
            const Node& one = slot.nodes[size_t(child)];
            if (one.parent == parent && one.token == tokens[at]) node = child;
        }
    }
    slot.forget_tree();
    return num_trials;
}

}  // namespace
}  // namespace SLIPSTREAM_ISA

extern "C" {

auto SLIPSTREAM_EXPORT(merger_new)(int32_t num_slots, int64_t pool_tokens) -> void* {
    return new SLIPSTREAM_ISA::Merger(num_slots, pool_tokens);
}

void SLIPSTREAM_EXPORT(merger_free)(void* merger) { delete static_cast<SLIPSTREAM_ISA::Merger*>(merger); }

// Judge every request's last tree by what is new of its text, take that in, grow its next tree, choose among all nodes
// and write the trees one behind the other. Returns -1, or the first request whose root or matrix is none.
int32_t SLIPSTREAM_EXPORT(merger_grow)(void* handle, const void* plan_address) {
    using namespace SLIPSTREAM_ISA;
    Merger& merger = *static_cast<Merger*>(handle);
    const Plan& plan = *static_cast<const Plan*>(plan_address);
    for (int32_t request = 0; request < plan.num_requests; ++request) {
        const int32_t* const limits = plan.limits + 4 * int64_t(request);
        if (limits[0] >= plan.num_matrices || limits[1] < 0 || limits[1] >= plan.vocab_size) return request;
    }
    int64_t num_trials = 0;
    for (int32_t request = 0; request < plan.num_requests; ++request) {
        const int32_t first = request > 0 ? plan.new_ends[request - 1] : 0;
        const int32_t* const tokens = plan.new_tokens + first;
        Slot& slot = merger.slots[size_t(plan.slots[request])];
        num_trials += judge(plan, slot, tokens, plan.new_ends[request] - first);
        slot.text.extend(tokens, plan.new_ends[request] - first);
        Growth(plan, request, merger).run();
    }
    plan.figures[1] = double(num_trials);
    const std::vector<Place> places = by_survival(plan, merger);
    write_trees(plan, merger, places, best_number(plan, places));
    return -1;
}

// The request in a slot has ended with these tokens: judge its last tree. Returns how many candidates were.
int64_t SLIPSTREAM_EXPORT(merger_end)(void* handle, const void* plan_address, int32_t slot, const int32_t* tokens,
                                      int32_t number) {
    using namespace SLIPSTREAM_ISA;
    return judge(*static_cast<const Plan*>(plan_address), static_cast<Merger*>(handle)->slots[size_t(slot)], tokens,
                 number);
}

// The request in a slot has left.
void SLIPSTREAM_EXPORT(merger_release)(void* handle, int32_t slot) {
    using namespace SLIPSTREAM_ISA;
    Slot& left = static_cast<Merger*>(handle)->slots[size_t(slot)];
    left.text.clear();
    left.forget_tree();
    left.predictability = {};
}

// Keep an output in the pool, for the requests of its scope.
void SLIPSTREAM_EXPORT(merger_keep)(void* handle, uint64_t scope, const int32_t* tokens, int32_t number) {
    static_cast<SLIPSTREAM_ISA::Merger*>(handle)->pool.add(scope, tokens, number);
}

}  // extern "C"
