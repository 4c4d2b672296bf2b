"""Which drafters take part in a step: none, those that cost next to nothing, or the draft model as well.

The gain of a mode is the tokens a second of a step in it, drafting included, over those of a step without drafts, as
the budget expects them. Gains are remembered per mode and size of the batch, to a factor of two; a size without any
goes by the next one. A step is taken in the mode with the largest gain; speculation is off where none is much above
1. Now and then another mode is tried, because text, drafts and load change; the longer nothing better is found, the
more seldom. While speculation is off, trials are all it costs; while it is on, a plain step now and then keeps what
plain steps cost known.
"""

from __future__ import annotations

import enum
from collections import Counter

SHORTEST_INTERVAL = 64
"""Steps in the best mode before another one is tried, at first and after a trial that found a better one."""

LONGEST_INTERVAL = 512
"""The interval doubles with every trial that finds nothing, up to this."""

TRIAL_STEPS = 3
"""Gains that end a trial."""

LONGEST_TRIAL_STEPS = 8
"""What ends a trial without them: a draft model may have to catch up with texts first, and gains nothing yet."""

_FIRST_GAINS = 6
"""Gains of a mode before it is compared, and how many times as many steps it gets for them."""

_FIRST_PATIENCE = 4

_LEAST_GAIN = 1.02
"""What drafting must gain: less than that does not pay for being wrong."""

_NEWEST_SHARE = 0.15
"""What the newest gain counts for."""


class Mode(enum.IntEnum):
    """What drafts. FLOOR: Token Recycling and look-ups. CHAIN: these and the draft model."""

    OFF = 0
    FLOOR = 1
    CHAIN = 2


class Modes:
    """Chooses a mode for every step; `counts` says how many steps each one got."""

    def __init__(self) -> None:
        self.counts: Counter[Mode] = Counter()
        self._gains: dict[tuple[int, Mode], float] = {}
        self._num_noted: Counter[tuple[int, Mode]] = Counter()
        self._num_taken: Counter[tuple[int, Mode]] = Counter()
        # By size of the batch: steps between trials, and steps since the last one.
        self._intervals: dict[int, int] = {}
        self._num_steps: Counter[int] = Counter()
        self._num_trials = 0
        self._trial: Mode | None = None
        self._trial_gains = 0
        self._trial_steps = 0
        # While speculation is off, asking costs nothing: nothing changes before the next trial or another load.
        self._off_for: tuple[int, bool, bool] | None = None

    def choose(self, num_requests: int, *, has_floor: bool, has_chain: bool) -> Mode:
        """The mode of the coming step."""
        size = num_requests.bit_length()
        key = size, has_floor, has_chain
        if self._off_for == key and self._num_steps[size] + 1 < self._interval(size):
            self._num_steps[size] += 1
            self.counts[Mode.OFF] += 1
            return Mode.OFF
        drafting = [Mode.FLOOR] * has_floor + [Mode.CHAIN] * has_chain
        mode = self._chosen(size, drafting)
        self.counts[mode] += 1
        self._num_taken[size, mode] += 1
        self._off_for = key if mode is Mode.OFF and self._trial is None else None
        return mode

    def note(self, mode: Mode, gain: float, *, num_requests: int) -> None:
        """What a step in a mode other than OFF is expected to gain; not to be told if its drafter drafted nothing."""
        key = num_requests.bit_length(), mode
        self._trial_gains += mode is self._trial
        self._num_noted[key] += 1
        share = max(_NEWEST_SHARE, 1 / self._num_noted[key])
        self._gains[key] = (1 - share) * self._gains.get(key, 1.0) + share * gain

    def gain(self, mode: Mode, *, num_requests: int) -> float:
        """The gain of a mode, 1 for OFF, and where nothing is known."""
        return self._gain_at(num_requests.bit_length(), mode)

    @property
    def is_trying(self) -> bool:
        """Whether a trial is going on."""
        return self._trial is not None

    def forget(self, mode: Mode) -> None:
        """Begin anew with a mode: its drafter was replaced."""
        for key in [key for key in self._gains if key[1] is mode]:
            del self._gains[key], self._num_noted[key], self._num_taken[key]
        self._intervals.clear()
        self._off_for = None

    def _chosen(self, size: int, drafting: list[Mode]) -> Mode:
        if not drafting:
            return Mode.OFF
        for mode in drafting:
            if not self._is_known(size, mode):
                return mode
        gains = {Mode.OFF: _LEAST_GAIN} | {mode: self._gain_at(size, mode) for mode in drafting}
        best = max(gains, key=gains.__getitem__)
        if self._trial is not None:
            return self._in_trial(size, self._trial, best, drafting)
        self._num_steps[size] += 1
        if self._num_steps[size] >= self._interval(size):
            others = [mode for mode in (Mode.OFF, *drafting) if mode is not best]
            self._num_trials += 1
            self._trial, self._trial_gains, self._trial_steps = others[self._num_trials % len(others)], 0, 0
        return best

    def _interval(self, size: int) -> int:
        return self._intervals.get(size, SHORTEST_INTERVAL)

    def _is_known(self, size: int, mode: Mode) -> bool:
        """Whether a mode has had its first steps at this size, or at one next to it in full."""
        if self._num_taken[size, mode] >= _FIRST_PATIENCE * _FIRST_GAINS:
            return True
        return any(self._num_noted[near, mode] >= _FIRST_GAINS for near in (size, size - 1, size + 1))

    def _gain_at(self, size: int, mode: Mode) -> float:
        """What is known of a mode at this size, or at one next to it; 1 if nothing is."""
        known = (self._gains.get((near, mode)) for near in (size, size - 1, size + 1))
        return next((gain for gain in known if gain is not None), 1.0)

    def _in_trial(self, size: int, trial: Mode, best: Mode, drafting: list[Mode]) -> Mode:
        self._trial_steps += 1
        most_steps = 1 if trial is Mode.OFF else LONGEST_TRIAL_STEPS
        can_go_on = trial is Mode.OFF or trial in drafting
        if can_go_on and self._trial_gains < TRIAL_STEPS and self._trial_steps <= most_steps:
            return trial
        self._intervals[size] = SHORTEST_INTERVAL if best is trial else min(2 * self._interval(size), LONGEST_INTERVAL)
        self._num_steps[size], self._trial = 0, None
        return best
