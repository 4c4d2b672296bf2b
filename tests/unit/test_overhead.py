"""What steps take beside their pass."""

from __future__ import annotations

import pytest

from slipstream.drafting.modes import Mode
from slipstream.drafting.overhead import Overhead


def test_modes_and_sizes_are_told_apart() -> None:
    overhead = Overhead()
    overhead.observe(Mode.OFF, 1, 0.002)
    overhead.observe(Mode.CHAIN, 4, 0.005)
    assert overhead.expected_s(Mode.OFF, 1) == 0.002
    assert overhead.expected_s(Mode.CHAIN, 5) == 0.005, "to a factor of two"
    assert 0 < overhead.expected_s(Mode.CHAIN, 1) < 0.001, "nothing is known"


def test_the_mean_follows_what_is_observed() -> None:
    overhead = Overhead()
    for seconds in (0.002, 0.003, 0.004):
        overhead.observe(Mode.FLOOR, 1, seconds)
    assert overhead.expected_s(Mode.FLOOR, 1) == pytest.approx(0.003)
    for _ in range(100):
        overhead.observe(Mode.FLOOR, 1, 0.001)
    assert overhead.expected_s(Mode.FLOOR, 1) == pytest.approx(0.001, rel=1e-3)


def test_one_interrupted_step_says_little() -> None:
    overhead = Overhead()
    for _ in range(20):
        overhead.observe(Mode.OFF, 1, 0.001)
    overhead.observe(Mode.OFF, 1, 10.0)
    assert overhead.expected_s(Mode.OFF, 1) <= 0.0011 + 1e-9


def test_an_interrupted_first_step_is_not_the_yardstick() -> None:
    overhead = Overhead()
    for seconds in (1.0, 0.001, 0.001):
        overhead.observe(Mode.OFF, 1, seconds)
    assert overhead.expected_s(Mode.OFF, 1) < 0.002


def test_a_mode_begins_anew() -> None:
    overhead = Overhead()
    for mode in (Mode.OFF, Mode.CHAIN):
        overhead.observe(mode, 1, 0.002)
    overhead.forget(Mode.CHAIN)
    assert overhead.expected_s(Mode.OFF, 1) == 0.002
    assert overhead.expected_s(Mode.CHAIN, 1) == Overhead().expected_s(Mode.CHAIN, 1)
