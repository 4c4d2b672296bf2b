// Look-ups: what followed the last time a text looked like this, in the request itself and in outputs of the past. No
// object may be used by two threads at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace SLIPSTREAM_ISA {

// The tokens that followed an earlier occurrence of the last `match_length` tokens; at least one of each. A loop never
// ends, with token i being tokens[i % num_tokens]; anything else ends after `num_tokens`.
struct Continuation {
    const int32_t* tokens;
    int32_t num_tokens;
    bool is_loop;
    int32_t match_length;
};

// Numbers from 0 on that are found by the hash of what they stand for; whoever looks compares the things themselves.
// Open addressing with linear probing in 12 to 24 bytes a number, in a table that never shrinks.
class HashIndex {
   public:
    struct Slot {
        uint32_t hash;
        int32_t number;
    };

    // Where a number with this hash is of which `is_wanted(number)` holds, until the next `insert` or `erase`; or null.
    // Another number of the same hash may be written there.
    template <class IsWanted>
    Slot* find(uint32_t hash, IsWanted is_wanted) {
        if (slots_.empty()) return nullptr;
        for (size_t at = hash & mask();; at = (at + 1) & mask()) {
            if (slots_[at].number == kFree) return nullptr;
            if (slots_[at].hash == hash && is_wanted(slots_[at].number)) return &slots_[at];
        }
    }

    void insert(uint32_t hash, int32_t number);
    void erase(Slot* slot);
    // Forget everything, and the table too if it has more than `max_slots`.
    void clear(size_t max_slots);
    int64_t num_bytes() const { return int64_t(slots_.capacity() * sizeof(Slot)); }

   private:
    static constexpr int32_t kFree = -1;

    size_t mask() const { return slots_.size() - 1; }
    void place(Slot slot);

    std::vector<Slot> slots_;  // a power of two of them, at most two thirds taken
    size_t num_taken_ = 0;
};

// Every substring of one growing text, with the first and a recent place of each: the online suffix automaton of Blumer
// et al., 1985, "The smallest automaton recognizing the subwords of a text". It finds, after every token, the longest
// ending that stood there before.
//
// A text of n tokens (at most 2^30) has at most 2n states and n edges beyond the first of each state, so `extend` costs
// O(1) a token, amortised and whatever the text, and at most 180 bytes a token are allocated (60 to 92 measured on
// loops, words, random bits and tokens that all differ). Hashes are those of a fixed function: who chooses the worst
// text for it pays with the time of his own request.
class SuffixAutomaton {
   public:
    // Matching endings that are followed: the longest, and the next shorter ones that stood elsewhere too.
    static constexpr int32_t kMaxClasses = 4;
    static constexpr int32_t kMaxContinuations = 2 * kMaxClasses;

    SuffixAutomaton() { clear(); }

    // The text goes on with these tokens.
    void extend(const int32_t* tokens, int32_t number);
    // Start again with an empty text, keeping the memory of one of at most kKeptTokens.
    void clear();

    int32_t num_tokens() const { return int32_t(tokens_.size()); }
    const int32_t* tokens() const { return tokens_.data(); }
    // How many of the last tokens stood together before; 0 if not even the last one did.
    int32_t match_length() const { return num_matches_ > 0 ? matches_[0].length : 0; }
    // What may follow, longest match first and, of equal matches, the recent place before the first one: at most
    // `max_continuations` (there are never more than kMaxContinuations) from matches of at least `min_match` tokens.
    // All are loops: what reaches the end of the text goes on with what it copied. They hold until the text goes on.
    int32_t continuations(int32_t max_continuations, int32_t min_match, Continuation* out) const;
    // Memory allocated.
    int64_t num_bytes() const;

   private:
    static constexpr size_t kKeptTokens = 4096;
    static constexpr int32_t kStart = 0;
    static constexpr int32_t kNone = -1;

    // The substrings that stand in the same places: the length of the longest, the state of its longest ending that
    // stands elsewhere too, and the last positions of its first and of a recent place. Most states have one edge.
    struct State {
        int32_t length, link, first_end, recent_end;
        int32_t token, target;  // the first edge, if target is not kNone
        int32_t more_edges;     // the newest of the others
    };

    struct Edge {
        int32_t state, token, target, next;
    };

    struct Match {
        int32_t length, recent_end, first_end;
    };

