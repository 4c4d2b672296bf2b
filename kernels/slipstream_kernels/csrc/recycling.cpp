// Token Recycling: trees grown from an adjacency matrix; recycling.py is the definition, bit for bit.
#include <algorithm>
#include <vector>

#include "export.h"
#include "noise.h"

namespace SLIPSTREAM_ISA {
namespace {

constexpr int kWidth = 8;  // entries of a row: `recycling.WIDTH`
constexpr int kNumParts = kWidth / kWide;
constexpr int32_t kRoot = -1;
constexpr double kEmpty = -__builtin_inf();
constexpr uint16_t kEmptyBits = 0xFC00;     // -inf in fp16
constexpr uint16_t kExponentBits = 0x7C00;  // all set: an infinity or NaN

// `sampling.ROW`, field by field.
struct DrawRow {
    int64_t seed;
    double temperature, top_p, min_p;
    int32_t top_k, sample_index, redraw, position;
};

// A line of `recycling.grow`'s limits.
struct Limits {
    int32_t matrix, root, max_nodes, max_depth;
};

// `recycling.GrowthRule`, field by field.
struct Rule {
    double error_scale, depth_penalty, rank_share, unknown_penalty, rank_probs[kWidth];
};

struct Matrix {
    const void* ids;
    const uint16_t* logprobs;
    int32_t id_bytes, vocab_size;

