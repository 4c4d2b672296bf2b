// Token Recycling: trees grown from an adjacency matrix; recycling.py is the definition, bit for bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "export.h"
#include "logits.h"
#include "recycling.h"

namespace SLIPSTREAM_ISA {
namespace {

constexpr uint16_t kEmptyBits = 0xFC00;  // -inf in fp16

// A line of `recycling.grow`'s limits.
struct Limits {
    int32_t matrix, root, max_nodes, max_depth;
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
struct GrowthScratch {
    std::vector<Candidate> heap;
    std::vector<int32_t> places;
};
thread_local GrowthScratch growth_scratch;

void grow_best_first(Scorer& scorer, const Limits& limits, Tree& tree) {
    std::vector<Candidate>& heap = growth_scratch.heap;
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
    std::vector<int32_t>& places = growth_scratch.places;  // where each node of the template went
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

// To the nearest number of fp16, ties to even.
uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    if (magnitude >= 0x47800000) return sign | kExponentBits;
    if (magnitude < 0x38800000) return sign | uint16_t(std::nearbyint(std::fabs(value) * 0x1p24f));
    const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    return sign | uint16_t((rounded - 0x38000000) >> 13);
}

// Rows of a matrix that are written.
struct Writer {
    void* ids;
    uint16_t* logprobs;
    int32_t id_bytes;

    void write(int64_t to, const int32_t* row_ids, const uint16_t* row_logprobs, int32_t num_top) const {
        for (int32_t rank = 0; rank < kWidth; ++rank) {
            const int64_t at = to * kWidth + rank;
            const bool is_kept = rank < num_top && is_candidate(row_ids, row_logprobs, rank);
            const int32_t id = is_kept ? row_ids[rank] : 0;
            if (id_bytes == 2) {
                static_cast<uint16_t*>(ids)[at] = uint16_t(id);
            } else {
                static_cast<int32_t*>(ids)[at] = id;
            }
            logprobs[at] = is_kept ? row_logprobs[rank] : kEmptyBits;
        }
    }
};

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
    const auto* const draw = static_cast<const SampleRow*>(draws);
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
    const Writer writer{ids, logprobs, id_bytes};
    const auto write = [=](int32_t to, int32_t row) {
        writer.write(to, top_ids + int64_t(row) * num_top, top_logprobs + int64_t(row) * num_top, num_top);
    };
    for (int32_t row = 0; row < num_rows; ++row) write(tokens[row], row);
    if (num_rows > 0) write(vocab_size, num_rows - 1);
    return -1;
}

// The same from rows of logits, `row_stride` floats apart, whose sums are taken in single precision.
int32_t SLIPSTREAM_EXPORT(recycling_remember_logits)(void* ids, uint16_t* logprobs, int32_t id_bytes,
                                                     int32_t vocab_size, const int32_t* tokens, const float* logits,
                                                     int64_t row_stride, int32_t num_rows) {
    using namespace SLIPSTREAM_ISA;
    for (int32_t row = 0; row < num_rows; ++row) {
        if (tokens[row] < 0 || tokens[row] >= vocab_size) return row;
    }
    const Writer writer{ids, logprobs, id_bytes};
    const int32_t num_top = std::min(kWidth, vocab_size);
    int32_t top_ids[kWidth];
    uint16_t top_logprobs[kWidth];
    for (int32_t row = 0; row < num_rows; ++row) {
        const Row own = finite_row(logits + row * row_stride, vocab_size);
        best_ids(own, num_top, top_ids);
        const float log_sum = std::log(sum_of_exponentials(own));
        for (int32_t rank = 0; rank < num_top; ++rank) {
            const float relative = own.logits[top_ids[rank]] - own.largest;
            top_logprobs[rank] = to_half(relative == relative ? std::min(relative - log_sum, 0.0f) : -kInfinity);
        }
        writer.write(tokens[row], top_ids, top_logprobs, num_top);
        if (row + 1 == num_rows) writer.write(vocab_size, top_ids, top_logprobs, num_top);
    }
    return -1;
}

}  // extern "C"
