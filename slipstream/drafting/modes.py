"""Which drafters take part in a step: none, those that cost next to nothing, or the draft model as well.

The gain of a mode is what its steps gave: tokens over the number of plain steps that they took as long as. It is
remembered per mode and size of the batch, to a factor of two. A step is taken in the mode with the largest gain, what
few steps told being doubted in its favour: staying with a mode that gains next to nothing costs next to nothing, and
tells. Speculation is off where no gain is much above that of plain steps. What a switch costs, as a draft model has
texts to read then, is not paid before the better mode would have paid for it.

A size of the batch begins with a few plain steps, which all others are measured by. A mode is compared after steps
enough to tell at the size at hand, or where it does not pay with fewer; else what is known of the next size only
prices nodes. Now and then another mode is tried, because text, drafts and load change, and because what is known of it
may have been bad luck: the less it seems to lose beside the best, the more often, such that trials of a mode cost a
fixed small share of all time. While speculation is off, trials are all it costs; while it is on, a plain step now and
then keeps what plain steps cost known.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, defaultdict
from typing import Any

TRIAL_COST_RATIO = 0.003
"""What trials of one mode may cost, as a share of all steps."""

FIRST_TRIAL_COST_RATIO = 0.01
"""What a mode's first steps, or else its first trial, may cost by the time of that trial, as a share of all steps.

They may have been bad luck.
"""

SHORTEST_INTERVAL = 48
"""Steps between two trials, at least."""

_LONGEST_INTERVAL = 4096
"""Steps between two trials of a mode, at most: what is known grows old."""

_FIRST_STEPS = 64
"""Steps of a mode with one request before it is compared; fewer with more requests, which tell more at once."""

_LEAST_FIRST_STEPS = 4

_FIRST_PLAIN_STEPS, _LEAST_FIRST_PLAIN_STEPS = 4, 2
"""Plain steps that a size of the batch begins with: at start-up, they did not take what they take in service.

Fewer with more requests.
"""

_TRIAL_STEPS = 8
"""Steps of a trial with one request; fewer with more."""

_LEAST_TRIAL_STEPS = 2

_LONGEST_TRIAL_RATIO = 4
"""A trial that does better than the best mode goes on, up to so many times as long."""

CATCH_UP_STEPS = 8
"""A draft model may have to catch up with texts first: so many steps after a switch may tell nothing.