    int32_t id(int64_t at) const {
        return id_bytes == 2 ? static_cast<const uint16_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
    }
};

// Exact; what is no number is an empty entry.
double from_half(uint16_t bits) {
    const uint16_t exponent = (bits & kExponentBits) >> 10, fraction = bits & 0x3FF;
    if (exponent == 31) return kEmpty;
    double magnitude = fraction * 0x1p-24;
    if (exponent != 0) {
        const uint64_t wide = uint64_t(exponent + 1008) << 52 | uint64_t(fraction) << 42;
        std::memcpy(&magnitude, &wide, sizeof magnitude);
    }
    return bits & 0x8000 ? -magnitude : magnitude;
}

// ------------------------------------------------------------------------------------- noise of a row's eight tokens

// `fixed_log` on every lane.
inline Doubles fixed_logs(Doubles values) {
    const Weights exponents = ((Weights)values - 0x3FE6A09E667F3BCD) >> 52;
    const Doubles mantissas = (Doubles)((Weights)values - (exponents << 52));
    const Doubles ratios = (mantissas - 1.0) / (mantissas + 1.0);
    const Doubles squares = ratios * ratios;
    Doubles series = Doubles{} + 1.0 / 19;
    for (int odd = 17; odd >= 3; odd -= 2) series = series * squares + 1.0 / odd;
    const Doubles doubled = ratios + ratios;
    return __builtin_convertvector(exponents, Doubles) * 0.693147180559945309417 +
           (doubled + doubled * (squares * series));
}

// `gumbel(random_bits(key, token))` of every lane's token: each lane runs the counter of its own token.
inline Doubles noise_of(const NoiseKey& key, Wide tokens) {
    Wide c0 = tokens / kTokensPerCounter, c1 = Wide{} + key.position;
    Wide c2 = Wide{} + key.sample_index, c3 = Wide{} + key.redraw;
    const Wide multiplier0 = Wide{} + kMultiplier0, multiplier1 = Wide{} + kMultiplier1;
    for (int round = 0; round < kNumRounds; ++round) {
        const Wide product0 = multiply_low(c0, multiplier0), product1 = multiply_low(c2, multiplier1);
        c0 = (product1 >> 32) ^ c1 ^ key.keys0[round];
        c1 = product1;
        c2 = (product0 >> 32) ^ c3 ^ key.keys1[round];
        c3 = product0;
    }
    const Wide which = tokens % kTokensPerCounter;
    const Wide bits = (which < 2 ? (which == 0 ? c0 : c1) : (which == 2 ? c2 : c3)) & 0xFFFFFFFF;
    const Doubles uniform = (__builtin_convertvector((Weights)bits, Doubles) + 0.5) * 0x1p-32;
    return -fixed_logs(-fixed_logs(uniform));
}

// --------------------------------------------------------------------------------------------------- one row's scores

// The candidates behind one node; an entry without a score above -inf is none.
struct Children {
    int32_t tokens[kWidth];
    double scores[kWidth];
};

inline Doubles load_doubles(const double* from) {
    Doubles value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store_doubles(double* to, Doubles value) { std::memcpy(to, &value, sizeof value); }

// Scores of the tokens that may follow, for one request.
class Scorer {
   public:
    Scorer(const Matrix& matrix, const DrawRow& draw, const Rule& rule)
        : matrix_(matrix),
          rule_(rule),
          temperature_(draw.temperature),
          first_position_(uint32_t(draw.position)),
          key_(noise_key(uint64_t(draw.seed), uint32_t(draw.sample_index), uint32_t(draw.redraw), 0)) {}

    // The candidates behind `token`, at `depth` (1: the root's children), when their parent has `score`.
    void children_of(int32_t token, int32_t depth, double score, Children& out) {
        double values[kWidth];
        if (!read(token, out.tokens, values)) {
            if (!read(matrix_.vocab_size, out.tokens, values)) {
                std::fill_n(out.scores, kWidth, kEmpty);
                return;
            }
            score -= rule_.unknown_penalty;
        }
        key_.position = first_position_ + uint32_t(depth - 1);
        double largest = kEmpty;
        for (int part = 0; part < kNumParts; ++part) weigh(part * kWide, out.tokens, values);
        for (int rank = 0; rank < kWidth; ++rank) largest = std::max(largest, values[rank]);
        int64_t sum = 0;
        for (int part = 0; part < kNumParts; ++part) {
            const Doubles relative = load_doubles(values + part * kWide) - largest;
            store_doubles(values + part * kWide, relative);
            const Weights weights = fixed_weights(relative);
            for (int lane = 0; lane < kWide; ++lane) sum += weights[lane];
        }
        const double log_sum = fixed_log(double(sum) * 0x1p-42);
        for (int rank = 0; rank < kWidth; ++rank) {
            out.scores[rank] = score + ((values[rank] - log_sum) - rule_.depth_penalty);
        }
    }

   private:
    // The entries of a row; whether there is one that is not empty.
    bool read(int32_t row, int32_t* tokens, double* logprobs) const {
        bool is_known = false;
        for (int rank = 0; rank < kWidth; ++rank) {
            const int64_t at = int64_t(row) * kWidth + rank;
            tokens[rank] = matrix_.id(at);
            logprobs[rank] = from_half(matrix_.logprobs[at]);
            is_known |= logprobs[rank] != kEmpty;
        }
        return is_known;
    }

    // What the softmax is taken of, in place of the log-probabilities from rank `first` on.
    void weigh(int first, const int32_t* tokens, double* values) const {
        const Doubles logprobs = load_doubles(values + first);
        Doubles value = logprobs;
        if (rule_.rank_share != 0.0) {
            const Doubles stored = __builtin_convertvector(fixed_weights(logprobs), Doubles) * 0x1p-42;
            value = fixed_logs(stored * (1.0 - rule_.rank_share) +
                               load_doubles(rule_.rank_probs + first) * rule_.rank_share);
        }
        if (temperature_ != 0.0) {
            Wide ids;
            for (int lane = 0; lane < kWide; ++lane) ids[lane] = uint64_t(tokens[first + lane]);
            value = value + noise_of(key_, ids) * temperature_;
        }
        value = value / rule_.error_scale;
        store_doubles(values + first, logprobs > kEmpty ? value : Doubles{} + kEmpty);
    }

    const Matrix& matrix_;
    const Rule& rule_;
    const double temperature_;
    const uint32_t first_position_;
    NoiseKey key_;
};

// --------------------------------------------------------------------------------------------------------- one tree

struct Tree {
    int32_t* tokens;
    int32_t* parents;
    double* scores;
    int32_t num_nodes;

    void add(int32_t token, int32_t parent, double score) {
        tokens[num_nodes] = token;
        parents[num_nodes] = parent;
        scores[num_nodes++] = score;
    }
};

// A token that may become a node; `order` counts candidates as they are found.
struct Candidate {
    double score;
    int32_t order, token, parent, depth;

    bool operator<(const Candidate& other) const {
        return score < other.score || (score == other.score && order > other.order);
    }
};

// Buffers of one thread, kept between calls.
struct Scratch {
    std::vector<Candidate> heap;
    std::vector<int32_t> places;
};
thread_local Scratch scratch;

void grow_best_first(Scorer& scorer, const Limits& limits, Tree& tree) {
    std::vector<Candidate>& heap = scratch.heap;
    heap.clear();
    int32_t order = 0;
    Candidate node{0.0, 0, limits.root, kRoot, 0};
    int32_t index = kRoot;
    while (tree.num_nodes < limits.max_nodes) {
        if (node.depth < limits.max_depth) {
            Children children;
            scorer.children_of(node.token, node.depth + 1, node.score, children);
            for (int rank = 0; rank < kWidth; ++rank) {
                if (!(children.scores[rank] > kEmpty)) continue;
                heap.push_back({children.scores[rank], order++, children.tokens[rank], index, node.depth + 1});
                std::push_heap(heap.begin(), heap.end());
            }
        }
        if (heap.empty()) return;
        std::pop_heap(heap.begin(), heap.end());
        node = heap.back();
        heap.pop_back();
        index = tree.num_nodes;
        tree.add(node.token, node.parent, node.score);
    }
}

// Nodes are (parent in the template, rank below it), parents first, the children of one parent side by side.
struct Template {
    const int32_t *parents, *ranks, *depths;
    int32_t num_nodes;
};

void fill_template(Scorer& scorer, const Limits& limits, const Template& shape, Tree& tree) {
    constexpr int32_t kAbsent = -2;
    std::vector<int32_t>& places = scratch.places;  // where each node of the template went
    places.assign(size_t(shape.num_nodes), kAbsent);
    int32_t expanded = kAbsent;
    Children children;
    for (int32_t node = 0; node < shape.num_nodes && tree.num_nodes < limits.max_nodes; ++node) {
        const int32_t parent = shape.parents[node], rank = shape.ranks[node];
        const int32_t place = parent == kRoot ? kRoot : places[size_t(parent)];
        if (place == kAbsent || shape.depths[node] > limits.max_depth) continue;
        if (parent != expanded) {
            const bool is_root = place == kRoot;
            scorer.children_of(is_root ? limits.root : tree.tokens[place], shape.depths[node],
                               is_root ? 0.0 : tree.scores[place], children);
            expanded = parent;
        }
        if (!(children.scores[rank] > kEmpty)) continue;
        places[size_t(node)] = tree.num_nodes;
        tree.add(children.tokens[rank], place, children.scores[rank]);
    }
}

// Whether an entry is a candidate: a number, and the first of its token in this row.
bool is_candidate(const int32_t* ids, const uint16_t* logprobs, int32_t rank) {
    if ((logprobs[rank] & kExponentBits) == kExponentBits) return false;
    for (int32_t earlier = 0; earlier < rank; ++earlier) {
        if (ids[earlier] == ids[rank] && (logprobs[earlier] & kExponentBits) != kExponentBits) return false;
    }
    return true;
}

}  // namespace
}  // namespace SLIPSTREAM_ISA

extern "C" {

// The trees of all requests of a step, one behind the other; `ends[b]` is where that of request b ends. Without a
// template (`template_nodes` 0) they grow best first. Returns -1, or the first request whose matrix or root is none.
int32_t SLIPSTREAM_EXPORT(recycling_grow)(const void* const* ids, const uint16_t* const* logprobs,
                                          int32_t num_matrices, int32_t id_bytes, int32_t vocab_size,
                                          const void* draws, const void* limits, int32_t num_requests,
                                          const void* rule, const int32_t* shape, int32_t template_nodes,
                                          int32_t* tokens, int32_t* parents, double* scores, int32_t* ends) {
    using namespace SLIPSTREAM_ISA;
    const auto* const draw = static_cast<const DrawRow*>(draws);
    const auto* const limit = static_cast<const Limits*>(limits);
    const Template nodes{shape, shape + template_nodes, shape + 2 * int64_t(template_nodes), template_nodes};
    int32_t first = 0;
    for (int32_t request = 0; request < num_requests; ++request) {
        const Limits& bounds = limit[request];
        if (bounds.matrix < 0 || bounds.matrix >= num_matrices) return request;
        if (bounds.root < 0 || bounds.root >= vocab_size) return request;
        const Matrix matrix{ids[bounds.matrix], logprobs[bounds.matrix], id_bytes, vocab_size};
        Scorer scorer(matrix, draw[request], *static_cast<const Rule*>(rule));
        Tree tree{tokens + first, parents + first, scores + first, 0};
        if (template_nodes > 0) {
            fill_template(scorer, bounds, nodes, tree);
        } else {
            grow_best_first(scorer, bounds, tree);
        }
        ends[request] = first += tree.num_nodes;
    }
    return -1;
}

// Write `num_rows` rows of `num_top` (at most 8) entries into a matrix, in order: a later one of a token replaces an
// earlier one; the matrix's last row becomes the last of all. Returns -1, or the first row that names no token of the
// vocabulary; then nothing was written.
int32_t SLIPSTREAM_EXPORT(recycling_remember)(void* ids, uint16_t* logprobs, int32_t id_bytes, int32_t vocab_size,
                                              const int32_t* tokens, const int32_t* top_ids,
                                              const uint16_t* top_logprobs, int32_t num_rows, int32_t num_top) {
    using namespace SLIPSTREAM_ISA;
    const auto is_token = [=](int32_t id) { return id >= 0 && id < vocab_size; };
    for (int32_t row = 0; row < num_rows; ++row) {
        const int32_t* const row_ids = top_ids + int64_t(row) * num_top;
        if (!is_token(tokens[row]) || !std::all_of(row_ids, row_ids + num_top, is_token)) return row;
    }
    const auto write = [=](int32_t to, int32_t row) {
        const int32_t* const row_ids = top_ids + int64_t(row) * num_top;
        const uint16_t* const row_logprobs = top_logprobs + int64_t(row) * num_top;
        for (int32_t rank = 0; rank < kWidth; ++rank) {
            const int64_t at = int64_t(to) * kWidth + rank;
            const bool is_kept = rank < num_top && is_candidate(row_ids, row_logprobs, rank);
            const int32_t id = is_kept ? row_ids[rank] : 0;
            if (id_bytes == 2) {
                static_cast<uint16_t*>(ids)[at] = uint16_t(id);
            } else {
                static_cast<int32_t*>(ids)[at] = id;
            }
            logprobs[at] = is_kept ? row_logprobs[rank] : kEmptyBits;
        }
    };
    for (int32_t row = 0; row < num_rows; ++row) write(tokens[row], row);
    if (num_rows > 0) write(vocab_size, num_rows - 1);
    return -1;
}

}  // extern "C"
