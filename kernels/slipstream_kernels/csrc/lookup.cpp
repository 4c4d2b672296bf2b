// Suffix automaton and pool of past outputs; lookup.h says what they do.
#include "lookup.h"

#include <algorithm>
#include <random>
#include <utility>

namespace SLIPSTREAM_ISA {
namespace {

constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15;  // odd, its bits as good as random: 2^64 / golden ratio
constexpr size_t kFewestSlots = 16;

inline uint64_t mixed(uint64_t value) {
    value *= kMultiplier;
    return value ^ value >> 32;
}

// The high bits are the ones that every bit of `value` has reached.
inline uint32_t folded(uint64_t value) { return uint32_t(mixed(value) * kMultiplier >> 32); }

inline uint32_t edge_hash(int32_t state, int32_t token) { return folded(uint64_t(state) << 32 | uint32_t(token)); }

inline bool are_equal(const int32_t* one, const int32_t* other, int32_t number) {
    return std::equal(one, one + number, other);
}

template <class Item>
void empty(std::vector<Item>& items, size_t max_capacity) {
    if (items.capacity() > max_capacity) std::vector<Item>().swap(items);
    items.clear();
}

template <class Item>
int64_t bytes_of(const std::vector<Item>& items) {
    return int64_t(items.capacity() * sizeof(Item));
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- the index

void HashIndex::insert(uint32_t hash, int32_t number) {
    if (3 * (num_taken_ + 1) > 2 * slots_.size()) {
        const size_t num_slots = std::max(2 * slots_.size(), kFewestSlots);
        const std::vector<Slot> moved = std::exchange(slots_, std::vector<Slot>(num_slots, Slot{0, kFree}));
        for (const Slot& slot : moved) {
            if (slot.number != kFree) place(slot);
        }
    }
    place({hash, number});
    ++num_taken_;
}

void HashIndex::place(Slot slot) {
    size_t at = slot.hash & mask();
    while (slots_[at].number != kFree) at = (at + 1) & mask();
    slots_[at] = slot;
}

// Later slots of the run move up, so that no search stops at the gap before it has reached what it is looking for.
void HashIndex::erase(Slot* slot) {
    size_t gap = size_t(slot - slots_.data());
    for (size_t at = (gap + 1) & mask(); slots_[at].number != kFree; at = (at + 1) & mask()) {
        const size_t wanted = slots_[at].hash & mask();
        if (((at - wanted) & mask()) >= ((at - gap) & mask())) {
            slots_[gap] = slots_[at];
            gap = at;
        }
    }
    slots_[gap].number = kFree;
    --num_taken_;
}

void HashIndex::clear(size_t max_slots) {
    if (slots_.size() > max_slots) std::vector<Slot>().swap(slots_);
    std::fill(slots_.begin(), slots_.end(), Slot{0, kFree});
    num_taken_ = 0;
}

// ------------------------------------------------------------------------------------------------------ the automaton

void SuffixAutomaton::clear() {
    empty(tokens_, kKeptTokens);
    empty(states_, 2 * kKeptTokens);
    empty(edges_, kKeptTokens);
    edges_by_token_.clear(2 * kKeptTokens);
    states_.push_back({0, kNone, kNone, kNone, 0, kNone, kNone});
    last_ = kStart;
    num_matches_ = 0;
}

void SuffixAutomaton::extend(const int32_t* tokens, int32_t number) {
    for (int32_t at = 0; at < number; ++at) {
        append(tokens[at]);
        note_matches();
    }
}

int32_t SuffixAutomaton::continuations(int32_t max_continuations, int32_t min_match, Continuation* out) const {
    int32_t num_found = 0;
    const auto add = [&](const Match& match, int32_t end) {
        const int32_t* const following = tokens_.data() + end + 1;
        const auto is_same = [=](const Continuation& one) { return one.tokens == following; };
        if (num_found >= max_continuations || std::any_of(out, out + num_found, is_same)) return;
        out[num_found++] = {following, num_tokens() - end - 1, true, match.length};
    };
    for (int32_t which = 0; which < num_matches_ && matches_[which].length >= min_match; ++which) {
        add(matches_[which], matches_[which].recent_end);
        add(matches_[which], matches_[which].first_end);
    }
    return num_found;
}

int64_t SuffixAutomaton::num_bytes() const {
    return bytes_of(tokens_) + bytes_of(states_) + bytes_of(edges_) + edges_by_token_.num_bytes();
}

// Blumer's step: a state for the whole text, and a clone where a substring's places come to differ.
void SuffixAutomaton::append(int32_t token) {
    const int32_t position = num_tokens();
    tokens_.push_back(token);
    const int32_t whole = add_state({position + 1, kStart, position, position, 0, kNone, kNone});
    int32_t state = last_;
    while (state != kNone && !target_of(state, token)) {
        add_edge(state, token, whole);
        state = states_[size_t(state)].link;
    }
    if (state != kNone) {
        const int32_t link = exact(state, token);
        states_[size_t(whole)].link = link;
    }
    last_ = whole;
}

// The state whose longest string is that of `state` followed by `token`.
int32_t SuffixAutomaton::exact(int32_t state, int32_t token) {
    const int32_t target = *target_of(state, token);
    const State longer = states_[size_t(target)];
    const int32_t length = states_[size_t(state)].length + 1;
    if (longer.length == length) return target;
    State shorter = longer;
    shorter.length = length;
    shorter.more_edges = kNone;
    const int32_t clone = add_state(shorter);
    for (int32_t edge = longer.more_edges; edge != kNone; edge = edges_[size_t(edge)].next) {
        const Edge copied = edges_[size_t(edge)];
        add_edge(clone, copied.token, copied.target);
    }
    states_[size_t(target)].link = clone;
    for (; state != kNone; state = states_[size_t(state)].link) {
        int32_t* const next = target_of(state, token);
        if (!next || *next != target) break;
        *next = clone;
    }
    return clone;
}

int32_t SuffixAutomaton::add_state(const State& state) {
    states_.push_back(state);
    return int32_t(states_.size()) - 1;
}

// Where the edge of this token leads to, null if there is none; until the next state or edge is added.
int32_t* SuffixAutomaton::target_of(int32_t state, int32_t token) {
    State& from = states_[size_t(state)];
    if (from.target == kNone) return nullptr;
    if (from.token == token) return &from.target;
    if (from.more_edges == kNone) return nullptr;
    const HashIndex::Slot* const slot = edges_by_token_.find(edge_hash(state, token), [&](int32_t edge) {
        return edges_[size_t(edge)].state == state && edges_[size_t(edge)].token == token;
    });
    return slot ? &edges_[size_t(slot->number)].target : nullptr;
}

// There is none of this token yet.
void SuffixAutomaton::add_edge(int32_t state, int32_t token, int32_t target) {
    State& from = states_[size_t(state)];
    if (from.target == kNone) {
        from.token = token;
        from.target = target;
        return;
    }
    const int32_t edge = int32_t(edges_.size());
    edges_.push_back({state, token, target, from.more_edges});
    from.more_edges = edge;
    edges_by_token_.insert(edge_hash(state, token), edge);
}

// The endings of the text that stood elsewhere before, longest first; each now stood here most recently. They are at
// most kMaxClasses, which keeps the cost of a token bounded: states beyond keep an older recent place.
void SuffixAutomaton::note_matches() {
    num_matches_ = 0;
    int32_t state = states_[size_t(last_)].link;
    while (state != kStart && num_matches_ < kMaxClasses) {
        State& ending = states_[size_t(state)];
        matches_[num_matches_++] = {ending.length, ending.recent_end, ending.first_end};
        ending.recent_end = num_tokens() - 1;
        state = ending.link;
    }
}

// ----------------------------------------------------------------------------------------------------------- the pool

OutputPool::OutputPool(int64_t max_tokens) : max_tokens_(std::min(max_tokens, int64_t(1) << 30)) {
    std::random_device chance;
    key_ = uint64_t(chance()) << 32 | chance();
}

void OutputPool::add(uint64_t scope, const int32_t* tokens, int32_t number) {
    const int32_t num_kept = int32_t(std::min(int64_t(number), max_tokens_));
    const int32_t* const kept = tokens + (number - num_kept);
    if (num_kept <= kNgramTokens[kNumSizes - 1]) return;  // nothing follows an n-gram
    const uint32_t hash = hash_of(scope, kept, num_kept);
    if (const HashIndex::Slot* const slot = find_output(scope, hash, kept, num_kept)) {
        remove_from_uses(slot->number);
        append_to_uses(slot->number);
        return;
    }
    while (num_tokens_ + num_kept > max_tokens_) drop(oldest_);
    int32_t output = free_output_;
    if (output == kNone) {
        output = int32_t(outputs_.size());
        outputs_.emplace_back();
    } else {
        free_output_ = outputs_[size_t(output)].older;
    }
    outputs_[size_t(output)] = {scope, next_order_++, {kept, kept + num_kept}, hash, kNone, kNone};
    outputs_by_content_.insert(hash, output);
    append_to_uses(output);
    num_tokens_ += num_kept;
    ++num_outputs_;
    for (int32_t which = 0; which < kNumSizes; ++which) {
        for (int32_t end = kNgramTokens[which] - 1; end < num_kept - 1; ++end) add_place(which, output, end);
    }
}

int32_t OutputPool::look_up(uint64_t scope, const int32_t* text, int32_t num_tokens, int32_t max_tokens,
                            int32_t max_continuations, Continuation* out) {
    if (max_tokens < 1 || max_continuations < 1) return 0;
    Match found[kMaxContinuations];
    const int32_t num_matches = matches(scope, text, num_tokens, found);
    std::sort(found, found + num_matches, [](const Match& one, const Match& other) {
        if (one.length != other.length) return one.length > other.length;
        return one.order != other.order ? one.order > other.order : one.end > other.end;
    });
    int32_t num_found = 0;
    for (int32_t which = 0; which < num_matches && num_found < max_continuations; ++which) {
        const Match& match = found[which];
        const std::vector<int32_t>& tokens = outputs_[size_t(match.output)].tokens;
        const int32_t* const following = tokens.data() + match.end + 1;
        const int32_t number = std::min(max_tokens, int32_t(tokens.size()) - match.end - 1);
        const auto is_same = [=](const Continuation& one) {
            return one.num_tokens == number && are_equal(one.tokens, following, number);
        };
        if (std::any_of(out, out + num_found, is_same)) continue;
        out[num_found++] = {following, number, false, match.length};
        remove_from_uses(match.output);
        append_to_uses(match.output);
    }
    return num_found;
}

int64_t OutputPool::num_bytes() const {
    int64_t sum = bytes_of(outputs_) + bytes_of(places_) + outputs_by_content_.num_bytes();
    for (const Output& output : outputs_) sum += bytes_of(output.tokens);
    for (const HashIndex& places : places_by_ngram_) sum += places.num_bytes();
    return sum;
}

uint32_t OutputPool::hash_of(uint64_t scope, const int32_t* tokens, int32_t number) const {
    uint64_t hash = mixed(key_ ^ scope);
    for (int32_t at = 0; at < number; ++at) hash = mixed(hash ^ uint32_t(tokens[at]));
    return folded(hash);
}

HashIndex::Slot* OutputPool::find_output(uint64_t scope, uint32_t hash, const int32_t* tokens, int32_t number) {
    return outputs_by_content_.find(hash, [&](int32_t which) {
        const Output& output = outputs_[size_t(which)];
        return output.scope == scope && output.tokens.size() == size_t(number) &&
               are_equal(output.tokens.data(), tokens, number);
    });
}

HashIndex::Slot* OutputPool::find_ngram(int32_t which, uint64_t scope, uint32_t hash, const int32_t* ngram) {
    return places_by_ngram_[which].find(hash, [&](int32_t latest) {
        const Place& place = places_[size_t(latest)];
        const Output& output = outputs_[size_t(place.output)];
        const int32_t size = kNgramTokens[which];
        return output.scope == scope && are_equal(output.tokens.data() + place.end + 1 - size, ngram, size);
    });
}

// Every place that the index names for the ending of a text, with how many tokens agree there; some come twice.
int32_t OutputPool::matches(uint64_t scope, const int32_t* text, int32_t num_tokens, Match* out) {
    int32_t num_matches = 0;
    const int32_t* const text_end = text + num_tokens;
    for (int32_t which = 0; which < kNumSizes; ++which) {
        const int32_t size = kNgramTokens[which];
        if (num_tokens < size) continue;
        const int32_t* const ngram = text_end - size;
        const HashIndex::Slot* const slot = find_ngram(which, scope, hash_of(scope, ngram, size), ngram);
        for (int32_t at = slot ? slot->number : kNone; at != kNone; at = places_[size_t(at)].older) {
            const Place& place = places_[size_t(at)];
            const Output& output = outputs_[size_t(place.output)];
            const int32_t most = std::min({num_tokens, kMaxMatchTokens, place.end + 1});
            const int32_t* const last = output.tokens.data() + place.end;
            int32_t length = size;
            while (length < most && last[-length] == text_end[-1 - length]) ++length;
            out[num_matches++] = {place.output, place.end, length, output.order};
        }
    }
    return num_matches;
}

void OutputPool::drop(int32_t dropped) {
    Output& output = outputs_[size_t(dropped)];
    const int32_t number = int32_t(output.tokens.size());
    for (int32_t which = 0; which < kNumSizes; ++which) {
        for (int32_t end = kNgramTokens[which] - 1; end < number - 1; ++end) remove_place(which, dropped, end);
    }
    outputs_by_content_.erase(find_output(output.scope, output.hash, output.tokens.data(), number));
    remove_from_uses(dropped);
    num_tokens_ -= number;
    --num_outputs_;
    std::vector<int32_t>().swap(output.tokens);
    output.older = free_output_;
    free_output_ = dropped;
}

void OutputPool::add_place(int32_t which, int32_t output, int32_t end) {
    const Output& of = outputs_[size_t(output)];
    const int32_t* const ngram = of.tokens.data() + end + 1 - kNgramTokens[which];
    const uint32_t hash = hash_of(of.scope, ngram, kNgramTokens[which]);
    HashIndex::Slot* const slot = find_ngram(which, of.scope, hash, ngram);
    const int32_t latest = free_place();
    places_[size_t(latest)] = {output, end, slot ? slot->number : kNone};
    if (!slot) {
        places_by_ngram_[which].insert(hash, latest);
        return;
    }
    slot->number = latest;
    int32_t last = latest;
    for (int32_t kept = 1; kept < kMaxPlaces && last != kNone; ++kept) last = places_[size_t(last)].older;
    if (last == kNone || places_[size_t(last)].older == kNone) return;
    const int32_t forgotten = places_[size_t(last)].older;  // only one can be too many
    places_[size_t(last)].older = kNone;
    places_[size_t(forgotten)].older = free_place_;
    free_place_ = forgotten;
}

// Unless it was forgotten before.
void OutputPool::remove_place(int32_t which, int32_t output, int32_t end) {
    const Output& of = outputs_[size_t(output)];
    const int32_t* const ngram = of.tokens.data() + end + 1 - kNgramTokens[which];
    HashIndex::Slot* const slot = find_ngram(which, of.scope, hash_of(of.scope, ngram, kNgramTokens[which]), ngram);
    if (!slot) return;
    int32_t* link = &slot->number;
    while (*link != kNone && (places_[size_t(*link)].output != output || places_[size_t(*link)].end != end)) {
        link = &places_[size_t(*link)].older;
    }
    if (*link == kNone) return;
    const int32_t removed = *link;
    *link = places_[size_t(removed)].older;
    if (slot->number == kNone) places_by_ngram_[which].erase(slot);
    places_[size_t(removed)].older = free_place_;
    free_place_ = removed;
}

int32_t OutputPool::free_place() {
    if (free_place_ == kNone) {
        places_.emplace_back();
        return int32_t(places_.size()) - 1;
    }
    const int32_t place = free_place_;
    free_place_ = places_[size_t(place)].older;
    return place;
}

void OutputPool::append_to_uses(int32_t output) {
    outputs_[size_t(output)].older = newest_;
    outputs_[size_t(output)].newer = kNone;
    (newest_ == kNone ? oldest_ : outputs_[size_t(newest_)].newer) = output;
    newest_ = output;
}

void OutputPool::remove_from_uses(int32_t output) {
    const int32_t older = outputs_[size_t(output)].older, newer = outputs_[size_t(output)].newer;
    (older == kNone ? oldest_ : outputs_[size_t(older)].newer) = newer;
    (newer == kNone ? newest_ : outputs_[size_t(newer)].older) = older;
}

}  // namespace SLIPSTREAM_ISA
