"""Look-up: the automaton finds the longest ending that stood before, whatever the text, and proposes what followed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_kernels.lookup import MAX_CLASSES, Continuation, SuffixAutomaton

TEXTS = st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(0, size - 1), max_size=60))


@pytest.fixture(autouse=True)
def _kernels(exact_kernels: None) -> None:
    pass


def automaton_of(text: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    automaton.extend(text)
    return automaton


def occurrences(text: list[int], length: int) -> list[int]:
    """Last positions of the earlier places where the last `length` tokens stood."""
    ending = text[len(text) - length :]
    return [end for end in range(length - 1, len(text) - 1) if text[end + 1 - length : end + 1] == ending]


def looped(text: list[int], end: int, num_tokens: int) -> tuple[int, ...]:
    """What followed a place, where what is copied may itself be copied: the definition, one token at a time."""
    longer = list(text)
    for _ in range(num_tokens):
        end += 1
        longer.append(longer[end])
    return tuple(longer[len(text) :])


def test_worked_example_proposes_what_followed_the_longest_match() -> None:
    #       0  1  2  3  4  5  6  7
    text = [5, 1, 2, 7, 8, 9, 1, 2]
    found = automaton_of(text).continuations(max_tokens=3, max_continuations=4)
    assert found == [Continuation((7, 8, 9), 2)]


def test_of_equal_matches_the_recent_place_comes_before_the_first() -> None:
    text = [1, 2, 7, 3, 1, 2, 8, 4, 1, 2, 9, 5, 1, 2]
    found = automaton_of(text).continuations(max_tokens=1, max_continuations=4)
    assert found == [Continuation((9,), 2), Continuation((7,), 2)]


def test_a_shorter_match_with_another_continuation_comes_after_the_longer_one() -> None:
    text = [3, 1, 2, 7, 2, 8, 2, 9, 3, 1, 2]
    found = automaton_of(text).continuations(max_tokens=1, max_continuations=3)
    assert found[0] == Continuation((7,), 3)
    assert found[1] == Continuation((9,), 1), "the latest place of the shorter match"


def test_a_match_that_reaches_the_end_goes_on_as_a_loop() -> None:
    found = automaton_of([4, 1, 2, 1, 2]).continuations(max_tokens=5, max_continuations=1)
    assert found == [Continuation((1, 2, 1, 2, 1), 2)]


def test_a_token_never_seen_before_matches_nothing() -> None:
    automaton = automaton_of([1, 2, 3])
    assert automaton.match_length == 0
    assert automaton.continuations(max_tokens=4, max_continuations=4) == []


def test_an_empty_text_matches_nothing() -> None:
    assert SuffixAutomaton().continuations(max_tokens=4, max_continuations=4) == []


def test_a_match_shorter_than_asked_for_is_left_out() -> None:
    automaton = automaton_of([1, 2, 7, 1, 2])
    assert automaton.continuations(max_tokens=1, max_continuations=4, min_match=3) == []
    assert automaton.continuations(max_tokens=1, max_continuations=4, min_match=2) == [Continuation((7,), 2)]


@given(TEXTS)
def test_match_length_is_the_longest_ending_that_stood_before(text: list[int]) -> None:
    longest = max((length for length in range(1, len(text)) if occurrences(text, length)), default=0)
    assert automaton_of(text).match_length == longest


@given(TEXTS, st.integers(1, 8))
def test_every_continuation_followed_a_place_of_its_match(text: list[int], max_tokens: int) -> None:
    for found in automaton_of(text).continuations(max_tokens=max_tokens, max_continuations=2 * MAX_CLASSES):
        ends = occurrences(text, found.match_length)
        assert found.token_ids in {looped(text, end, max_tokens) for end in ends}


@given(TEXTS)
def test_the_longest_match_comes_first_and_asking_changes_nothing(text: list[int]) -> None:
    automaton = automaton_of(text)
    found = automaton.continuations(max_tokens=4, max_continuations=8)
    lengths = [one.match_length for one in found]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[:1] == [automaton.match_length][: len(lengths)]
    assert automaton.continuations(max_tokens=4, max_continuations=8) == found


@given(TEXTS, st.data())
def test_pieces_make_the_same_automaton_as_the_whole(text: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    pieces = automaton_of(text[:cut])
    pieces.extend(text[cut:])
    asked = {"max_tokens": 6, "max_continuations": 8}
    assert pieces.continuations(**asked) == automaton_of(text).continuations(**asked)
