// One tree a request from the candidates of all drafters, and the budget of a step; merging.py says what they mean.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "export.h"
#include "lookup.h"
#include "merged_survival.h"
#include "recycling.h"
#include "sampling.h"
#include "survival.h"

namespace SLIPSTREAM_ISA {
namespace {

// `merging.DRAFTERS`, in order. Look-ups in the request's text and in past outputs are one source.
enum Drafter : int32_t { kChain, kRecycling, kLookup, kPool, kNumDrafters };

int32_t source_of(int32_t drafter) { return std::min(drafter, int32_t(kLookup)); }

// What the candidates of one drafter are worth at one kind of temperature: `merging._Cells`, field by field.
struct Cells {
    const double* survivals;   // [ranks, depths, levels]: estimates
    double *tried, *accepted;  // the same shape: counts since the estimates were made
    double* curve;             // [3, kNumBins]: trials, the sum of their predictions, accepted
    int64_t num_levels;
};

constexpr int32_t kNumRanks = 8;
constexpr int32_t kMaxContinuations = 4;  // of a look-up

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

// A token that some drafters propose behind one node: which texts go on with it, and how often it comes.
struct Meeting {
    int32_t token;
    uint32_t agreeing;
    Said said;
    double share;
};

// The part [first, end) of a list.
struct Range {
    int32_t first, end;
};

// A node of a request's tree, or its root. `survival` is that of the whole path; bit i of `agreeing` says that text i
// (the chain, then continuations) reads as the path does; what was proposed behind the node are these parts of the
// request's proposals and meetings, none if nothing was looked for.
struct Node {
    int32_t token, parent, depth;
    uint32_t agreeing;
    double survival;
    Range proposals, meetings;
};

struct Candidate {
    Node node;
    int32_t order;

    bool operator<(const Candidate& other) const {
        return node.survival < other.node.survival || (node.survival == other.node.survival && order > other.order);
    }
};

// What is kept of the request in a slot: its text, and the tree that its next tokens will judge.
struct Slot {
    SuffixAutomaton text;
    std::vector<Node> nodes;
    std::vector<Proposal> proposals;
    std::vector<Meeting> meetings;
    bool is_sampled = false;

    void forget_tree() {
        nodes.clear();
        proposals.clear();
        meetings.clear();
    }
};

// A request that wants a tree: `merging._REQUEST`, field by field.
struct Request {
    SampleRow draw;
    uint64_t scope;
    int32_t slot, matrix, root, max_nodes, max_depth;  // matrix -1: none
    int32_t new_end, stop_end;  // in the step's ids: what its text went on with, then what ends its output

    bool is_sampled() const { return draw.temperature != 0.0; }
};
static_assert(sizeof(Request) == 88, "merging._REQUEST has another size");

// What stays between calls: `merging._Plan`, field by field.
struct Plan {
    int32_t vocab_size;
    int32_t drafters;  // bit d: whether drafter d takes part, where that is not seen from what it is given
    const Rule* rule;
    const Cells* cells;            // [2, kNumDrafters]: at temperature 0, above it
    const MergedSurvival* merged;  // [2]
    int32_t *tokens, *parents, *ends;
    double* figures;  // out: expected tokens, candidates judged
};

// Ids and log-probabilities of one of the step's matrices: `merging._MATRIX`.
struct MatrixAddresses {
    const void* ids;
    const uint16_t* logprobs;
};

// What a call is about: `merging._STEP`, field by field.
struct Step {
    const double* step_s;
    const int32_t* ids;
    const int32_t *chain_tokens, *chain_lengths;  // [B, chain_width, kNumChoices], [B]; none if nothing was drafted
    const double* chain_scores;
    double token_rate, min_survival;
    int32_t num_requests, num_choosing, num_matrices, id_bytes, chain_width, max_step_nodes;
};
static_assert(sizeof(Step) == 80, "merging._STEP has another size");

// A step with its requests and matrices.
struct Call {
    const Step& step;
    const Request* requests;
    const MatrixAddresses* matrices;

