// The C interface of look-ups, for tests and measurements.
#include "export.h"
#include "lookup.h"

namespace isa = SLIPSTREAM_ISA;

// Where memory runs out half-way through a change nothing can be saved, so the process ends: `noexcept`.
extern "C" {

auto SLIPSTREAM_EXPORT(automaton_new)() noexcept -> void* { return new isa::SuffixAutomaton; }

void SLIPSTREAM_EXPORT(automaton_free)(void* automaton) noexcept {
    delete static_cast<isa::SuffixAutomaton*>(automaton);
}

void SLIPSTREAM_EXPORT(automaton_extend)(void* automaton, const int32_t* tokens, int32_t number) noexcept {
    static_cast<isa::SuffixAutomaton*>(automaton)->extend(tokens, number);
}

void SLIPSTREAM_EXPORT(automaton_clear)(void* automaton) noexcept {
    static_cast<isa::SuffixAutomaton*>(automaton)->clear();
}

int32_t SLIPSTREAM_EXPORT(automaton_num_tokens)(const void* automaton) noexcept {
    return static_cast<const isa::SuffixAutomaton*>(automaton)->num_tokens();
}

int32_t SLIPSTREAM_EXPORT(automaton_match_length)(const void* automaton) noexcept {
    return static_cast<const isa::SuffixAutomaton*>(automaton)->match_length();
}

int64_t SLIPSTREAM_EXPORT(automaton_num_bytes)(const void* automaton) noexcept {
    return static_cast<const isa::SuffixAutomaton*>(automaton)->num_bytes();
}

int32_t SLIPSTREAM_EXPORT(automaton_continuations)(const void* automaton, int32_t max_continuations, int32_t min_match,
                                                   void* out) noexcept {
    return static_cast<const isa::SuffixAutomaton*>(automaton)->continuations(max_continuations, min_match,
                                                                              static_cast<isa::Continuation*>(out));
}

auto SLIPSTREAM_EXPORT(output_pool_new)(int64_t max_tokens) noexcept -> void* {
    return new isa::OutputPool(max_tokens);
}

void SLIPSTREAM_EXPORT(output_pool_free)(void* pool) noexcept { delete static_cast<isa::OutputPool*>(pool); }

void SLIPSTREAM_EXPORT(output_pool_add)(void* pool, uint64_t scope, const int32_t* tokens, int32_t number) noexcept {
    static_cast<isa::OutputPool*>(pool)->add(scope, tokens, number);
}

int32_t SLIPSTREAM_EXPORT(output_pool_look_up)(void* pool, uint64_t scope, const int32_t* text, int32_t num_tokens,
                                               int32_t max_tokens, int32_t max_continuations, void* out) noexcept {
    return static_cast<isa::OutputPool*>(pool)->look_up(scope, text, num_tokens, max_tokens, max_continuations,
                                                        static_cast<isa::Continuation*>(out));
}

int64_t SLIPSTREAM_EXPORT(output_pool_num_tokens)(const void* pool) noexcept {
    return static_cast<const isa::OutputPool*>(pool)->num_tokens();
}

int32_t SLIPSTREAM_EXPORT(output_pool_num_outputs)(const void* pool) noexcept {
    return static_cast<const isa::OutputPool*>(pool)->num_outputs();
}

int64_t SLIPSTREAM_EXPORT(output_pool_num_bytes)(const void* pool) noexcept {
    return static_cast<const isa::OutputPool*>(pool)->num_bytes();
}

}  // extern "C"
