"""The pool of past outputs: longest verified match, one bound in tokens, tenants apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slipstream.drafting.lookup import Continuation
from slipstream.drafting.pool import MAX_PLACES, NGRAM_TOKENS, OutputPool

SHORTEST = NGRAM_TOKENS[-1]


def found(pool: OutputPool, ending: list[int], *, tenant: str = "a", max_tokens: int = 4) -> list[Continuation]:
    return pool.look_up(tenant, ending, max_tokens=max_tokens, max_continuations=4)


def test_worked_example_proposes_what_followed_in_a_past_output() -> None:
    pool = OutputPool(max_tokens=100)
    pool.add("a", [9, 1, 2, 3, 4, 5, 6])
    assert found(pool, [8, 8, 1, 2, 3], max_tokens=2) == [Continuation((4, 5), 3)]


def test_the_longest_match_comes_first_then_the_latest() -> None:
    pool = OutputPool(max_tokens=100)
    pool.add("a", [0, 1, 2, 3, 70])
    pool.add("a", [5, 1, 2, 3, 80])
    pool.add("a", [6, 1, 2, 3, 90])
    assert found(pool, [0, 1, 2, 3]) == [Continuation((70,), 4), Continuation((90,), 3), Continuation((80,), 3)]


def test_equal_continuations_are_one() -> None:
    pool = OutputPool(max_tokens=100)
    pool.add("a", [0, 1, 2, 3, 7])
    pool.add("a", [5, 1, 2, 3, 7])
    assert found(pool, [0, 1, 2, 3]) == [Continuation((7,), 4)]


def test_what_stands_at_the_end_of_an_output_proposes_nothing() -> None:
    pool = OutputPool(max_tokens=100)
    pool.add("a", [4, 1, 2, 3])
    assert found(pool, [1, 2, 3]) == []


def test_tenants_do_not_see_each_other_unless_they_share() -> None:
    apart, shared = OutputPool(max_tokens=100), OutputPool(max_tokens=100, is_shared=True)
    for pool in (apart, shared):
        pool.add("a", [1, 2, 3, 4])
    assert found(apart, [1, 2, 3], tenant="b") == []
    assert found(shared, [1, 2, 3], tenant="b") == [Continuation((4,), 3)]


def test_least_recently_used_output_goes_first() -> None:
    pool = OutputPool(max_tokens=10)
    pool.add("a", [1, 2, 3, 4, 5])
    pool.add("a", [11, 12, 13, 14, 15])
    assert found(pool, [1, 2, 3])
    pool.add("a", [21, 22, 23, 24, 25])
    assert found(pool, [1, 2, 3]), "it was used"
    assert not found(pool, [11, 12, 13])
    assert (pool.num_outputs, pool.num_tokens) == (2, 10)


def test_an_output_added_again_is_kept_once() -> None:
    pool = OutputPool(max_tokens=10)
    pool.add("a", [1, 2, 3, 4, 5])
    pool.add("a", [11, 12, 13, 14, 15])
    pool.add("a", [1, 2, 3, 4, 5])
    assert pool.num_outputs == 2
    pool.add("a", [21, 22, 23, 24, 25])
    assert found(pool, [1, 2, 3]), "adding it again was a use"


def test_of_an_output_longer_than_the_pool_the_end_is_kept() -> None:
    pool = OutputPool(max_tokens=6)
    pool.add("a", list(range(100)))
    assert pool.num_tokens == 6
    assert found(pool, [94, 95, 96]) == [Continuation((97, 98, 99), 3)]


def test_a_pool_of_nothing_holds_and_finds_nothing() -> None:
    pool = OutputPool(max_tokens=0)
    pool.add("a", [1, 2, 3, 4, 5])
    assert pool.num_tokens == 0
    assert found(pool, [1, 2, 3]) == []


def test_an_emptied_index_leaves_nothing_behind() -> None:
    pool = OutputPool(max_tokens=20)
    for start in range(50):
        pool.add("a", [(start * 7 + step) % 11 for step in range(10)])
    assert sum(len(places) for places in pool._places.values()) <= len(NGRAM_TOKENS) * pool.num_tokens
    assert all(pool._places.values())


OUTPUTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), max_size=12)


@given(OUTPUTS, st.lists(st.integers(0, 2), max_size=12), st.integers(0, 60))
def test_look_up_finds_the_longest_match_of_all_outputs_kept(
    outputs: list[list[int]], ending: list[int], max_tokens: int
) -> None:
    pool = OutputPool(max_tokens=max_tokens)
    for output in outputs:
        pool.add("a", output)
    assert pool.num_tokens <= max_tokens
    kept = [one.token_ids.tolist() for one in pool._outputs.values()]
    matches = [match for output in kept for match in _matches(output, ending)]
    shown = found(pool, ending, max_tokens=3)
    if sum(map(len, kept)) <= MAX_PLACES:  # So few places that none was pushed out of the index.
        assert max((one.match_length for one in shown), default=0) == max((one for one, _ in matches), default=0)
    for one in shown:
        assert (one.match_length, one.token_ids) in matches


def _matches(output: list[int], ending: list[int]) -> list[tuple[int, tuple[int, ...]]]:
    found = []
    for end in range(len(output) - 1):
        limit = min(end + 1, len(ending))
        agreeing = next((n for n in range(limit) if output[end - n] != ending[-1 - n]), limit)
        if agreeing >= SHORTEST:
            found.append((agreeing, tuple(output[end + 1 : end + 4])))
    return found
