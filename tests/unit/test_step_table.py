"""A table of seconds that follows what steps took, most where little is known."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.drafting.step_table import StepTable

ROWS, CONTEXTS = (1, 2, 4, 8), (16, 1024)
SECONDS = np.array([[1.0, 2.0], [1.2, 2.2], [1.6, 2.6], [3.0, 4.0]])


def table() -> StepTable:
    return StepTable(ROWS, CONTEXTS, SECONDS, errors_s_GC=SECONDS)


def see(one: StepTable, num_rows: int, seconds: float, *, times: int = 1, context: float = 16) -> None:
    for _ in range(times):
        expected_s = one.at(num_rows, context)
        one.correct(num_rows, context, expected_s=expected_s, error_s=seconds / one.pace - expected_s)


def test_lines_between_points_are_straight_and_level_outside() -> None:
    one = table()
    assert one.at(3, 16) == pytest.approx(1.4)
    assert one.at(3, 520) == pytest.approx(1.9)
    assert one.at(99, 9999) == pytest.approx(4.0)
    assert one.line(520).tolist() == pytest.approx([1.5, 1.7, 2.1, 3.5])


def test_what_was_not_seen_for_long_follows_a_single_step_more() -> None:
    one = table()
    see(one, 1, 1.0, times=100)
    see(one, 1, 1.1)
    often = one.at(1, 16) - 1.0
    see(one, 8, one.at(8, 16), times=100)
    before = one.at(1, 16)
    see(one, 1, before + 0.1)
    assert one.at(1, 16) - before > 2 * often > 0


def test_neighbours_follow_the_more_the_nearer_they_are() -> None:
    one = table()
    see(one, 8, 4.5, times=20)
    moved = [one.at(rows, 16) / before for rows, before in zip(ROWS, SECONDS[:, 0].tolist(), strict=True)]
    assert moved == sorted(moved)
    assert moved[-1] == pytest.approx(1.5, abs=0.03)
    assert 1.1 < moved[0] < 1.3


def test_where_every_size_is_seen_the_table_is_what_steps_take() -> None:
    one, rng = table(), np.random.default_rng(1)
    truth = StepTable(ROWS, CONTEXTS, SECONDS[::-1] + 1.0, errors_s_GC=SECONDS)
    for _ in range(2_000):
        num_rows, context = int(rng.integers(1, 9)), float(rng.uniform(16, 1024))
        see(one, num_rows, truth.at(num_rows, context) * rng.normal(1, 0.03), context=context)
    for rows in ROWS:
        assert one.at(rows, 500) * one.pace == pytest.approx(truth.at(rows, 500), rel=0.06)


def test_points_that_experts_took_all_seconds_from_follow_like_the_rest() -> None:
    one, of_experts_s = table(), 1.6
    one.lower(np.full(len(ROWS), 10.0))
    assert one.at(4, 16) == pytest.approx(0.0, abs=1e-6)
    for _ in range(30):
        expected_s = one.at(4, 16) + of_experts_s
        one.correct(4, 16, expected_s=expected_s, error_s=2.0 / one.pace - expected_s)
    assert (one.at(4, 16) + of_experts_s) * one.pace == pytest.approx(2.0, rel=0.02)
    assert one.at(8, 16) < 1.0


def test_the_first_steps_of_a_size_correct_the_table_and_later_ones_the_pace() -> None:
    one = table()
    see(one, 4, 2.0, times=3)
    assert one.pace == pytest.approx(1.0, abs=0.05)
    assert one.at(4, 16) == pytest.approx(2.0, rel=0.05)
    before = one.at(4, 16)
    see(one, 4, 2.0, times=100)
    see(one, 4, 3.0, times=3)
    assert one.pace > 1.15
    assert one.at(4, 16) < 1.2 * before
    shares = one.pace_line(16)
    assert int(shares.argmax()) == ROWS.index(4)


@pytest.mark.parametrize(("rows", "contexts"), [((), (1,)), ((1,), ()), ((1, 1), (1,)), ((1, 2), (5, 4))])
def test_points_out_of_order_are_refused(rows: tuple[int, ...], contexts: tuple[int, ...]) -> None:
    seconds = np.ones((len(rows), len(contexts)))
    with pytest.raises(ValueError, match="ascending"):
        StepTable(rows, contexts, seconds, errors_s_GC=seconds)
