"""The pool of past outputs: longest verified match, one bound in tokens, scopes apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_kernels.lookup import MAX_PLACES, NGRAM_TOKENS, Continuation, OutputPool
from tests.unit import lookup_oracle

SHORTEST = NGRAM_TOKENS[-1]


@pytest.fixture(autouse=True)
def _kernels(exact_kernels: None) -> None:
    pass


def found(pool: OutputPool, ending: list[int], *, scope: int = 1, max_tokens: int = 4) -> list[Continuation]:
    return pool.look_up(scope, ending, max_tokens=max_tokens, max_continuations=4)


def test_worked_example_proposes_what_followed_in_a_past_output() -> None:
    pool = OutputPool(max_tokens=100)
    pool.add(1, [9, 1, 2, 3, 4, 5, 6])
    assert found(pool, [8, 8, 1, 2, 3], max_tokens=2) == [Continuation((4, 5), 3)]


def test_the_longest_match_comes_first_then_the_latest() -> None:
    pool = OutputPool(max_tokens=100)
    pool.add(1, [0, 1, 2, 3, 70])
    pool.add(1, [5, 1, 2, 3, 80])
    pool.add(1, [6, 1, 2, 3, 90])
    assert found(pool, [0, 1, 2, 3]) == [Continuation((70,), 4), Continuation((90,), 3), Continuation((80,), 3)]


def test_equal_continuations_are_one() -> None:
    pool = OutputPool(max_tokens=100)
    pool.add(1, [0, 1, 2, 3, 7])
    pool.add(1, [5, 1, 2, 3, 7])
    assert found(pool, [0, 1, 2, 3]) == [Continuation((7,), 4)]


def test_continuations_differ_within_the_tokens_asked_for() -> None:
    pool = OutputPool(max_tokens=100)
    pool.add(1, [0, 1, 2, 3, 7, 8])
    pool.add(1, [5, 1, 2, 3, 7, 9])
    assert found(pool, [0, 1, 2, 3], max_tokens=1) == [Continuation((7,), 4)]
    assert found(pool, [0, 1, 2, 3], max_tokens=2) == [Continuation((7, 8), 4), Continuation((7, 9), 3)]


def test_what_stands_at_the_end_of_an_output_proposes_nothing() -> None:
    pool = OutputPool(max_tokens=100)
    pool.add(1, [4, 1, 2, 3])
    assert found(pool, [1, 2, 3]) == []


def test_a_scope_finds_what_was_added_in_it_alone() -> None:
    pool = OutputPool(max_tokens=100)
    pool.add(2**64 - 1, [1, 2, 3, 4])
    pool.add(2, [1, 2, 3, 5])
    assert found(pool, [1, 2, 3], scope=2**64 - 1) == [Continuation((4,), 3)]
    assert found(pool, [1, 2, 3], scope=2) == [Continuation((5,), 3)]
    assert found(pool, [1, 2, 3], scope=2**32 - 1) == []
    pool.add(3, [1, 2, 3, 4])
    assert pool.num_outputs == 3, "the same words of two scopes are two outputs"


def test_least_recently_used_output_goes_first() -> None:
    pool = OutputPool(max_tokens=10)
    pool.add(1, [1, 2, 3, 4, 5])
    pool.add(1, [11, 12, 13, 14, 15])
    assert found(pool, [1, 2, 3])
    pool.add(1, [21, 22, 23, 24, 25])
    assert found(pool, [1, 2, 3]), "it was used"
    assert not found(pool, [11, 12, 13])
    assert (pool.num_outputs, pool.num_tokens) == (2, 10)


def test_an_output_added_again_is_kept_once() -> None:
    pool = OutputPool(max_tokens=10)
    pool.add(1, [1, 2, 3, 4, 5])
    pool.add(1, [11, 12, 13, 14, 15])
    pool.add(1, [1, 2, 3, 4, 5])
    assert pool.num_outputs == 2
    pool.add(1, [21, 22, 23, 24, 25])
    assert found(pool, [1, 2, 3]), "adding it again was a use"


def test_of_an_output_longer_than_the_pool_the_end_is_kept() -> None:
    pool = OutputPool(max_tokens=6)
    pool.add(1, list(range(100)))
    assert pool.num_tokens == 6
    assert found(pool, [94, 95, 96]) == [Continuation((97, 98, 99), 3)]


def test_a_pool_of_nothing_holds_and_finds_nothing() -> None:
    pool = OutputPool(max_tokens=0)
    pool.add(1, [1, 2, 3, 4, 5])
    assert pool.num_tokens == 0
    assert found(pool, [1, 2, 3]) == []


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens is -1, expected at least 0"):
        OutputPool(max_tokens=-1)


def test_a_full_pool_stays_in_its_memory() -> None:
    pool, sizes = OutputPool(max_tokens=200), []
    for start in range(500):
        pool.add(1, [(start * start + step * (start % 7 + 1)) % 1009 for step in range(10)])
        sizes.append(pool.num_bytes)
    assert pool.num_outputs == 20
    assert sizes[-1] == sizes[100], "what goes leaves its place to what comes"


OUTPUTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), max_size=12)


@given(OUTPUTS, st.lists(st.integers(0, 2), max_size=12), st.integers(0, 60))
def test_look_up_finds_the_longest_match_of_all_outputs_kept(
    outputs: list[list[int]], ending: list[int], max_tokens: int
) -> None:
    pool, definition = OutputPool(max_tokens=max_tokens), lookup_oracle.OutputPool(max_tokens=max_tokens)
    for output in outputs:
        pool.add(1, output)
        definition.add(1, output)
    assert pool.num_tokens == definition.num_tokens <= max_tokens
    matches = [match for output in definition.kept for match in _matches(output, ending)]
    shown = found(pool, ending, max_tokens=3)
    if pool.num_tokens <= MAX_PLACES:  # So few places that none was pushed out of the index.
        assert max((one.match_length for one in shown), default=0) == max((one for one, _ in matches), default=0)
    for one in shown:
        assert (one.match_length, one.token_ids) in matches


def _matches(output: tuple[int, ...], ending: list[int]) -> list[tuple[int, tuple[int, ...]]]:
    lengths = [
        (lookup_oracle.agreeing(output, end, ending), output[end + 1 : end + 4]) for end in range(len(output) - 1)
    ]
    return [match for match in lengths if match[0] >= SHORTEST]