One that drafted within so many steps has next to nothing to catch up with.
"""

_SWITCH_COST_KEPT = 0.8
"""What a costly switch still counts for after each cheaper one."""

_FIRST_PATIENCE = 2
"""A mode that told too little in so many times its first steps, catching up apart, is compared all the same."""

_LEAST_GAIN = 1.02
"""What drafting must gain: less than that does not pay for being wrong."""

_DOUBT = 0.5
"""What a mode may gain beyond what a step of one request told; of more steps and requests, less by their root."""

_KEPT = 0.997
"""What older steps still count for with every new one: the last few hundred count, which are several requests."""

_STALE_RATIO = 4.0
"""Before a trial, all that is known of its mode counts as much as the steps of so many trials."""

_PLAIN_STEPS_AT_FIRST = 20.0
"""So many plain steps took as long as plain steps, before one was seen."""


class Mode(enum.IntEnum):
    """What drafts. FLOOR: Token Recycling and look-ups. CHAIN: these and the draft model."""

    OFF = 0
    FLOOR = 1
    CHAIN = 2


class _Evidence:
    """What the steps of a mode gave, a request: tokens, and as how many plain steps they took."""

    def __init__(self, steps_at_first: float = 0.0) -> None:
        self.tokens = self.plain_steps = self._weight = steps_at_first
        self.num_steps = 0

    @property
    def gain(self) -> float:
        return self.tokens / self.plain_steps if self.plain_steps else 1.0

    def note(self, tokens: float, plain_steps: float) -> None:
        self._scale(_KEPT)
        self.tokens += tokens
        self.plain_steps += plain_steps
        self._weight += 1.0
        self.num_steps += 1

    def let_fade(self, weight: float) -> None:
        if self._weight > weight:
            self._scale(weight / self._weight)

    def _scale(self, share: float) -> None:
        self.tokens *= share
        self.plain_steps *= share
        self._weight *= share


class Modes:
    """Chooses a mode for every step; `counts` says how many steps each one got."""

    def __init__(self) -> None:
        self.counts: Counter[Mode] = Counter()
        self._evidence: dict[tuple[int, Mode], _Evidence] = {}
        self._num_taken: Counter[tuple[int, Mode]] = Counter()
        # By size of the batch: steps so far, and before which one no mode, or this mode, is tried again.
        self._num_steps: Counter[int] = Counter()
        self._next_trial: dict[int, int] = {}
        self._next_trials: dict[tuple[int, Mode], int] = {}
        self._first_switch_steps: defaultdict[tuple[int, Mode], float] = defaultdict(float)
        # What a switch to a mode costs, in plain steps of the size of the batch at hand; what waiting for one loses in
        # every step, and has lost; and steps of all sizes, with that of the last one in each mode.
        self._switch_costs: dict[Mode, float] = {}
        self._waiting_loss = self._waiting_cost = 0.0
        self._clock = 0
        self._last_taken: dict[Mode, int] = {}
        self._trial: Mode | None = None
        self._trial_size = 0
        self._trial_evidence = _Evidence()
        self._trial_steps = 0
        self._trial_switch_steps = 0.0
        self._is_first = False

    def choose(self, num_requests: int, *, has_floor: bool, has_chain: bool) -> Mode:
        """The mode of the coming step. Which drafters there are changes with `forget` alone."""
        size = num_requests.bit_length()
        self._num_steps[size] += 1
        self._clock += 1
        drafting = [Mode.FLOOR] * has_floor + [Mode.CHAIN] * has_chain
        mode = self._chosen(size, drafting)
        self.counts[mode] += 1
        self._num_taken[size, mode] += 1
        self._last_taken[mode] = self._clock
        return mode

    def rest(self, num_requests: int, num_steps: int) -> None:
        """So many more steps are plain without being asked about."""
        self._num_steps[num_requests.bit_length()] += num_steps
        self.counts[Mode.OFF] += num_steps
        self._clock += num_steps
        self._waiting_cost += num_steps * self._waiting_loss

    def note(self, mode: Mode, *, num_requests: int, num_tokens: float, plain_steps: float) -> None:
        """What a step gave all requests together, and as how many plain steps of theirs it took.

        Not to be told of steps in which the target did more than go on with requests, such as read prompts.
        """
        key = num_requests.bit_length(), mode
        if key not in self._evidence:
            self._evidence[key] = _Evidence(_PLAIN_STEPS_AT_FIRST if mode is Mode.OFF else 0.0)
        self._evidence[key].note(num_tokens / num_requests, plain_steps)
        if mode is self._trial:
            self._trial_evidence.note(num_tokens / num_requests, plain_steps)

    def note_switch(self, mode: Mode, *, num_requests: int, num_tokens: float, plain_steps: float) -> None:
        """As `note`, of a step in which a draft model caught up after a switch: what trying a mode costs.

        That is the time beyond what the best mode takes for as many tokens; less than none where it gave many.
        """
        size = num_requests.bit_length()
        best_gain = max(self._gain_at(size, one) for one in Mode)
        lost_steps = plain_steps - num_tokens / num_requests / best_gain
        self._switch_costs[mode] = max(lost_steps, _SWITCH_COST_KEPT * self._switch_costs.get(mode, 0.0))
        if mode is self._trial:
            self._trial_switch_steps += lost_steps
        elif not self._is_known(size, mode):
            self._first_switch_steps[size, mode] += lost_steps

    def gain(self, mode: Mode, *, num_requests: int) -> float:
        """The gain of a mode; 1 where nothing is known."""
        return self._gain_at(num_requests.bit_length(), mode)

    @property
    def is_trying(self) -> bool:
        """Whether a trial is going on, or a mode has its first steps."""
        return self._is_first or self._trial is not None

    def forget(self, mode: Mode) -> None:
        """Begin anew with a mode: its drafter was replaced."""
        known: tuple[dict[tuple[int, Mode], Any], ...] = self._num_taken, self._first_switch_steps, self._evidence
        for one in known:
            for key in [key for key in one if key[1] is mode]:
                del one[key]
        self._switch_costs.pop(mode, None)
        self._next_trials.clear()
        self._next_trial.clear()
        self._trial = None

    def _chosen(self, size: int, drafting: list[Mode]) -> Mode:
        self._is_first = False
        if not drafting:
            return Mode.OFF
        for mode in (Mode.OFF, *drafting):
            if not self._is_known(size, mode):
                self._is_first = True
                return mode
        gains = {mode: self._gain_at(size, mode) + self._doubt(size, mode) for mode in drafting}
        gains[Mode.OFF] = _LEAST_GAIN * self._gain_at(size, Mode.OFF)
        best = max(gains, key=gains.__getitem__)
        if self._trial is not None:
            if self._trial in gains and self._goes_on(self._trial, best_gain=gains[best]):
                return self._trial
            self._end_trial(gains, best)
        if size not in self._next_trial:
            self._plan_trials(size, gains, best)
        chosen = self._worth_switching(gains, best)
        if self._num_steps[size] >= self._next_trial[size]:
            self._begin_trial_if_due(size, [mode for mode in gains if mode is not chosen])
        return chosen

    def _worth_switching(self, gains: dict[Mode, float], best: Mode) -> Mode:
        """The best mode, or the second best until that has lost as much as a switch to the best one costs.

        A batch that shrinks or grows for a while would else pay for each change, and get nothing for it. However long
        the best mode stays it, no more than twice the least possible is lost by then (the ski rental problem).
        """
        cost = self._switch_costs.get(best, 0.0)
        is_level = self._clock - self._last_taken.get(best, -CATCH_UP_STEPS) <= CATCH_UP_STEPS
        if not is_level and self._waiting_cost < cost:
            second = max((mode for mode in gains if mode is not best), key=gains.__getitem__)
            self._waiting_loss = _loss(gains, second, best)
            self._waiting_cost += self._waiting_loss
            return second
        self._waiting_loss = self._waiting_cost = 0.0
        return best

    def _is_known(self, size: int, mode: Mode) -> bool:
        """Whether a mode is compared at this size: after its first steps, or as it does not pay with fewer requests.

        What does not pay with fewer rarely pays with more, so finding out is left to trials.
        """
        if self._had_first_steps(size, mode):
            return True
        if mode is Mode.OFF:
            return False
        fewer = next((one for one in range(size - 1, 0, -1) if self._had_first_steps(one, mode)), None)
        return fewer is not None and self._gain_at(fewer, mode) < _LEAST_GAIN * self._gain_at(fewer, Mode.OFF)

    def _had_first_steps(self, size: int, mode: Mode) -> bool:
        number = first_plain_steps(size) if mode is Mode.OFF else first_steps(size)
        if self._num_taken[size, mode] >= _FIRST_PATIENCE * number + CATCH_UP_STEPS:
            return True
        own = self._evidence.get((size, mode))
        return own is not None and own.num_steps >= number

    def _gain_at(self, size: int, mode: Mode) -> float:
        """What is known of a mode at this size, or at one next to it; 1 if nothing is."""
        found = (self._evidence.get((near, mode)) for near in _near(size))
        return next((one.gain for one in found if one is not None), 1.0)

    def _doubt(self, size: int, mode: Mode) -> float:
        """By how much a mode may be better than its steps at this size say; 0 if it had none."""
        own = self._evidence.get((size, mode))
        return 0.0 if own is None else _DOUBT / math.sqrt(own.num_steps << (size - 1))

    def _plan_trials(self, size: int, gains: dict[Mode, float], best: Mode) -> None:
        """All modes have had their first steps, which were trials too, or need none; fix when each is tried next."""
        for mode in gains:
            own = self._evidence.get((size, mode))
            num_steps = min(own.num_steps, first_steps(size)) if own is not None and mode is not Mode.OFF else 0
            loss = _loss(gains, mode, best)
            lost_steps = max(
                loss * num_steps + self._first_switch_steps[size, mode],
                loss * trial_steps(size, mode) + self._switch_costs.get(mode, 0.0),
            )
            self._fix_trial(size, mode, lost_steps / FIRST_TRIAL_COST_RATIO)
        self._fix_next_trial(size, [mode for mode in gains if mode is not best])

    def _begin_trial_if_due(self, size: int, others: list[Mode]) -> None:
        mode = min(others, key=lambda mode: self._next_trials[size, mode])
        if self._num_steps[size] < self._next_trials[size, mode]:  # another one is in use than when that was planned
            self._fix_next_trial(size, others)
            return
        self._trial, self._trial_size, self._trial_evidence = mode, size, _Evidence()
        self._trial_steps, self._trial_switch_steps = 0, 0.0
        if (size, mode) in self._evidence:
            self._evidence[size, mode].let_fade(_STALE_RATIO * trial_steps(size, mode))

    def _end_trial(self, gains: dict[Mode, float], best: Mode) -> None:
        """Fix when its mode is tried again, and when the next one is."""
        mode, size, self._trial = self._trial, self._trial_size, None
        assert mode is not None
        lost_steps = _loss(gains, mode, best) * self._trial_steps + self._trial_switch_steps
        self._fix_trial(size, mode, lost_steps / TRIAL_COST_RATIO)
        self._fix_next_trial(size, [one for one in gains if one is not best])

    def _fix_trial(self, size: int, mode: Mode, interval: float) -> None:
        bounded = min(max(interval, SHORTEST_INTERVAL), _LONGEST_INTERVAL)
        due = self._num_steps[size] + int(bounded)
        self._next_trials[size, mode] = max(due, self._next_trials.get((size, mode), 0))

    def _fix_next_trial(self, size: int, others: list[Mode]) -> None:
        soonest = min(self._next_trials[size, mode] for mode in others)
        self._next_trial[size] = max(soonest, self._num_steps[size] + SHORTEST_INTERVAL)

    def _goes_on(self, trial: Mode, *, best_gain: float) -> bool:
        """Whether a trial has another step."""
        self._trial_steps += 1
        number, tried = trial_steps(self._trial_size, trial), self._trial_evidence
        if trial is Mode.OFF:
            return self._trial_steps <= number
        if tried.num_steps < number:
            return self._trial_steps <= number + CATCH_UP_STEPS
        return tried.gain > best_gain and self._trial_steps <= _LONGEST_TRIAL_RATIO * number


def _loss(gains: dict[Mode, float], mode: Mode, best: Mode) -> float:
    """What share of its time a step of a mode loses beside the best one."""
    return max(1 - gains.get(mode, 0.0) / gains[best], 0.0)


def first_steps(size: int) -> int:
    """Steps of a mode before it is compared, for batches whose size has so many bits."""
    return max(_FIRST_STEPS >> (size - 1), _LEAST_FIRST_STEPS)


def first_plain_steps(size: int) -> int:
    """Plain steps that such batches begin with."""
    return max(_FIRST_PLAIN_STEPS >> (size - 1), _LEAST_FIRST_PLAIN_STEPS)


def trial_steps(size: int, mode: Mode) -> int:
    """Steps of a trial of a mode that finds nothing, for batches whose size has so many bits."""
    return 1 if mode is Mode.OFF else max(_TRIAL_STEPS >> (size - 1), _LEAST_TRIAL_STEPS)


def _near(size: int) -> tuple[int, int, int]:
    return size, size - 1, size + 1
