"""The price of nodes, and what steps are told to the choice of modes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.drafting.drafter import Lesson, StepLoad
from slipstream.drafting.economy import LARGEST_BAR, REST_STEPS, Economy, Promise, Took
from slipstream.drafting.modes import CATCH_UP_STEPS, Mode, first_plain_steps, first_steps
from slipstream.drafting.step_cost import MeasuredSteps, StepCost

ROWS, CONTEXTS = (1, 2, 4, 8), (16,)
SECONDS = (1.0, 1.2, 1.6, 2.4)
BESIDE_S = 0.25


def economy() -> Economy:
    """Of a dense target: a step takes 1 s, and 0.2 s more for every row behind the first."""
    seconds, none = np.array([SECONDS]).T, np.zeros((len(ROWS), 1))
    return Economy(StepCost(MeasuredSteps(ROWS, CONTEXTS, seconds, seconds, none, none)))


def load(num_requests: int = 1, *, num_rows: int | None = None) -> StepLoad:
    return StepLoad(num_rows or num_requests, num_requests, 16.0)


def take(
    one: Economy,
    mode: Mode,
    *,
    num_steps: int,
    num_tokens: int,
    num_nodes: int = 0,
    promised_tokens: float | None = None,
    reading_s: float = 0.0,
) -> None:
    """Steps in a mode that take what is predicted, and give that unless something else was promised.

    In the last one, a draft model reads for so long.
    """
    for left in reversed(range(num_steps)):
        one.modes.choose = lambda *_, **__: mode  # type: ignore[method-assign]
        one.choose(load(), has_floor=True, has_chain=True)
        pass_s = 1.0 + 0.2 * num_nodes
        if mode is not Mode.OFF:
            drafted_tokens = num_tokens - 1 if promised_tokens is None else promised_tokens
            one.price(7)
            one.expect(num_nodes=num_nodes, drafted_tokens=drafted_tokens)
        own_reading_s = 0.0 if left else reading_s
        step_s = pass_s + BESIDE_S + own_reading_s
        one.settle(Took(step_s, pass_s, spared_s=0.0, num_tokens=num_tokens, is_usual=not own_reading_s))


def test_time_is_worth_the_tokens_a_second_of_plain_steps_at_least() -> None:
    one = economy()
    take(one, Mode.OFF, num_steps=30, num_tokens=1)
    one.choose(load(), has_floor=True, has_chain=False)
    price = one.price(7)
    assert price.token_rate == pytest.approx(1 / (1.0 + BESIDE_S))
    assert price.step_s == pytest.approx(1.0 + 0.2 * np.arange(8))
    assert price.min_survival == pytest.approx(0.2 * price.token_rate)


def test_time_is_worth_more_in_a_mode_that_gives_more() -> None:
    one = economy()
    take(one, Mode.OFF, num_steps=30, num_tokens=1)
    take(one, Mode.FLOOR, num_steps=200, num_tokens=3, num_nodes=4)
    gain = 3 * (1.0 + BESIDE_S) / (1.8 + BESIDE_S)
    assert one.modes.gain(Mode.FLOOR, num_requests=1) == pytest.approx(gain, rel=0.02)
    assert one.price(7).token_rate == pytest.approx(gain / (1.0 + BESIDE_S), rel=0.02)


def test_a_step_counts_as_what_was_promised_of_it_as_far_as_promises_are_kept() -> None:
    one = economy()
    take(one, Mode.OFF, num_steps=30, num_tokens=1)
    take(one, Mode.FLOOR, num_steps=400, num_tokens=2, num_nodes=4, promised_tokens=2.0)
    before = one.modes.gain(Mode.FLOOR, num_requests=1)
    assert before == pytest.approx(2 * (1.0 + BESIDE_S) / (1.8 + BESIDE_S), rel=0.05), "half of what was promised came"
    take(one, Mode.FLOOR, num_steps=1, num_tokens=8, num_nodes=4, promised_tokens=2.0)
    assert one.modes.gain(Mode.FLOOR, num_requests=1) == pytest.approx(before, rel=0.01), "one lucky step"


def test_plain_steps_that_nobody_learns_from_still_tell_the_pace() -> None:
    one = economy()
    take(one, Mode.OFF, num_steps=1, num_tokens=1)
    lesson = Lesson(np.zeros(1, np.int32), torch.zeros(1, 4), (), num_rows=1, seconds=1.0, expert_ids_TLK=None)
    one.observe(lesson, is_due=True)
    take(one, Mode.OFF, num_steps=1, num_tokens=1)
    for _ in range(60):
        one.choose(load(), has_floor=True, has_chain=True)
        one.settle(Took(2.0 + BESIDE_S, 2.0, spared_s=0.0, num_tokens=1, is_usual=True))
    assert 1.4 < one.price(0).step_s[0] <= 2.0


def test_the_newest_promises_count() -> None:
    promise = Promise(1_000.0)
    for expected, came in ((1.0, 0.0), (1.0, 1.0)):
        for _ in range(10_000):
            promise.observe(expected, came)
        assert promise.kept_share == pytest.approx(came, abs=0.001)
    promise.observe(5_000.0, 2_500.0)
    assert promise.kept_share == pytest.approx(0.5)


def test_the_bar_has_an_end() -> None:
    one = economy()
    take(one, Mode.FLOOR, num_steps=100, num_tokens=40)
    assert one.price(7).min_survival == LARGEST_BAR


def test_a_step_that_the_machine_interrupted_counts_hardly_more_than_others() -> None:
    one = economy()
    take(one, Mode.FLOOR, num_steps=100, num_tokens=2)
    before = one.modes.gain(Mode.FLOOR, num_requests=1)
    one.price(7)
    one.expect(num_nodes=0, drafted_tokens=1.0)
    one.settle(Took(1_000.0, 999.0, spared_s=0.0, num_tokens=2, is_usual=True))
    assert one.modes.gain(Mode.FLOOR, num_requests=1) > 0.99 * before


def test_a_mode_is_not_to_blame_for_a_machine_that_is_slower_for_a_while() -> None:
    def gain_after(num_steps: int) -> float:
        """In steps whose passes take a fifth longer than any prediction says, of which nothing is learned."""
        one = economy()
        one.step_cost.keep_pace = lambda *_, **__: None  # type: ignore[method-assign]
        take(one, Mode.OFF, num_steps=30, num_tokens=1)
        take(one, Mode.FLOOR, num_steps=100, num_tokens=3, num_nodes=4)
        for _ in range(num_steps):
            one.choose(load(), has_floor=True, has_chain=True)
            one.price(7)
            one.expect(num_nodes=4, drafted_tokens=2.0)
            one.settle(Took(1.2 * 1.8 + BESIDE_S, 1.2 * 1.8, spared_s=0.0, num_tokens=3, is_usual=True))
        return one.modes.gain(Mode.FLOOR, num_requests=1)

    usual, late = (3 * (1.0 + BESIDE_S) / (pass_s + BESIDE_S) for pass_s in (1.8, 1.2 * 1.8))
    assert gain_after(10) == pytest.approx(usual, rel=0.01)
    assert gain_after(1_500) == pytest.approx(late, rel=0.02), "what stays so is due to the mode"


def test_steps_that_read_prompts_and_those_in_which_nobody_can_draft_tell_nothing() -> None:
    one = economy()
    one.choose(load(num_rows=100), has_floor=True, has_chain=False)
    one.price(7)
    one.expect(num_nodes=0, drafted_tokens=0.0)
    one.settle(Took(9.0, 8.0, spared_s=0.0, num_tokens=1, is_usual=True))
    assert one.modes.gain(Mode.FLOOR, num_requests=1) == 1.0
    one.choose(load(), has_floor=False, has_chain=False)
    one.settle(Took(9.0, 8.0, spared_s=0.0, num_tokens=1, is_usual=True))
    assert one.modes.gain(Mode.OFF, num_requests=1) == 1.0


def chain_in_step() -> Economy:
    """One whose draft model has read all texts: its steps give two tokens and take as long as plain ones."""
    one = economy()
    take(one, Mode.OFF, num_steps=30, num_tokens=1)
    take(one, Mode.CHAIN, num_steps=1, num_tokens=2, reading_s=100.0)
    take(one, Mode.CHAIN, num_steps=50, num_tokens=2)
    before = one.modes.gain(Mode.CHAIN, num_requests=1)
    assert before == pytest.approx(2.0), "what it read at first was due to the switch"
    return one


def test_what_a_new_draft_reads_first_tells_nothing() -> None:
    one = chain_in_step()
    one.forget(Mode.CHAIN)
    take(one, Mode.CHAIN, num_steps=1, num_tokens=2, reading_s=50.0)
    take(one, Mode.CHAIN, num_steps=1, num_tokens=2)
    assert one.modes.gain(Mode.CHAIN, num_requests=1) == pytest.approx(2.0)


def test_reading_texts_counts_unless_the_mode_was_chosen_just_now() -> None:
    one, plain_s = chain_in_step(), 1.0 + BESIDE_S
    take(one, Mode.CHAIN, num_steps=50, num_tokens=2, reading_s=30 * plain_s)
    after = one.modes.gain(Mode.CHAIN, num_requests=1)
    assert after == pytest.approx(200 / 130, rel=0.05), "a long text took thirty plain steps"


def test_a_mode_whose_draft_reads_new_texts_in_every_step_is_judged_all_the_same() -> None:
    one = economy()
    take(one, Mode.OFF, num_steps=30, num_tokens=1)
    for _ in range(CATCH_UP_STEPS):
        take(one, Mode.CHAIN, num_steps=1, num_tokens=2, reading_s=1.0 + BESIDE_S)
        assert one.modes.gain(Mode.CHAIN, num_requests=1) == 1.0, "it may still be the switch"
    take(one, Mode.CHAIN, num_steps=1, num_tokens=4, reading_s=1.0 + BESIDE_S)
    assert one.modes.gain(Mode.CHAIN, num_requests=1) == pytest.approx(2.0, rel=0.2)


def test_plain_steps_cost_what_they_cost_while_nobody_asks() -> None:
    one, spared_s = economy(), 0.5
    for mode, num_tokens in ((Mode.OFF, 1), (Mode.FLOOR, 2)):
        one.modes.choose = lambda *_, mode=mode, **__: mode  # type: ignore[method-assign]
        for _ in range(60):
            one.choose(load(), has_floor=True, has_chain=False)
            one.price(7)
            one.expect(num_nodes=0, drafted_tokens=num_tokens - 1)
            one.settle(Took(1.0 + BESIDE_S + spared_s, 1.0, spared_s=spared_s, num_tokens=num_tokens, is_usual=True))
    assert one.modes.gain(Mode.OFF, num_requests=1) == pytest.approx(1.0)
    drafting_s = 1.0 + BESIDE_S + spared_s
    assert one.modes.gain(Mode.FLOOR, num_requests=1) == pytest.approx(2 * (1.0 + BESIDE_S) / drafting_s)


def test_it_rests_only_while_speculation_is_off_and_nothing_is_tried() -> None:
    seen = set[tuple[bool, bool]]()
    for num_drafted in (0, 3):
        one = economy()
        for _ in range(800):
            mode = one.choose(load(), has_floor=True, has_chain=False)
            if mode is not Mode.OFF:
                one.price(7)
                one.expect(num_nodes=4, drafted_tokens=num_drafted)
            pass_s, num_tokens = (1.8, 1 + num_drafted) if mode is Mode.FLOOR else (1.0, 1)
            one.settle(Took(pass_s + BESIDE_S, pass_s, spared_s=0.0, num_tokens=num_tokens, is_usual=True))
            is_off = mode is Mode.OFF and not one.modes.is_trying
            assert one.rest() == (REST_STEPS if is_off else 0)
            seen.add((mode is Mode.OFF, one.modes.is_trying))
        one.choose(load(), has_floor=False, has_chain=False)
        assert one.rest() == 0, "the next step may draft"
    assert seen == {(True, False), (True, True), (False, False), (False, True)}


def test_without_a_drafter_it_is_off_and_nothing_is_tried() -> None:
    one = economy()
    assert {one.choose(load(), has_floor=False, has_chain=False) for _ in range(2 * first_steps(1))} == {Mode.OFF}
    assert not one.modes.is_trying


def test_plain_steps_that_tell_nothing_are_not_waited_for() -> None:
    one, num_plain = economy(), 2 * first_plain_steps(1) + CATCH_UP_STEPS
    chosen = [one.choose(load(num_rows=100), has_floor=True, has_chain=False) for _ in range(num_plain + 1)]
    assert chosen == [Mode.OFF] * num_plain + [Mode.FLOOR]


def test_a_new_draft_is_judged_by_its_own_time_and_promises() -> None:
    one = economy()
    take(one, Mode.OFF, num_steps=30, num_tokens=1)
    take(one, Mode.CHAIN, num_steps=500, num_tokens=1, promised_tokens=4.0)
    one.forget(Mode.CHAIN)
    take(one, Mode.CHAIN, num_steps=30, num_tokens=5, promised_tokens=4.0)
    assert one.modes.gain(Mode.CHAIN, num_requests=1) == pytest.approx(5.0, rel=0.1)
