"""Acceptance rate, length and per position, by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slipstream.acceptance import AcceptanceCounts, acceptance_length, acceptance_rate, count
from slipstream.records import Round


def passed(num_proposed: int, num_accepted: int) -> Round:
    return Round(start=0, draft_version=1, proposed=tuple(range(num_proposed)), num_accepted=num_accepted)


def test_counts_rate_and_length_of_four_passes_by_hand() -> None:
    counts = count([passed(4, 4), passed(4, 1), passed(2, 0), passed(0, 0)])
    assert counts == AcceptanceCounts(4, 10, 5, (2, 1, 1, 1))
    assert acceptance_rate(counts) == 0.5
    assert acceptance_length(counts) == 2.25


def test_nothing_counted_is_rate_zero_and_length_one() -> None:
    assert count([]) == AcceptanceCounts()
    assert acceptance_rate(AcceptanceCounts()) == 0.0
    assert acceptance_length(AcceptanceCounts()) == 1.0


def test_a_pass_without_a_draft_lowers_the_length_and_not_the_rate() -> None:
    drafted, mixed = count([passed(2, 2)]), count([passed(2, 2), passed(0, 0)])
    assert acceptance_rate(drafted) == acceptance_rate(mixed) == 1.0
    assert (acceptance_length(drafted), acceptance_length(mixed)) == (3.0, 2.0)


PASSES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)).map(lambda pair: passed(max(pair), min(pair))))


@given(passes=PASSES)
def test_positions_add_up_to_the_accepted_and_never_rise(passes: list[Round]) -> None:
    counts = count(passes)
    assert sum(counts.accepted_per_position) == counts.num_accepted
    assert list(counts.accepted_per_position) == sorted(counts.accepted_per_position, reverse=True)
    assert counts.num_accepted <= counts.num_proposed
    assert counts.num_passes == len(passes)