    // Where the ids of a request begin: behind those of the one before it.
    const int32_t* new_ids(int32_t index) const {
        return step.ids + (index > 0 ? requests[index - 1].stop_end : 0);
    }
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
    Growth(const Plan& plan, const Call& call, int32_t index, Merger& merger)
        : request_(call.requests[index]),
          slot_(merger.slots[size_t(request_.slot)]),
          stops_(call.step.ids + request_.new_end),
          stops_end_(call.step.ids + request_.stop_end),
          cells_(plan.cells + (request_.is_sampled() ? kNumDrafters : 0)),
          merged_(plan.merged[request_.is_sampled()]),
          min_survival_(call.step.min_survival),
          matrix_(matrix_of(plan, call, request_)),
          scorer_(matrix_, request_.draw, *plan.rule) {
        const Step& step = call.step;
        if (step.chain_lengths != nullptr) {
            const int64_t first = int64_t(index) * step.chain_width * kNumChoices;
            chain_tokens_ = step.chain_tokens + first;
            chain_scores_ = step.chain_scores + first;
            chain_length_ = step.chain_lengths[index];
        }
        slot_.forget_tree();
        slot_.is_sampled = request_.is_sampled();
        const SuffixAutomaton& text = slot_.text;
        if (plan.drafters >> kLookup & 1) add_texts(kLookup, text.continuations(kMaxContinuations, 1, found_));
        if (plan.drafters >> kPool & 1) {
            add_texts(kPool, merger.pool.look_up(request_.scope, text.tokens(), text.num_tokens(), request_.max_depth,
                                                 kMaxContinuations, found_));
        }
    }

    void run() {
        heap_.clear();
        slot_.nodes.push_back({request_.root, -1, 0, ~0u, 1.0, {0, 0}, {0, 0}});
        for (int32_t node = 0;; node = int32_t(slot_.nodes.size()) - 1) {
            if (slot_.nodes[size_t(node)].depth < request_.max_depth) expand(node);
            if (heap_.empty() || node == request_.max_nodes) return;
            std::pop_heap(heap_.begin(), heap_.end());
            const Node next = heap_.back().node;
            heap_.pop_back();
            if (next.survival < min_survival_) return;
            slot_.nodes.push_back(next);
        }
    }

   private:
    static Matrix matrix_of(const Plan& plan, const Call& call, const Request& request) {
        if (request.matrix < 0) return {nullptr, nullptr, call.step.id_bytes, plan.vocab_size};
        const MatrixAddresses& found = call.matrices[request.matrix];
        return {found.ids, found.logprobs, call.step.id_bytes, plan.vocab_size};
    }

    void add_texts(Drafter drafter, int32_t number) {
        for (int32_t one = 0; one < number; ++one) texts_[num_texts_++] = {found_[one], drafter};
    }

    void expand(int32_t index) {
        const Node node = slot_.nodes[size_t(index)];
        const int32_t depth = node.depth + 1;
        first_proposal_ = slot_.proposals.size();
        first_meeting_ = slot_.meetings.size();
        if ((node.agreeing & 1) && node.depth < chain_length_) follow_chain(node.depth, depth);
        look_up(node, depth);
        if (matrix_.ids != nullptr) recycle(node, depth);
        merge(index, depth);
        slot_.nodes[size_t(index)].proposals = {int32_t(first_proposal_), int32_t(slot_.proposals.size())};
        slot_.nodes[size_t(index)].meetings = {int32_t(first_meeting_), int32_t(slot_.meetings.size())};
    }

    // The chain's own token and what might stand in its place, behind which the chain does not go on.
    void follow_chain(int32_t place, int32_t depth) {
        for (int32_t rank = 0; rank < kNumChoices; ++rank) {
            const int32_t at = place * kNumChoices + rank, token = chain_tokens_[at];
            if (token >= 0) propose(kChain, token, rank, depth, score_level(chain_scores_[at]), rank == 0);
        }
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
        for (size_t at = first_proposal_; at < slot_.proposals.size(); ++at) {
            const Proposal& earlier = slot_.proposals[at];
            if (earlier.token != token || earlier.drafter != drafter) continue;
            meeting_of(token).agreeing |= bit;
            return true;
        }
        return false;
    }

    void propose(int32_t drafter, int32_t token, int32_t rank, int32_t depth, int32_t level, uint32_t bit) {
        const int32_t row = std::min(rank, kNumRanks - 1) * kNumDepths + depth_cell(depth);
        const int32_t cell = row * int32_t(cells_[drafter].num_levels) + level;
        const double survival = cells_[drafter].survivals[cell];
        slot_.proposals.push_back({token, drafter, cell, survival});
        Meeting& meeting = meeting_of(token);
        meeting.agreeing |= bit;
        meeting.said.add(source_of(drafter), survival);
    }

