"""What steps cost and what they give: the price of nodes, and the mode that pays.

    plain step     what a step without drafts takes: its pass, and what goes on beside it
    token rate     tokens a second that steps of a mode give in the long run; what a second is worth
    price of n nodes   the seconds that they add to the pass, at the token rate

Costs of passes are predicted by `step_cost`, what goes on beside them by `overhead`. `modes` chooses by what steps were
expected to give in the time they were expected to take, both as far as such promises were kept.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from slipstream.drafting.drafter import Lesson, StepLoad
from slipstream.drafting.modes import CATCH_UP_STEPS, Mode, Modes
from slipstream.drafting.overhead import Overhead
from slipstream.drafting.step_cost import NodeCosts, StepCost, distinct_experts
from slipstream_kernels.merging import Float64, Price

LARGEST_BAR = 0.9
"""Candidates that survive more often than this are always looked at, whatever they cost."""

REST_STEPS = 7
"""While speculation is off, so many steps follow each one that is asked about: asking took 1 % of a step."""

_LARGEST_SURPRISE = 2.0
"""A pass counts as long as so many times what was expected of it, at most: the machine may have interrupted it."""

_LONGEST_READING = 32.0
"""A step in which a draft model reads texts, which nothing foresees, counts as so many plain steps at most."""

_LITTLE_KNOWN = 0.14
"""Where less of an error is due to the pace, the size is new: every step of it counts."""

_TOKENS_REMEMBERED, _PLAIN_STEPS_REMEMBERED = 1_000.0, 200.0
"""Expected tokens of drafted nodes, and time of passes in plain steps, that are compared with what came."""

_PROMISED_AT_FIRST = 20.0
"""So much came as expected, before anything did."""


class Took(NamedTuple):
    """Seconds of a step and the tokens it gave.

    `pass_s` of the seconds is its pass, and `spared_s` choosing a mode and learning, which steps that rest are spared.
    `is_usual`: no draft model read texts anew.
    """

    step_s: float
    pass_s: float
    spared_s: float
    num_tokens: int
    is_usual: bool


class Promise:
    """What came over what was expected: tokens of drafted nodes, or time of passes. The newest `remembered` counts.

    What is expected of a step varies much less than what comes: luck with tokens, a machine that is slower for a while.
    So with this share, which changes slowly, a few steps tell what a mode gives.
    """

    def __init__(self, remembered: float) -> None:
        self._remembered = remembered
        self._expected = self._came = _PROMISED_AT_FIRST

    @property
    def kept_share(self) -> float:
        """What to multiply the expected with."""
        return self._came / self._expected

    def observe(self, expected: float, came: float) -> None:
        """Of so much that was expected, so much came."""
        kept = 1 - min(expected / self._remembered, 1.0)
        self._expected = kept * self._expected + expected
        self._came = kept * self._came + came


class Economy:
    """Decides for one step at a time: `choose`, `price` and `expect` before its pass, `observe` and `settle` after."""

    def __init__(self, step_cost: StepCost) -> None:
        self.step_cost = step_cost
        self.modes = Modes()
        self._overhead = Overhead()
        self._load = StepLoad(0, 0, 0.0)
        self._mode = self._last_mode = Mode.OFF
        self._num_switch_steps = 0
        self._is_typical = self._can_draft = False
        self._expected_pass_s = self._plain_s = 1.0
        self._costs = _NO_COSTS
        self._pace_share = self._drafted_tokens = 0.0
        self._is_observed = False
        # Of tokens the same share comes at all sizes of the batch; the time of some sizes is less well known.
        self._tokens = {mode: Promise(_TOKENS_REMEMBERED) for mode in Mode}
        self._times = defaultdict[tuple[Mode, int], Promise](lambda: Promise(_PLAIN_STEPS_REMEMBERED))

    def choose(self, load: StepLoad, *, has_floor: bool, has_chain: bool) -> Mode:
        """The mode of the coming step."""
        self._load = load
        self._mode = Mode.OFF
        self._is_observed = False
        self._can_draft = has_floor or has_chain
        # The last step of a request, which has no use for a draft, does more than others beside its pass.
        self._is_typical = load.num_rows == load.num_choosing and self._can_draft
        if self._can_draft:
            self._mode = self.modes.choose(load.num_choosing, has_floor=has_floor, has_chain=has_chain)
            if self._mode is not self._last_mode:
                self._num_switch_steps = CATCH_UP_STEPS
            self._last_mode = self._mode
        return self._mode

    def price(self, max_nodes: int) -> Price:
        """What up to so many nodes cost the coming step."""
        load = self._load
        costs = self.step_cost.over_nodes(
            num_rows=load.num_rows, max_nodes=max_nodes, context_tokens=load.context_tokens
        )
        gain = max(self.modes.gain(self._mode, num_requests=load.num_choosing), 1.0)
        token_rate = gain * load.num_choosing / self._plain_step_s(costs.seconds)
        # Nodes that survive less often than this never pay, whatever their number.
        min_survival = min(token_rate * costs.least_share * float(costs.seconds[0]), LARGEST_BAR)
        self._costs = costs
        return Price(costs.seconds, token_rate, load.num_choosing, min_survival)

    def expect(self, *, num_nodes: int, drafted_tokens: float) -> None:
        """The coming step has so many of the nodes that were priced; `drafted_tokens` is what they survive, summed."""
        self._expected_pass_s = float(self._costs.seconds[num_nodes])
        self._pace_share = float(self._costs.pace_shares[num_nodes])
        self._drafted_tokens = drafted_tokens
        self._plain_s = self._plain_step_s(self._costs.seconds)

    def observe(self, lesson: Lesson, *, is_due: bool) -> None:
        """Correct the prediction of what passes cost by this one, if that is due, or little is known of its size."""
        load = self._load
        self._is_observed = load.num_rows == load.num_choosing and (is_due or self._pace_share < _LITTLE_KNOWN)
        if self._is_observed:
            self.step_cost.observe(
                num_rows=lesson.num_rows,
                context_tokens=load.context_tokens,
                seconds=lesson.seconds,
                num_experts=distinct_experts(lesson.expert_ids_TLK),
            )

    def rest(self) -> int:
        """How many steps to go without drafting and without asking, after this one; 0 unless speculation is off."""
        if not self._can_draft or self._mode is not Mode.OFF or self.modes.is_trying:
            return 0
        self.modes.rest(self._load.num_choosing, REST_STEPS)
        return REST_STEPS

    def settle(self, took: Took) -> None:
        """What became of the step.

        What it took beside its pass is all that drafting costs, wherever it is spent; that a draft model reads the
        texts of requests that joined is among it. Only what it reads because its mode was chosen just now is not, but
        is what trying the mode costs. Steps that read prompts, and those in which nobody could draft, are left out.
        Plain steps count without being asked about, as nearly all of them go while speculation is off.
        """
        if not self._is_typical:
            return
        load, mode = self._load, self._mode
        step_s = took.step_s if mode is not Mode.OFF else took.step_s - took.spared_s
        if took.is_usual:
            self._overhead.observe(mode, load.num_choosing, step_s - took.pass_s)
        if mode is Mode.OFF:
            self._costs = self.step_cost.over_nodes(
                num_rows=load.num_rows, max_nodes=0, context_tokens=load.context_tokens
            )
            self.expect(num_nodes=0, drafted_tokens=0.0)
        if took.is_usual:
            self._see_pass(took.pass_s)
            plain_steps = self._expected_step_s() / self._plain_s
        else:
            plain_steps = min(step_s / self._plain_s, _LONGEST_READING)
        if not self._is_observed:
            self.step_cost.keep_pace(took.pass_s / self._expected_pass_s, pace_share=self._pace_share)
        tokens = self._tokens[mode]
        tokens.observe(self._drafted_tokens, took.num_tokens - load.num_choosing)
        num_tokens = load.num_choosing + tokens.kept_share * self._drafted_tokens
        if self._num_switch_steps and not took.is_usual:
            self._num_switch_steps -= 1
            note = self.modes.note_switch
        else:
            self._num_switch_steps = 0
            note = self.modes.note
        note(mode, num_requests=load.num_choosing, num_tokens=num_tokens, plain_steps=plain_steps)

    def forget(self, mode: Mode) -> None:
        """Begin anew with a mode: its drafter was replaced."""
        self.modes.forget(mode)
        self._overhead.forget(mode)
        self._tokens[mode] = Promise(_TOKENS_REMEMBERED)
        self._num_switch_steps = CATCH_UP_STEPS

    def _see_pass(self, pass_s: float) -> None:
        """The pass took so long, beside what was expected of it."""
        plain_steps = self._expected_pass_s / self._plain_s
        surprise = min(pass_s / self._expected_pass_s, _LARGEST_SURPRISE)
        self._times[self._place].observe(plain_steps, surprise * plain_steps)

    def _expected_step_s(self) -> float:
        """What such a step takes in the long run: that the machine is slower just now is not due to the mode."""
        beside_s = self._overhead.expected_s(self._mode, self._load.num_choosing)
        return self._times[self._place].kept_share * self._expected_pass_s + beside_s

    @property
    def _place(self) -> tuple[Mode, int]:
        """The mode and size of the batch of the step at hand."""
        return self._mode, self._load.num_choosing.bit_length()

    def _plain_step_s(self, step_s: Float64) -> float:
        """What a step like this one takes without drafting."""
        return float(step_s[0]) + self._overhead.expected_s(Mode.OFF, self._load.num_choosing)


_NO_COSTS = NodeCosts(np.ones(1), 0.0, np.ones(1))
