"""Which drafters take part in a step."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from slipstream.drafting.modes import (
    CATCH_UP_STEPS,
    FIRST_TRIAL_COST_RATIO,
    SHORTEST_INTERVAL,
    TRIAL_COST_RATIO,
    Mode,
    Modes,
    first_plain_steps,
    first_steps,
    trial_steps,
)

GOOD, BAD = 1.5, 0.7


def note(modes: Modes, mode: Mode, gain: float, *, num_requests: int = 1) -> None:
    """A step of two tokens a request that took as long as it must for this gain."""
    modes.note(mode, num_requests=num_requests, num_tokens=2 * num_requests, plain_steps=2 / gain)


def taken(modes: Modes, gains: Mapping[Mode, float], *, num_steps: int, num_requests: int = 1) -> list[Mode]:
    """The modes of so many steps, each noted with its gain."""
    chosen = []
    for _ in range(num_steps):
        has_chain = Mode.CHAIN in gains
        mode = modes.choose(num_requests, has_floor=Mode.FLOOR in gains, has_chain=has_chain)
        chosen.append(mode)
        note(modes, mode, gains.get(mode, 1.0), num_requests=num_requests)
    return chosen


def begun() -> Modes:
    """One that knows what plain steps take, whatever the size of the batch."""
    modes = Modes()
    for num_requests in (1, 2, 4, 8, 16):
        taken(modes, {}, num_steps=first_plain_steps(num_requests.bit_length()), num_requests=num_requests)
    return modes


def test_every_size_of_the_batch_begins_with_plain_steps() -> None:
    modes = Modes()
    for num_requests, num_plain in ((1, 4), (16, 2)):
        chosen = taken(modes, {Mode.FLOOR: GOOD}, num_steps=num_plain + 1, num_requests=num_requests)
        assert chosen == [Mode.OFF] * num_plain + [Mode.FLOOR]
        assert modes.is_trying


def test_every_mode_is_tried_before_the_best_one_is_kept() -> None:
    chosen = taken(begun(), {Mode.FLOOR: BAD, Mode.CHAIN: GOOD}, num_steps=350)
    assert chosen[: 2 * first_steps(1)] == [Mode.FLOOR] * first_steps(1) + [Mode.CHAIN] * first_steps(1)
    assert chosen[2 * first_steps(1) :].count(Mode.CHAIN) > 200


def test_plain_steps_are_seen_now_and_then_while_speculation_is_on() -> None:
    chosen = taken(begun(), {Mode.FLOOR: GOOD}, num_steps=3_000)
    assert 10 <= chosen.count(Mode.OFF) <= 3_000 / SHORTEST_INTERVAL


def test_speculation_is_off_where_nothing_gains_and_trials_cost_a_small_share() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: 0.9}, num_steps=500)
    chosen = taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: 0.9}, num_steps=20_000)
    lost = chosen.count(Mode.FLOOR) * (1 - BAD) + chosen.count(Mode.CHAIN) * (1 - 0.9)
    assert 0 < lost <= 2 * TRIAL_COST_RATIO * len(chosen) * 1.1
    assert chosen.count(Mode.CHAIN) > 2 * chosen.count(Mode.FLOOR), "what loses less is tried more often"


def test_steps_that_nobody_asks_about_bring_the_next_trial_nearer() -> None:
    modes = begun()
    chosen = taken(modes, {Mode.FLOOR: BAD}, num_steps=first_steps(1) + 2)
    assert chosen[-1] is Mode.OFF
    assert not modes.is_trying
    num_off = modes.counts[Mode.OFF]
    num_rested = int(first_steps(1) / FIRST_TRIAL_COST_RATIO)
    modes.rest(1, num_rested)
    assert modes.counts[Mode.OFF] == num_off + num_rested
    taken(modes, {Mode.FLOOR: BAD}, num_steps=1)
    assert modes.is_trying


def test_what_catching_up_costs_a_trial_makes_it_rarer() -> None:
    def num_trials(extra: float) -> int:
        modes, number, before = begun(), 0, Mode.FLOOR
        for _ in range(10_000):
            mode = modes.choose(1, has_floor=True, has_chain=True)
            if mode is Mode.CHAIN and before is not mode:
                number += 1
                modes.note_switch(mode, num_requests=1, num_tokens=0.0, plain_steps=extra)
            note(modes, mode, {Mode.FLOOR: GOOD, Mode.CHAIN: 1.4}.get(mode, 1.0))
            before = mode
        return number

    assert num_trials(0.0) > 5 * num_trials(10.0) > 0


@pytest.mark.parametrize(("gain", "extra", "num_least"), [(0.95, 0.0, 47), (0.8, 0.0, 950), (0.95, 10.0, 1_000)])
def test_what_first_steps_cost_puts_off_the_first_trial(gain: float, extra: float, num_least: int) -> None:
    modes = begun()
    modes.choose(1, has_floor=True, has_chain=False)
    modes.note_switch(Mode.FLOOR, num_requests=1, num_tokens=0.0, plain_steps=extra)
    chosen = taken(modes, {Mode.FLOOR: gain}, num_steps=first_steps(1) + 5 * num_least)[first_steps(1) :]
    assert num_least <= chosen.index(Mode.FLOOR)


def test_what_first_steps_cost_counts_where_a_trial_of_another_size_ends() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: BAD}, num_steps=2 * first_steps(2), num_requests=2)
    for _ in range(first_steps(1)):
        modes.note(Mode.FLOOR, num_requests=1, num_tokens=2, plain_steps=2 / BAD)
    while not modes.is_trying:
        taken(modes, {Mode.FLOOR: BAD}, num_steps=1, num_requests=2)
    chosen = taken(modes, {Mode.FLOOR: BAD}, num_steps=1_000)
    after = chosen[chosen.index(Mode.OFF) :]
    assert Mode.FLOOR not in after, "64 first steps that lost 0.3 each put off the next ones by 1,900"


def test_two_modes_that_are_nearly_as_good_are_compared_again_and_again() -> None:
    chosen = taken(begun(), {Mode.FLOOR: 1.40, Mode.CHAIN: 1.41}, num_steps=2_000)
    assert min(chosen[2 * first_steps(1) :].count(mode) for mode in (Mode.FLOOR, Mode.CHAIN)) > 100


def test_a_mode_that_comes_to_gain_is_found_again() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: BAD}, num_steps=100)
    assert taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: GOOD}, num_steps=5_000)[-1] is Mode.CHAIN


def test_a_draft_that_never_drafts_does_not_hold_up_the_others() -> None:
    modes = begun()
    for _ in range(2_000):
        mode = modes.choose(1, has_floor=True, has_chain=True)
        if mode is Mode.FLOOR:
            note(modes, mode, GOOD)
    assert modes.counts[Mode.FLOOR] > 1_700


def test_the_mode_that_lost_least_in_its_first_steps_is_tried_first() -> None:
    for gains in ({Mode.FLOOR: BAD, Mode.CHAIN: 0.95}, {Mode.FLOOR: 0.95, Mode.CHAIN: BAD}):
        chosen = taken(begun(), gains, num_steps=2 * first_steps(1) + 600)[2 * first_steps(1) :]
        assert next(mode for mode in chosen if mode is not Mode.OFF) is max(gains, key=gains.__getitem__)


def test_a_mode_that_stops_to_gain_is_left() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: GOOD}, num_steps=50)
    assert taken(modes, {Mode.FLOOR: BAD}, num_steps=100)[-1] is Mode.OFF


def test_a_trial_that_does_better_goes_on_until_it_has_convinced() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: 1.2}, num_steps=2 * first_steps(1))
    chosen = taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: 1.2}, num_steps=6_000)
    first = chosen.index(Mode.FLOOR)
    assert chosen[first : first + trial_steps(1, Mode.FLOOR) + 1] == [Mode.FLOOR] * (trial_steps(1, Mode.FLOOR) + 1)
    assert chosen[first : first + 4 * trial_steps(1, Mode.FLOOR)].count(Mode.FLOOR) > trial_steps(1, Mode.FLOOR)
    assert chosen[-1] is Mode.FLOOR


def test_large_batches_tell_more_in_a_step_and_get_fewer() -> None:
    chosen = taken(begun(), {Mode.FLOOR: BAD, Mode.CHAIN: BAD}, num_steps=40, num_requests=16)
    assert chosen.count(Mode.FLOOR) == chosen.count(Mode.CHAIN) == first_steps(5)


def test_speculation_that_gains_next_to_nothing_is_off_once_that_is_known() -> None:
    assert taken(begun(), {Mode.FLOOR: 1.01}, num_steps=4_000)[-1] is Mode.OFF


@pytest.mark.parametrize("num_requests", [1, 4])
def test_what_seems_to_lose_little_goes_on_until_that_is_known_and_costs_few_steps(num_requests: int) -> None:
    def num_at_first(gain: float) -> int:
        return taken(begun(), {Mode.FLOOR: gain}, num_steps=400, num_requests=num_requests).index(Mode.OFF)

    assert num_at_first(BAD) == first_steps(num_requests.bit_length())
    assert num_at_first(0.98) > num_at_first(0.96) >= num_at_first(BAD)
    assert num_at_first(0.98) * (1 - 0.98) < 4


def test_the_gain_of_a_mode_is_of_sums_not_of_steps() -> None:
    modes = begun()
    for num_tokens, plain_steps in ((1, 1.0), (5, 2.0)) * 200:
        modes.note(Mode.FLOOR, num_requests=1, num_tokens=num_tokens, plain_steps=plain_steps)
    assert modes.gain(Mode.FLOOR, num_requests=1) == pytest.approx(2.0, rel=0.02)
    assert modes.gain(Mode.CHAIN, num_requests=1) == 1.0


def test_small_and_large_batches_are_told_apart() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: GOOD}, num_steps=2 * first_steps(1), num_requests=1)
    taken(modes, {Mode.FLOOR: BAD}, num_steps=2 * first_steps(1), num_requests=16)
    assert modes.choose(1, has_floor=True, has_chain=False) is Mode.FLOOR
    assert modes.choose(16, has_floor=True, has_chain=False) is Mode.OFF


def test_every_size_of_the_batch_is_judged_by_its_own_steps() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: BAD}, num_steps=2 * first_steps(1), num_requests=4)
    chosen = taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: GOOD}, num_steps=3 * first_steps(2), num_requests=2)
    assert chosen[: 2 * first_steps(2)].count(Mode.CHAIN) == first_steps(2)
    assert chosen[-1] is Mode.CHAIN


def test_what_loses_with_fewer_requests_is_left_to_trials_with_more() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: BAD}, num_steps=2 * first_steps(2), num_requests=2)
    chosen = taken(modes, {Mode.FLOOR: GOOD}, num_steps=10 * SHORTEST_INTERVAL, num_requests=16)
    assert chosen[: SHORTEST_INTERVAL - 1] == [Mode.OFF] * (SHORTEST_INTERVAL - 1)
    assert chosen[-SHORTEST_INTERVAL:].count(Mode.FLOOR) > SHORTEST_INTERVAL // 2, "it is found to gain all the same"


def test_what_gains_with_fewer_requests_has_first_steps_with_more() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: GOOD}, num_steps=2 * first_steps(2), num_requests=2)
    chosen = taken(modes, {Mode.FLOOR: BAD}, num_steps=first_steps(5) + 1, num_requests=16)
    assert chosen == [Mode.FLOOR] * first_steps(5) + [Mode.OFF]


def test_a_replaced_draft_is_tried_at_once() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: BAD}, num_steps=2 * first_steps(1))
    modes.forget(Mode.CHAIN)
    assert taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: GOOD}, num_steps=1) == [Mode.CHAIN]


def test_a_draft_replaced_in_the_middle_of_a_trial_begins_with_first_steps_of_its_own() -> None:
    modes = begun()
    taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: 1.4}, num_steps=2 * first_steps(1) + 1)
    while not modes.is_trying:
        taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: 1.4}, num_steps=1)
    modes.forget(Mode.CHAIN)
    assert not modes.is_trying
    chosen = taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: 1.4}, num_steps=first_steps(1))
    assert set(chosen) == {Mode.CHAIN}


def test_a_switch_costs_its_time_beyond_what_the_best_mode_takes_for_its_tokens() -> None:
    def steps_until_a_trial(num_tokens: float) -> int:
        modes = begun()
        taken(modes, {Mode.FLOOR: GOOD}, num_steps=first_steps(1))
        modes.choose(1, has_floor=True, has_chain=True)
        modes.note_switch(Mode.CHAIN, num_requests=1, num_tokens=num_tokens, plain_steps=6.0)
        chosen = taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: 1.43}, num_steps=2_000)[first_steps(1) :]
        return chosen.index(Mode.CHAIN)

    sooner, later = (steps_until_a_trial(num_tokens) for num_tokens in (6.0 * GOOD, 3.0))
    assert later - sooner >= 4.0 / FIRST_TRIAL_COST_RATIO - SHORTEST_INTERVAL


def num_switches(*, cost: float, num_alone: int, num_rounds: int) -> int:
    """To the draft model, which gains for one request and loses for 16, as 15 of them come and go."""
    modes = begun()
    few, many = {Mode.CHAIN: GOOD}, {Mode.CHAIN: BAD}
    taken(modes, few, num_steps=first_steps(1))
    taken(modes, many, num_steps=first_steps(5) + 1, num_requests=16)
    taken(modes, {}, num_steps=CATCH_UP_STEPS, num_requests=16)
    modes.note_switch(Mode.CHAIN, num_requests=1, num_tokens=0.0, plain_steps=cost)
    number = 0
    for _ in range(num_rounds):
        number += Mode.CHAIN in taken(modes, few, num_steps=num_alone)
        taken(modes, many, num_steps=10, num_requests=16)
    return number


def test_a_batch_that_shrinks_for_a_while_does_not_pay_for_a_switch_each_time() -> None:
    assert num_switches(cost=0.0, num_alone=6, num_rounds=10) == 10
    # Six steps without the draft model lose two plain steps, sixty lose twenty.
    assert num_switches(cost=8.5, num_alone=6, num_rounds=10) == 0
    assert num_switches(cost=8.5, num_alone=60, num_rounds=10) == 10


def waiting(*, cost: float, gain: float = GOOD) -> Modes:
    """One in which the draft model gains for one request, and has not drafted for long."""
    modes = begun()
    taken(modes, {Mode.CHAIN: gain}, num_steps=2 * first_steps(1))
    taken(modes, {}, num_steps=100, num_requests=16)
    modes.note_switch(Mode.CHAIN, num_requests=1, num_tokens=0.0, plain_steps=cost)
    return modes


def test_what_gains_for_long_is_switched_to_once_it_would_have_paid() -> None:
    chosen = taken(waiting(cost=8.5), {Mode.CHAIN: GOOD}, num_steps=40)
    num_off = chosen.index(Mode.CHAIN)
    assert 22 <= num_off <= 27, "each of them loses a third"
    assert chosen[num_off:] == [Mode.CHAIN] * (40 - num_off)


def test_steps_that_nobody_asks_about_bring_a_switch_nearer() -> None:
    modes = waiting(cost=8.5)
    assert taken(modes, {Mode.CHAIN: GOOD}, num_steps=1) == [Mode.OFF]
    modes.rest(1, 25)
    assert taken(modes, {Mode.CHAIN: GOOD}, num_steps=1) == [Mode.CHAIN]


def test_what_drafted_a_few_steps_ago_has_nothing_to_catch_up_with() -> None:
    modes = begun()
    modes.note_switch(Mode.CHAIN, num_requests=1, num_tokens=0.0, plain_steps=8.5)
    assert taken(modes, {Mode.CHAIN: GOOD}, num_steps=first_steps(1) + 1)[-1] is Mode.CHAIN, "after its first steps"
    taken(modes, {}, num_steps=CATCH_UP_STEPS - 1)
    assert taken(modes, {Mode.CHAIN: GOOD}, num_steps=1) == [Mode.CHAIN], "after a few steps without it"
    taken(modes, {}, num_steps=CATCH_UP_STEPS)
    assert taken(modes, {Mode.CHAIN: GOOD}, num_steps=1) == [Mode.OFF]


def test_a_mode_that_is_waited_for_is_tried_meanwhile() -> None:
    modes = waiting(cost=8.5, gain=1.06)
    chosen = taken(modes, {Mode.CHAIN: GOOD}, num_steps=3_000)
    assert Mode.CHAIN in chosen[:2_000], "before doing without it has cost as much, as it gains 0.04 that are known of"
    assert chosen[-1] is Mode.CHAIN


def test_a_cheap_switch_hardly_makes_the_costly_one_forgotten() -> None:
    modes = waiting(cost=8.5)
    modes.note_switch(Mode.CHAIN, num_requests=1, num_tokens=0.0, plain_steps=0.1)
    assert taken(modes, {Mode.CHAIN: GOOD}, num_steps=15) == [Mode.OFF] * 15


def test_what_does_not_pay_with_fewer_requests_waits_until_a_trial_is_a_hundredth_of_all_steps() -> None:
    for cost in (0.0, 5.0):
        modes = begun()
        taken(modes, {Mode.CHAIN: 1.0}, num_steps=2 * first_steps(2), num_requests=2)
        modes.note_switch(Mode.CHAIN, num_requests=2, num_tokens=0.0, plain_steps=cost)
        chosen = taken(modes, {Mode.CHAIN: 1.0}, num_steps=700, num_requests=16)
        assert chosen.index(Mode.CHAIN) >= max(cost / FIRST_TRIAL_COST_RATIO, SHORTEST_INTERVAL)


def test_plain_steps_are_tried_soon_as_one_costs_little() -> None:
    chosen = taken(begun(), {Mode.FLOOR: GOOD}, num_steps=2 * first_steps(1) + SHORTEST_INTERVAL)
    assert Mode.OFF in chosen


def test_a_trial_that_ends_at_another_size_is_over_at_its_own() -> None:
    modes = begun()
    for num_requests in (1, 2):
        taken(modes, {Mode.FLOOR: BAD}, num_steps=first_steps(1) + 1, num_requests=num_requests)
    modes.rest(1, 4_096)
    while not modes.is_trying:
        taken(modes, {Mode.FLOOR: BAD}, num_steps=1)
    taken(modes, {Mode.FLOOR: BAD}, num_steps=20, num_requests=2)
    assert not modes.is_trying
    assert taken(modes, {Mode.FLOOR: BAD}, num_steps=SHORTEST_INTERVAL) == [Mode.OFF] * SHORTEST_INTERVAL


def test_without_any_drafter_speculation_is_off() -> None:
    assert taken(Modes(), {}, num_steps=3) == [Mode.OFF] * 3