    Meeting& meeting_of(int32_t token) {
        for (size_t one = first_meeting_; one < slot_.meetings.size(); ++one) {
            if (slot_.meetings[one].token == token) return slot_.meetings[one];
        }
        slot_.meetings.push_back({token, 0, {}, 0.0});
        return slot_.meetings.back();
    }

    // At most one of several siblings comes: they compete with each other, and with none of them. A token that ends the
    // output counts like any other, but is no node: verifying it saves nothing, as nothing comes behind it.
    void merge(int32_t parent, int32_t depth) {
        double most = 0.0;
        for (size_t one = first_meeting_; one < slot_.meetings.size(); ++one) {
            Meeting& meeting = slot_.meetings[one];
            meeting.share = merged_.utility(meeting.said);
            most = std::max(most, meeting.share);
        }
        double total = std::exp(-most);
        for (size_t one = first_meeting_; one < slot_.meetings.size(); ++one) {
            double& share = slot_.meetings[one].share;
            share = std::exp(share - most);
            total += share;
        }
        const Node above = slot_.nodes[size_t(parent)];
        for (size_t one = first_meeting_; one < slot_.meetings.size(); ++one) {
            Meeting& meeting = slot_.meetings[one];
            meeting.share /= total;
            if (std::find(stops_, stops_end_, meeting.token) != stops_end_) continue;
            const uint32_t agreeing = meeting.agreeing & above.agreeing;
            heap_.push_back({{meeting.token, parent, depth, agreeing, above.survival * meeting.share, {0, 0}, {0, 0}},
                             int32_t(one)});
            std::push_heap(heap_.begin(), heap_.end());
        }
    }

    struct Text {
        Continuation continuation;
        int32_t drafter;
    };

    const Request& request_;
    Slot& slot_;
    const int32_t *const stops_, *const stops_end_;
    const Cells* const cells_;
    const MergedSurvival& merged_;
    const int32_t* chain_tokens_ = nullptr;
    const double* chain_scores_ = nullptr;
    int32_t chain_length_ = 0;
    const double min_survival_;
    const Matrix matrix_;
    Scorer scorer_;
    Continuation found_[kMaxContinuations];
    Text texts_[2 * kMaxContinuations];
    int32_t num_texts_ = 0;
    size_t first_proposal_ = 0, first_meeting_ = 0;  // where what is proposed behind the node in hand begins

