"""Compiled look-ups answer as their definition does, in linear time and bounded memory whatever the text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_kernels.lookup import (
    MAX_CLASSES,
    MAX_MATCH_TOKENS,
    MAX_PLACES,
    Continuation,
    OutputPool,
    SuffixAutomaton,
)
from tests.unit import lookup_oracle

LARGEST = 2**31 - 1
SYMBOLS = (0, 1, LARGEST, -1, -LARGEST - 1, 7, 65_536)
TEXTS = st.integers(1, len(SYMBOLS)).flatmap(lambda size: st.lists(st.sampled_from(SYMBOLS[:size]), max_size=80))
ALL = {"max_tokens": 9, "max_continuations": 2 * MAX_CLASSES}
MAX_BYTES_A_TOKEN = 180
KEPT_BYTES = 400_000  # the most a cleared automaton keeps


def assert_same(one: SuffixAutomaton, definition: lookup_oracle.SuffixAutomaton) -> None:
    assert (len(one), one.match_length) == (len(definition), definition.match_length)
    assert one.continuations(**ALL) == definition.continuations(**ALL)
    for min_match in (2, 5):
        asked = {"max_tokens": 3, "max_continuations": 3, "min_match": min_match}
        assert one.continuations(**asked) == definition.continuations(**asked)


def words(rng: random.Random, num_tokens: int) -> list[int]:
    """Words of a few tokens that come again, some more often than others, as in text."""
    vocabulary = [[rng.randrange(4096) for _ in range(rng.randint(1, 4))] for _ in range(300)]
    text: list[int] = []
    while len(text) < num_tokens:
        text += vocabulary[min(int(rng.paretovariate(0.7)), len(vocabulary)) - 1]
    return text[:num_tokens]


def long_texts() -> dict[str, list[int]]:
    rng = random.Random(3)
    return {
        "one symbol": [5] * 2000,
        "a loop": [0, 1, 1, 2] * 500,
        "bits": [rng.randrange(2) for _ in range(2000)],
        "all different": list(range(2000)),
        "twice all different": [*range(1000), *range(1000)],
        "code": list(Path(__file__).read_bytes()),
        "words": words(rng, 6000),
        "two blocks": [0] * 1000 + [1] * 1000 + [0] * 1000 + [1] * 1000,
    }


# -------------------------------------------------------------------------------------------------------- the automaton


@given(TEXTS)
def test_an_automaton_answers_as_its_definition_after_every_token(text: list[int]) -> None:
    automaton, definition = SuffixAutomaton(), lookup_oracle.SuffixAutomaton()
    assert_same(automaton, definition)
    for token in text:
        automaton.extend([token])
        definition.extend([token])
        assert_same(automaton, definition)


@pytest.mark.parametrize("text", long_texts().values(), ids=long_texts())
def test_an_automaton_answers_as_its_definition_on_long_texts(isa: str, text: list[int]) -> None:
    automaton, definition = SuffixAutomaton(), lookup_oracle.SuffixAutomaton()
    for start in range(0, len(text), 97):
        automaton.extend(np.array(text[start : start + 97], np.int32))
        definition.extend(text[start : start + 97])
        assert_same(automaton, definition)
    assert automaton.num_bytes <= MAX_BYTES_A_TOKEN * len(text)


@given(st.lists(TEXTS, max_size=4))
def test_a_cleared_automaton_is_a_new_one(texts: list[list[int]]) -> None:
    automaton = SuffixAutomaton()
    for text in texts:
        automaton.clear()
        definition = lookup_oracle.SuffixAutomaton()
        assert_same(automaton, definition)
        automaton.extend(text)
        definition.extend(text)
        assert_same(automaton, definition)


@pytest.mark.parametrize("num_tokens", [100, 4096, 4097, 50_000])
def test_a_cleared_automaton_keeps_bounded_memory_and_forgets_every_edge(num_tokens: int) -> None:
    rng = random.Random(num_tokens)
    text = [rng.randrange(3000) for _ in range(num_tokens)]
    automaton = SuffixAutomaton()
    automaton.extend(text)
    automaton.clear()
    assert automaton.num_bytes <= KEPT_BYTES
    again, definition = text[::-1][:500], lookup_oracle.SuffixAutomaton()
    automaton.extend(again)
    definition.extend(again)
    assert_same(automaton, definition)


LENGTH = 2**20
HALF = LENGTH // 2
WORST: dict[str, Callable[[], np.ndarray]] = {
    "one symbol": lambda: np.zeros(LENGTH, np.int32),
    "a short loop": lambda: np.arange(LENGTH, dtype=np.int32) % 3,
    "most states": lambda: np.r_[0, np.ones(LENGTH - 1)].astype(np.int32),
    "most edges": lambda: np.r_[0, np.ones(LENGTH - 2), 2].astype(np.int32),
    "two blocks": lambda: np.repeat(np.array([0, 1], np.int32), HALF),
    "all different": lambda: np.arange(LENGTH, dtype=np.int32),
    "bits": lambda: np.random.default_rng(1).integers(0, 2, LENGTH, np.int32),
}


@pytest.mark.parametrize("name", WORST)
def test_a_million_tokens_of_any_kind_take_linear_memory_and_time_that_ends(name: str) -> None:
    """Were a token's cost to grow with the text, this would be 2^40 operations and run into the test's time limit."""
    automaton = SuffixAutomaton()
    text = WORST[name]()
    automaton.extend(text)
    assert len(automaton) == LENGTH
    assert automaton.num_bytes <= MAX_BYTES_A_TOKEN * LENGTH
    for found in automaton.continuations(max_tokens=5, max_continuations=8):
        assert 1 <= found.match_length < LENGTH
        assert set(found.token_ids) <= set(text.tolist())


def test_a_million_equal_tokens_match_all_but_one_and_go_on() -> None:
    automaton = SuffixAutomaton()
    automaton.extend(np.full(LENGTH, 9, np.int32))
    found = automaton.continuations(max_tokens=4, max_continuations=1)
    assert found == [Continuation((9, 9, 9, 9), LENGTH - 1)]


def test_no_token_is_taken_for_another_of_the_same_hash() -> None:
    """Among so many tokens some share one, of 32 bits; each is new, so none may match."""
    automaton = SuffixAutomaton()
    for token in different_tokens():
        automaton.extend([token])
        assert automaton.match_length == 0


def different_tokens() -> list[int]:
    return list(dict.fromkeys(np.random.default_rng(5).integers(0, LARGEST, 2**18, np.int32).tolist()))


# ------------------------------------------------------------------------------------------------------------- the pool

TOKENS = st.lists(st.sampled_from(SYMBOLS[:3]), max_size=20)
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 1), TOKENS, st.just(0), st.just(0)),
        st.tuples(st.just("look up"), st.integers(0, 1), TOKENS, st.integers(0, 5), st.integers(0, 9)),
    ),
    max_size=30,
)


@given(st.integers(0, 90), CALLS)
def test_a_pool_answers_as_its_definition(max_tokens: int, calls: list[tuple[str, int, list[int], int, int]]) -> None:
    pool, definition = OutputPool(max_tokens=max_tokens), lookup_oracle.OutputPool(max_tokens=max_tokens)
    for call, scope, tokens, num_tokens, number in calls:
        if call == "add":
            pool.add(scope, tokens)
            definition.add(scope, tokens)
        else:
            asked = {"max_tokens": num_tokens, "max_continuations": number}
            assert pool.look_up(scope, tokens, **asked) == definition.look_up(scope, tokens, **asked)
        assert (pool.num_tokens, pool.num_outputs) == (definition.num_tokens, definition.num_outputs)


@pytest.mark.parametrize(("max_tokens", "num_symbols"), [(3000, 4), (2000, 30), (100_000, 300), (700, 1)])
def test_a_pool_in_long_use_answers_as_its_definition(isa: str, max_tokens: int, num_symbols: int) -> None:
    rng = random.Random(num_symbols)
    pool, definition = OutputPool(max_tokens=max_tokens), lookup_oracle.OutputPool(max_tokens=max_tokens)
    written = [[rng.randrange(num_symbols) for _ in range(rng.randint(1, 150))] for _ in range(40)]
    for step in range(400):
        output = rng.choice(written)[: rng.randint(1, 200)] + [rng.randrange(num_symbols)] * rng.randint(0, 3)
        scope = rng.randrange(2)
        if step % 2:
            pool.add(scope, output)
            definition.add(scope, output)
        asked = {"max_tokens": rng.randint(1, 12), "max_continuations": rng.randint(1, 2 * MAX_PLACES)}
        assert pool.look_up(scope, output, **asked) == definition.look_up(scope, output, **asked)
        assert (pool.num_tokens, pool.num_outputs) == (definition.num_tokens, definition.num_outputs)


@pytest.mark.parametrize("excess", [-1, 0, 1, 30])
def test_a_match_is_compared_no_further_than_its_bound(excess: int) -> None:
    pool, text = OutputPool(max_tokens=1000), list(range(MAX_MATCH_TOKENS + excess))
    pool.add(0, [*text, 7])
    found = pool.look_up(0, [500, *text], max_tokens=1, max_continuations=1)
    assert found == [Continuation((7,), MAX_MATCH_TOKENS + min(excess, 0))]


def test_an_n_gram_that_stands_everywhere_keeps_its_latest_places_only() -> None:
    pool = OutputPool(max_tokens=1 << 18)
    for length in range(1 << 12, 1 << 13, 8):
        pool.add(0, np.zeros(length, np.int32))
    assert pool.num_tokens <= 1 << 18
    assert pool.num_bytes <= 6 * pool.num_tokens, "little more than the tokens themselves"
    found = pool.look_up(0, [0] * 100, max_tokens=4, max_continuations=32)
    assert found == [Continuation((0,) * number, MAX_MATCH_TOKENS) for number in (1, 2, 3, 4)]


def test_no_n_gram_is_taken_for_another_of_the_same_hash() -> None:
    """Among so many n-grams some share one, of 32 bits, whatever the key; each is found by itself alone."""
    tokens, pool = different_tokens(), OutputPool(max_tokens=2**18)
    pool.add(0, tokens)
    for end in range(3, len(tokens)):
        found = pool.look_up(0, tokens[end - 3 : end], max_tokens=1, max_continuations=2)
        assert found == [Continuation((tokens[end],), 3)]
