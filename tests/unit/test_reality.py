"""What came of steps beside what was expected."""

from __future__ import annotations

import pytest

from slipstream.drafting.modes import Mode
from slipstream.drafting.reality import Reality


def after(*, num_steps: int, num_tokens: int = 2, seconds: float = 1.0) -> float:
    """The ratio after so many steps of which 2 tokens in 1 s were expected."""
    reality = Reality()
    for _ in range(num_steps):
        reality.begin()
        reality.expect(1, num_tokens=2.0, seconds=1.0)
        reality.came(Mode.FLOOR, 1, num_tokens=num_tokens, seconds=seconds, beside_s=0.0)
    return reality.ratio(Mode.FLOOR)


def test_nothing_is_held_against_what_went_as_expected_or_was_not_seen() -> None:
    assert Reality().ratio(Mode.CHAIN) == 1.0
    assert after(num_steps=500) == pytest.approx(1.0, abs=1e-3)
    assert after(num_steps=500, num_tokens=4) == 1.0, "no credit"


def test_fewer_tokens_and_longer_steps_are_held_against_a_mode() -> None:
    assert after(num_steps=500, num_tokens=1) == pytest.approx(0.5, abs=0.01)
    assert after(num_steps=500, seconds=1.25) == pytest.approx(0.8, abs=0.01)
    assert after(num_steps=5, num_tokens=1) > 0.85, "a few steps say little"


def test_one_interrupted_step_says_little() -> None:
    assert after(num_steps=1, seconds=1_000.0) > 0.95


def test_a_step_of_which_nothing_was_expected_does_not_count() -> None:
    reality = Reality()
    reality.expect(1, num_tokens=2.0, seconds=1.0)
    reality.begin()
    reality.came(Mode.FLOOR, 1, num_tokens=0, seconds=9.0, beside_s=0.0)
    assert reality.ratio(Mode.FLOOR) == 1.0


def test_what_drafting_spends_is_what_its_steps_take_more_beside_their_pass() -> None:
    reality = Reality()
    for mode, beside_s in ((Mode.OFF, 0.002), (Mode.FLOOR, 0.005)):
        reality.came(mode, 4, num_tokens=4, seconds=1.0, beside_s=beside_s)
    assert reality.drafting_s(Mode.FLOOR, 5) == pytest.approx(0.003)
    assert reality.drafting_s(Mode.OFF, 5) == 0.0
    assert reality.drafting_s(Mode.CHAIN, 5) == 0.0, "nothing is known"