    void append(int32_t token);
    int32_t exact(int32_t state, int32_t token);
    int32_t add_state(const State& state);
    int32_t* target_of(int32_t state, int32_t token);
    void add_edge(int32_t state, int32_t token, int32_t target);
    void note_matches();

    std::vector<int32_t> tokens_;
    std::vector<State> states_;
    std::vector<Edge> edges_;
    HashIndex edges_by_token_;
    int32_t last_;
    Match matches_[kMaxClasses];
    int32_t num_matches_;
};

// Past outputs, of at most `max_tokens` tokens (at most 2^30) in all; the least recently used goes first, where using
// is adding, again too, or being found. What is added in one scope is found in that scope only. A scope is a tenant, as
// a rule: outputs never show one of them a token of another (the target verifies every token), but how fast an answer
// comes would tell whether somebody wrote it before.
//
// Memory: 61 bytes a token, nearly all of it the index (measured on 65,536 tokens in outputs of 100 random ones), or 4
// MiB. Hashes are keyed by a random number, so that nobody can choose outputs that make the index slow for others.
class OutputPool {
   public:
    // Sizes of the n-grams that outputs are found by, longest first; the last is the shortest match there is.
    static constexpr int32_t kNgramTokens[] = {8, 3};
    static constexpr int32_t kNumSizes = 2;
    // Places kept per n-gram, the latest ones: a common n-gram would have thousands, all equally telling.
    static constexpr int32_t kMaxPlaces = 16;
    static constexpr int32_t kMaxContinuations = kNumSizes * kMaxPlaces;
    // Where comparing a match stops: one this long says all that a longer one does.
    static constexpr int32_t kMaxMatchTokens = 64;

    explicit OutputPool(int64_t max_tokens);

    // Keep an output, of a longer one than fits the end; one that is there already counts as used. `tokens` may not lie
    // in the pool.
    void add(uint64_t scope, const int32_t* tokens, int32_t number);
    // What followed the longest endings of a text, longest match first, then the latest: at most `max_continuations`
    // (there are never more than kMaxContinuations), of at most `max_tokens` tokens each, in which they differ. The
    // longest match of the scope is among them unless its n-gram was added kMaxPlaces times since. They hold until the
    // next `add`.
    int32_t look_up(uint64_t scope, const int32_t* text, int32_t num_tokens, int32_t max_tokens,
                    int32_t max_continuations, Continuation* out);
    int64_t num_tokens() const { return num_tokens_; }
    int32_t num_outputs() const { return num_outputs_; }
    // Memory allocated.
    int64_t num_bytes() const;

   private:
    static constexpr int32_t kNone = -1;

    struct Output {
        uint64_t scope;
        uint64_t order;  // counts outputs as they are added
        std::vector<int32_t> tokens;
        uint32_t hash;
        int32_t older, newer;  // neighbours by use; of a free one, `older` is the next free one
    };

    // One n-gram's occurrence up to `end`; `older` is an earlier occurrence, or the next free place.
    struct Place {
        int32_t output, end, older;
    };

    struct Match {
        int32_t output, end, length;
        uint64_t order;
    };

    uint32_t hash_of(uint64_t scope, const int32_t* tokens, int32_t number) const;
    HashIndex::Slot* find_output(uint64_t scope, uint32_t hash, const int32_t* tokens, int32_t number);
    HashIndex::Slot* find_ngram(int32_t which, uint64_t scope, uint32_t hash, const int32_t* ngram);
    int32_t matches(uint64_t scope, const int32_t* text, int32_t num_tokens, Match* out);
    void drop(int32_t output);
    void add_place(int32_t which, int32_t output, int32_t end);
    void remove_place(int32_t which, int32_t output, int32_t end);
    int32_t free_place();
    void append_to_uses(int32_t output);
    void remove_from_uses(int32_t output);

    int64_t max_tokens_, num_tokens_ = 0;
    uint64_t key_, next_order_ = 0;
    std::vector<Output> outputs_;
    std::vector<Place> places_;
    HashIndex outputs_by_content_, places_by_ngram_[kNumSizes];  // an n-gram's latest place
    int32_t num_outputs_ = 0, oldest_ = kNone, newest_ = kNone, free_output_ = kNone, free_place_ = kNone;
};

}  // namespace SLIPSTREAM_ISA
