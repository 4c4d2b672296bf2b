"""Which drafters take part in a step: none, those that cost next to nothing, or the draft model as well.

The gain of a mode is the tokens a second of a step in it, drafting included, over those of a step without drafts, as
the budget expects them. Gains are remembered per mode and size of the batch (to a factor of two). A step is taken in
the mode with the largest one; speculation is off where none is above 1. Now and then another mode is tried, because
text, drafts and load change: while speculation is off, that is all it costs.
"""

from __future__ import annotations

import enum
from collections import Counter

STEPS_BETWEEN_TRIALS = 64
"""Steps in the best mode before another one is tried."""

TRIAL_STEPS = 2
"""Gains that end a trial."""

LONGEST_TRIAL_STEPS = 8
"""What ends a trial without them: a draft model may have to catch up with texts first, and gains nothing yet."""

_FIRST_GAINS = 8
"""Gains of a mode before it is compared, and how many times as many steps it gets for them."""

_FIRST_PATIENCE = 4

_NEWEST_SHARE = 0.1
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
        self._num_steps = 0
        self._num_trials = 0
        self._trial: Mode | None = None
        self._trial_gains = 0

    def choose(self, num_requests: int, *, has_floor: bool, has_chain: bool) -> Mode:
        """The mode of the coming step."""
        size = num_requests.bit_length()
        drafting = [Mode.FLOOR] * has_floor + [Mode.CHAIN] * has_chain
        mode = self._chosen(size, drafting)
        self.counts[mode] += 1
        self._num_taken[size, mode] += 1
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
        return self._gains.get((num_requests.bit_length(), mode), 1.0)

    def forget(self, mode: Mode) -> None:
        """Begin anew with a mode: its drafter was replaced."""
        for key in [key for key in self._gains if key[1] is mode]:
            del self._gains[key], self._num_noted[key], self._num_taken[key]

    def _chosen(self, size: int, drafting: list[Mode]) -> Mode:
        if not drafting:
            return Mode.OFF
        for mode in drafting:
            has_tried = self._num_taken[size, mode] >= _FIRST_PATIENCE * _FIRST_GAINS
            if self._num_noted[size, mode] < _FIRST_GAINS and not has_tried:
                return mode
        best = max((Mode.OFF, *drafting), key=lambda mode: self._gains.get((size, mode), 1.0))
        self._num_steps += 1
        if self._num_steps < STEPS_BETWEEN_TRIALS:
            return best
        if self._trial is None:
            others = [mode for mode in drafting if mode is not best] or [best]
            self._num_trials += 1
            self._trial, self._trial_gains = others[self._num_trials % len(others)], 0
        trial = self._trial
        if self._trial_gains + 1 >= TRIAL_STEPS or self._num_steps + 1 >= STEPS_BETWEEN_TRIALS + LONGEST_TRIAL_STEPS:
            self._num_steps, self._trial = 0, None
        return trial if trial in drafting else best