    static thread_local std::vector<Candidate> heap_;
};

thread_local std::vector<Candidate> Growth::heap_;

// --------------------------------------------------------------------------------------------------------- budget

struct Place {
    double survival;
    int32_t request, node;
};

// The nodes of all requests by falling survival, parents first; `budget.py` shows that the best set is a prefix.
std::vector<Place> by_survival(const Call& call, const Merger& merger) {
    std::vector<Place> places;
    for (int32_t index = 0; index < call.step.num_requests; ++index) {
        const std::vector<Node>& nodes = merger.slots[size_t(call.requests[index].slot)].nodes;
        for (int32_t node = 1; node < int32_t(nodes.size()); ++node) {
            places.push_back({nodes[size_t(node)].survival, index, node});
        }
    }
    std::stable_sort(places.begin(), places.end(),
                     [](const Place& one, const Place& other) { return one.survival > other.survival; });
    return places;
}

// How many of the places are worth verifying together; writes how many tokens the step should give with them.
size_t best_number(const Step& step, const std::vector<Place>& places, double& best_tokens) {
    const size_t most = std::min(places.size(), size_t(step.max_step_nodes));
    double tokens = step.num_choosing;
    double best_worth = tokens - step.token_rate * step.step_s[0];
    best_tokens = tokens;
    size_t best = 0;
    for (size_t number = 1; number <= most; ++number) {
        tokens += places[number - 1].survival;
        const double worth = tokens - step.token_rate * step.step_s[number];
        if (worth > best_worth) {
            best = number;
            best_worth = worth;
            best_tokens = tokens;
        }
    }
    return best;
}

void write_trees(const Plan& plan, const Call& call, const Merger& merger, const std::vector<Place>& places,
                 size_t number) {
    static thread_local std::vector<std::vector<int32_t>> numbers;  // of the chosen nodes, per request; -1: left out
    numbers.resize(std::max(numbers.size(), size_t(call.step.num_requests)));
    for (int32_t index = 0; index < call.step.num_requests; ++index) {
        numbers[size_t(index)].assign(merger.slots[size_t(call.requests[index].slot)].nodes.size(), -1);
    }
    for (size_t one = 0; one < number; ++one) numbers[size_t(places[one].request)][size_t(places[one].node)] = 0;
    int32_t end = 0;
    for (int32_t index = 0; index < call.step.num_requests; ++index) {
        const std::vector<Node>& nodes = merger.slots[size_t(call.requests[index].slot)].nodes;
        std::vector<int32_t>& places_of = numbers[size_t(index)];
        const int32_t first = end;
        for (size_t node = 1; node < nodes.size(); ++node) {
            if (places_of[node] < 0) continue;
            places_of[node] = end - first;
            plan.tokens[end] = nodes[node].token;
            plan.parents[end++] = nodes[node].parent > 0 ? places_of[size_t(nodes[node].parent)] : kRoot;
        }
        plan.ends[index] = end;
    }
}

// ------------------------------------------------------------------------------------------------------- learning

// Everything that was proposed behind a node, whose next token has come. Returns how many trials that were.
int64_t judge_behind(const Node& node, const Slot& slot, const Cells* cells, const MergedSurvival& merged,
                     int32_t token) {
    for (int32_t one = node.proposals.first; one < node.proposals.end; ++one) {
        const Proposal& proposal = slot.proposals[size_t(one)];
        const Cells& own = cells[proposal.drafter];
        const bool has_come = proposal.token == token;
        own.tried[proposal.cell] += 1.0;
        own.accepted[proposal.cell] += has_come;
        count_on(own.curve, proposal.survival, has_come);
    }
    MergedSurvival::Gradient gradient;
    for (int32_t one = node.meetings.first; one < node.meetings.end; ++one) {
        const Meeting& meeting = slot.meetings[size_t(one)];
        const bool has_come = meeting.token == token;
        gradient.add(meeting.said, has_come - meeting.share);
        count_on(merged.curve, meeting.share, has_come);
    }
    merged.learn(gradient);
    return node.proposals.end - node.proposals.first;
}

// Judge what was proposed along the path that the tokens took; returns how many trials there were.
int64_t judge(const Plan& plan, Slot& slot, const int32_t* tokens, int32_t number) {
    const Cells* const cells = plan.cells + (slot.is_sampled ? kNumDrafters : 0);
    int64_t num_trials = 0;
    int32_t node = 0;
    for (int32_t at = 0; at < number && node >= 0 && !slot.nodes.empty(); ++at) {
        num_trials += judge_behind(slot.nodes[size_t(node)], slot, cells, plan.merged[slot.is_sampled], tokens[at]);
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
// and write the trees one behind the other. Returns -1, or the first request whose slot, root or matrix is none.
int32_t SLIPSTREAM_EXPORT(merger_grow)(void* handle, const void* plan_address, const void* step_address,
                                       const void* requests, const void* matrices) {
    using namespace SLIPSTREAM_ISA;
    Merger& merger = *static_cast<Merger*>(handle);
    const Plan& plan = *static_cast<const Plan*>(plan_address);
    const Step& step = *static_cast<const Step*>(step_address);
    const Call call{step, static_cast<const Request*>(requests), static_cast<const MatrixAddresses*>(matrices)};
    for (int32_t index = 0; index < step.num_requests; ++index) {
        const Request& request = call.requests[index];
        const bool has_slot = request.slot >= 0 && size_t(request.slot) < merger.slots.size();
        const bool has_root = request.root >= 0 && request.root < plan.vocab_size;
        if (!has_slot || !has_root || request.matrix >= step.num_matrices) return index;
    }
    int64_t num_trials = 0;
    for (int32_t index = 0; index < step.num_requests; ++index) {
        const Request& request = call.requests[index];
        const int32_t* const new_ids = call.new_ids(index);
        const auto num_new = int32_t(step.ids + request.new_end - new_ids);
        Slot& slot = merger.slots[size_t(request.slot)];
        num_trials += judge(plan, slot, new_ids, num_new);
        slot.text.extend(new_ids, num_new);
    }
    for (int32_t index = 0; index < step.num_requests; ++index) Growth(plan, call, index, merger).run();
    const std::vector<Place> places = by_survival(call, merger);
    write_trees(plan, call, merger, places, best_number(step, places, plan.figures[0]));
    plan.figures[1] = double(num_trials);
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
}

// Keep an output in the pool, for the requests of its scope.
void SLIPSTREAM_EXPORT(merger_keep)(void* handle, uint64_t scope, const int32_t* tokens, int32_t number) {
    static_cast<SLIPSTREAM_ISA::Merger*>(handle)->pool.add(scope, tokens, number);
}

}  // extern "C"
