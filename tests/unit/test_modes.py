"""Which drafters take part in a step."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream.drafting.modes import LONGEST_INTERVAL, TRIAL_STEPS, Mode, Modes

GOOD, BAD = 1.5, 0.7


def taken(modes: Modes, gains: Mapping[Mode, float], *, num_steps: int, num_requests: int = 1) -> list[Mode]:
    """The modes of so many steps, each noted with its gain."""
    chosen = []
    for _ in range(num_steps):
        has_chain = Mode.CHAIN in gains
        mode = modes.choose(num_requests, has_floor=Mode.FLOOR in gains, has_chain=has_chain)
        chosen.append(mode)
        if mode is not Mode.OFF:
            modes.note(mode, gains[mode], num_requests=num_requests)
    return chosen


def test_every_mode_is_tried_before_the_best_one_is_kept() -> None:
    chosen = taken(Modes(), {Mode.FLOOR: BAD, Mode.CHAIN: GOOD}, num_steps=300)
    assert set(chosen[:12]) == {Mode.FLOOR, Mode.CHAIN}
    assert chosen[12:].count(Mode.CHAIN) > 270


def test_plain_steps_are_seen_now_and_then_while_speculation_is_on() -> None:
    chosen = taken(Modes(), {Mode.FLOOR: GOOD}, num_steps=4 * LONGEST_INTERVAL)
    assert 3 <= chosen.count(Mode.OFF) <= 8


def test_speculation_is_off_where_nothing_gains_but_for_ever_rarer_trials_of_everything() -> None:
    modes = Modes()
    taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: BAD}, num_steps=3_000)
    chosen = taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: BAD}, num_steps=10 * LONGEST_INTERVAL)
    num_trials = len(chosen) - chosen.count(Mode.OFF)
    assert 8 * TRIAL_STEPS < num_trials <= 11 * TRIAL_STEPS
    assert {Mode.FLOOR, Mode.CHAIN} < set(chosen)


def test_a_mode_that_comes_to_gain_is_found_again() -> None:
    modes = Modes()
    taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: BAD}, num_steps=100)
    assert taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: GOOD}, num_steps=20 * LONGEST_INTERVAL)[-1] is Mode.CHAIN


def test_a_draft_that_never_drafts_does_not_hold_up_the_others() -> None:
    modes = Modes()
    for _ in range(2_000):
        mode = modes.choose(1, has_floor=True, has_chain=True)
        if mode is Mode.FLOOR:
            modes.note(mode, GOOD, num_requests=1)
    assert modes.counts[Mode.FLOOR] > 1_800


def test_a_mode_that_stops_to_gain_is_left() -> None:
    modes = Modes()
    taken(modes, {Mode.FLOOR: GOOD}, num_steps=50)
    assert taken(modes, {Mode.FLOOR: BAD}, num_steps=50)[-1] is Mode.OFF


def test_small_and_large_batches_are_told_apart() -> None:
    modes = Modes()
    taken(modes, {Mode.FLOOR: GOOD}, num_steps=40, num_requests=1)
    taken(modes, {Mode.FLOOR: BAD}, num_steps=40, num_requests=16)
    assert modes.choose(1, has_floor=True, has_chain=False) is Mode.FLOOR
    assert modes.choose(16, has_floor=True, has_chain=False) is Mode.OFF


def test_a_batch_of_a_size_not_seen_yet_begins_with_what_the_next_one_knows() -> None:
    modes = Modes()
    taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: BAD}, num_steps=40, num_requests=4)
    assert modes.choose(2, has_floor=True, has_chain=True) is Mode.FLOOR
    taken(modes, {Mode.FLOOR: BAD, Mode.CHAIN: GOOD}, num_steps=40, num_requests=64)
    assert modes.choose(32, has_floor=True, has_chain=True) is Mode.CHAIN, "not by what small batches know"


def test_a_replaced_draft_is_tried_at_once() -> None:
    modes = Modes()
    taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: BAD}, num_steps=40)
    modes.forget(Mode.CHAIN)
    assert taken(modes, {Mode.FLOOR: GOOD, Mode.CHAIN: GOOD}, num_steps=1) == [Mode.CHAIN]


def test_without_any_drafter_speculation_is_off() -> None:
    assert taken(Modes(), {}, num_steps=3) == [Mode.OFF] * 3
