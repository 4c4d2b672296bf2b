"""What the benchmark of drafting adds up: loops, ratios with bounds, ceilings, and the best fixed setting."""

from __future__ import annotations

import random

import pytest

from benchmarks.drafting_figures import (
    LONGEST_PERIOD,
    ceiling,
    is_loop,
    over_best_fixed,
    ratio_bounds,
    spread,
    time_ratio,
)


def test_an_answer_that_ends_in_one_token_over_and_over_is_a_loop_from_sixteen_times_on() -> None:
    assert is_loop([5, 6, 7] + [9] * 16)
    assert not is_loop([5, 6, 7] + [9] * 15)


@pytest.mark.parametrize("period", [6, 11, LONGEST_PERIOD])
def test_three_turns_of_a_period_are_a_loop_and_fewer_are_not(period: int) -> None:
    turn = list(range(100, 100 + period))
    assert is_loop([1, 2, *turn * 3])
    assert not is_loop([1, 2, *(turn * 3)[1:]])


def test_a_loop_that_was_left_again_or_has_a_longer_period_is_none() -> None:
    assert not is_loop([9] * 40 + [1])
    assert not is_loop(list(range(LONGEST_PERIOD + 1)) * 3)


def test_text_without_order_is_no_loop_and_neither_is_nothing() -> None:
    chance = random.Random(0)
    assert not any(is_loop([chance.randrange(50) for _ in range(96)]) for _ in range(200))
    assert not is_loop([])


def test_a_ratio_is_that_of_the_summed_times_and_lies_within_its_bounds() -> None:
    plain, system = [2.0, 4.0, 6.0, 4.0], [1.0, 4.0, 2.0, 1.0]
    assert time_ratio(plain, system) == 2.0
    low, high = ratio_bounds(plain, system)
    assert low < 2.0 < high
    assert (low, high) == ratio_bounds(plain, system)


def test_bounds_of_a_system_that_is_always_twice_as_fast_are_two_whatever_the_groups_took() -> None:
    plain = [1.0, 10.0, 3.0, 0.5]
    assert ratio_bounds(plain, [one / 2 for one in plain]) == (2.0, 2.0)


@pytest.mark.parametrize("pair", [([1.0], [1.0, 2.0]), ([], [])])
def test_times_that_are_no_pairs_are_refused(pair: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="a pair for every group"):
        time_ratio(*pair)
    with pytest.raises(ValueError, match="a pair for every group"):
        ratio_bounds(*pair)


def test_the_ceiling_is_tokens_per_call_over_the_cost_of_a_pass() -> None:
    # 100 tokens: plain 100 passes of 1 ms; 2 tokens a call at cost 1.25; 4 tokens a call at cost 3.2.
    name, reach = ceiling([0.100], {"two": [50 * 0.00125], "four": [25 * 0.0032]})
    assert name == "two"
    assert reach == pytest.approx(2 / 1.25)


def test_where_no_setting_pays_the_ceiling_is_plain_decoding() -> None:
    assert ceiling([1.0, 1.0], {"slow": [2.0, 0.5]}) == ("plain", 1.0)
    assert ceiling([1.0], {}) == ("plain", 1.0)


def test_the_best_fixed_setting_is_chosen_on_one_half_and_compared_on_the_other() -> None:
    # "luck" is best in even groups alone: chosen there, it is compared in the odd ones, where it is slow.
    fixed = {"luck": [1.0, 9.0, 1.0, 9.0], "steady": [4.0, 4.0, 4.0, 4.0]}
    ratio, chosen = over_best_fixed(fixed, [2.0, 2.0, 2.0, 2.0])
    assert chosen == ("luck", "steady")
    assert ratio == pytest.approx((9.0 + 9.0 + 4.0 + 4.0) / 8.0)


def test_a_single_group_is_compared_with_what_is_best_in_it() -> None:
    assert over_best_fixed({"a": [3.0], "b": [2.0]}, [4.0]) == (0.5, ("b", "b"))


def test_times_that_are_all_the_same_have_no_spread_and_slow_ones_are_off_by_a_share_of_themselves() -> None:
    assert spread([3.0, 3.0, 3.0]) == 0.0
    assert spread([1.0, 2.0, 4.0]) == pytest.approx((1.0 + 0.0 + 0.5) / 3)
