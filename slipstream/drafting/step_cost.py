"""What a step of the target costs on this machine, before it is taken.

    predicted seconds = pace x (base(rows, context) + seconds per expert x distinct experts(rows))

`pace` is how the machine does just now beside how it did when it was measured: memory that others share is now half,
now twice as fast. `base` is a table of points, measured at start-up by `measure`. `step_table` corrects both by the
steps that are observed. `distinct experts` is what the rows of a step wake per layer: E (1 - (1 - K/E) ** (n ** a)) for
n rows that each choose K of E experts, where a = 1 would be independent choices and less is what neighbours share; it
is fitted online. A dense model has no such term.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.drafting.step_table import StepTable
from slipstream.engine.plan import ExpertIds, on_host

Float64 = NDArray[np.float64]

EXPONENT_AT_FIRST = 0.8
"""What published expert loads of 2 to 15 tokens fit: 0.78, 0.80 and 0.84 for three models."""

_FORGETTING = 0.995
"""Weight that old evidence keeps at each step: the last 200 steps count."""

_CONTEXT_STEP = 64
"""Contexts that differ by less are priced alike."""

_STEPS_REMEMBERED = 4
"""Observed steps after which prices are made anew from the table."""

_LARGEST_SURPRISE_RATIO = 0.3
"""An error counts up to this share of the prediction: a step that the machine interrupted says little."""


class StepProbe(Protocol):
    """Runs one step of a given size, for `measure`."""

    def __call__(self, num_rows: int, context_tokens: int, *, is_varied: bool) -> float:
        """Run a pass over `num_rows` rows that each attend to `context_tokens` positions.

        Rows hold different tokens if `is_varied`, else one token, so that they wake few experts. Returns the distinct
        experts a layer used, their mean over layers; 0 for a dense model.
        """


class MeasuredSteps(msgspec.Struct, frozen=True):
    """Seconds of steps at a grid of G rows x C contexts, both ascending, each with its distinct experts a layer.

    `varied` and `alike` are what `StepProbe` says of tokens; without experts the two are measurements of the same.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    varied_s_GC: Float64
    alike_s_GC: Float64
    varied_experts_GC: Float64
    alike_experts_GC: Float64


def measure(probe: StepProbe, *, rows: Sequence[int], contexts: Sequence[int], repeats: int = 5) -> MeasuredSteps:
    """Time the probe at every point: medians of `repeats` runs after one that is not counted.

    Each run is compared with one of the smallest step just before it, because the machine's pace may change within
    seconds, and what a budget needs most is how sizes compare.
    """
    ratios = np.empty((repeats, 2, len(rows), len(contexts)))
    experts = np.empty(ratios.shape[1:])
    smallest_s: list[float] = []
    for kind, is_varied in enumerate((True, False)):
        for row, num_rows in enumerate(rows):
            for column, context in enumerate(contexts):
                experts[kind, row, column] = probe(num_rows, context, is_varied=is_varied)
                for repeat in range(repeats):
                    smallest_s.append(_timed(probe, rows[0], contexts[0], True))
                    ratios[repeat, kind, row, column] = _timed(probe, num_rows, context, is_varied) / smallest_s[-1]
    seconds = np.median(ratios, axis=0) * statistics.median(smallest_s)
    return MeasuredSteps(tuple(rows), tuple(contexts), seconds[0], seconds[1], experts[0], experts[1])


def _timed(probe: StepProbe, num_rows: int, context: int, is_varied: bool) -> float:
    start = time.perf_counter()
    probe(num_rows, context, is_varied=is_varied)
    return time.perf_counter() - start


def distinct_experts(expert_ids_TLK: ExpertIds | None) -> float | None:
    """Distinct experts a layer that T rows chose, their mean over layers; None for a dense model."""
    if expert_ids_TLK is None:
        return None
    ids_TLK = on_host(expert_ids_TLK)
    num_layers: int = ids_TLK.shape[1]
    is_used = np.zeros((num_layers, int(ids_TLK.max()) + 1), dtype=np.bool_)
    is_used[np.arange(num_layers)[:, None], ids_TLK] = True
    return float(is_used.sum()) / num_layers


class ExpertUnion:
    """Distinct experts that n rows wake in a layer, on average; the exponent is fitted to what steps woke."""

    def __init__(self, *, num_experts: int, experts_per_token: int, exponent: float = EXPONENT_AT_FIRST) -> None:
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"{experts_per_token} of {num_experts} experts per token; expected 1 to {num_experts}")
        self._num_experts = num_experts
        self._experts_per_token = experts_per_token
        # Sums of the line through the origin log(effective rows) = exponent x log(rows), with the start as evidence
        # of one step of e rows.
        self._log_rows_squared = 1.0
        self._log_rows_log_effective = exponent

    @property
    def exponent(self) -> float:
        """How the number of rows that choose independently grows with rows; between 0 and 1."""
        return min(max(self._log_rows_log_effective / self._log_rows_squared, 0.0), 1.0)

    def expected(self, num_rows: Float64) -> Float64:
        """Distinct experts a layer for these numbers of rows (at least 0)."""
        asleep = np.log1p(-min(self._experts_per_token / self._num_experts, 1 - 1e-12))
        awake: Float64 = -np.expm1(asleep * num_rows**self.exponent)
        return np.where(num_rows > 0, self._num_experts * awake, 0.0)

    def expected_of(self, num_rows: int) -> float:
        """`expected` of one number of rows."""
        asleep = math.log1p(-min(self._experts_per_token / self._num_experts, 1 - 1e-12))
        return -self._num_experts * math.expm1(asleep * num_rows**self.exponent) if num_rows > 0 else 0.0

    def observe(self, *, num_rows: int, num_experts: float) -> None:
        """A step over `num_rows` rows used `num_experts` distinct experts a layer, their mean over layers.

        Steps of one row say nothing, and neither do those that woke every expert.
        """
        share = num_experts / self._num_experts
        largest = 1 - 0.5 / self._num_experts
        if num_rows < 2 or not 0 < share < largest or self._experts_per_token == self._num_experts:
            return
        log_rows = math.log(num_rows)
        effective = math.log1p(-share) / math.log1p(-self._experts_per_token / self._num_experts)
        self._log_rows_squared = _FORGETTING * self._log_rows_squared + log_rows**2
        evidence = log_rows * math.log(max(effective, 1.0))
        self._log_rows_log_effective = _FORGETTING * self._log_rows_log_effective + evidence


class NodeCosts(NamedTuple):
    """Seconds of a step with 0, 1, ... nodes; what a node adds where nodes add least, as a share of the step without
    any; and at every number of nodes, what share of an error of the prediction is due to the machine's pace.
    """

    seconds: Float64
    least_share: float
    pace_shares: Float64


class StepCost:
    """Predicts seconds of steps; `observe` corrects it by what steps took.

    `mean_error_ratio` is the mean of |predicted - measured| / measured over the `num_steps` observed, newer ones more;
    each was predicted before it was learned from.
    """

    def __init__(
        self, measured: MeasuredSteps, *, experts: ExpertUnion | None = None, shape_buckets: Sequence[int] = ()
    ) -> None:
        """`shape_buckets` are the row counts, ascending, that steps are padded to; larger steps are not padded."""
        self._experts = experts
        buckets = np.array((0, *shape_buckets), dtype=np.int64)
        # Entry n is the bucket of n rows.
        self._padded_rows = buckets[np.searchsorted(buckets, np.arange(buckets[-1] + 1))]
        woken = measured.varied_experts_GC - measured.alike_experts_GC
        slower_s = measured.varied_s_GC - measured.alike_s_GC
        # Seconds per expert are the slope of (time against experts) over points that differ in the tokens alone.
        self._woken_squared = float((woken**2).sum()) if experts else 0.0
        self._woken_seconds = float((woken * slower_s).sum())
        seconds = (measured.varied_s_GC + measured.alike_s_GC) / 2
        num_experts = (measured.varied_experts_GC + measured.alike_experts_GC) / 2
        base_s_GC = seconds - self._expert_s * num_experts
        self._table = StepTable(measured.rows, measured.contexts, base_s_GC, errors_s_GC=seconds)
        self._rows = self._table.rows
        self._lines: dict[tuple[int, int, int], NodeCosts] = {}
        self._forgets_at = 0
        self.num_steps = 0
        self.mean_error_ratio = 0.0

    @property
    def seconds_per_expert(self) -> float:
        """What one more distinct expert in every layer adds to a step just now; 0 for a dense model."""
        return self._table.pace * self._expert_s

    @property
    def _expert_s(self) -> float:
        return max(self._woken_seconds / self._woken_squared, 0.0) if self._woken_squared > 0 else 0.0

    def predict_s(self, num_rows: NDArray[np.int64], *, context_tokens: float) -> Float64:
        """Seconds of a step with each of these numbers of rows, rounded up to its bucket; inputs are not changed.

        `context_tokens` is the mean number of positions a row attends to. Beyond the last measured point of either
        the last line goes on, but never down.
        """
        rows = self._padded(np.asarray(num_rows)).astype(np.float64)
        points_s = self._points_s(context_tokens)
        seconds = np.interp(rows, self._rows, points_s)
        if len(rows) and rows.max() > self._rows[-1] and len(self._rows) > 1:
            slope = max((points_s[-1] - points_s[-2]) / (self._rows[-1] - self._rows[-2]), 0.0)
            seconds += slope * np.maximum(rows - self._rows[-1], 0.0)
        return seconds * self._table.pace

    def over_nodes(self, *, num_rows: int, max_nodes: int, context_tokens: float) -> NodeCosts:
        """What a step of `num_rows` rows takes with 0, 1, ... `max_nodes` nodes beside them.

        Asked every step, so all but the pace is remembered for a while, for contexts that are nearly as long.
        """
        key = num_rows, max_nodes, round(context_tokens / _CONTEXT_STEP)
        if self.num_steps >= self._forgets_at:
            self._lines.clear()
            self._forgets_at = self.num_steps + _STEPS_REMEMBERED
        if key not in self._lines:
            rows = np.arange(num_rows, num_rows + max_nodes + 1)
            line = self.predict_s(rows, context_tokens=context_tokens) / self._table.pace
            added = (line[1:] - line[0]) / np.arange(1, len(line))
            least_share = max(float(added.min(initial=np.inf) / line[0]), 0.0)
            pace_shares = np.interp(self._padded(rows), self._rows, self._table.pace_line(context_tokens))
            self._lines[key] = NodeCosts(line, least_share, pace_shares)
        costs = self._lines[key]
        return NodeCosts(costs.seconds * self._table.pace, costs.least_share, costs.pace_shares)

    def observe(
        self, *, num_rows: int, context_tokens: float, seconds: float, num_experts: float | None = None
    ) -> None:
        """A step took `seconds`, and used `num_experts` distinct experts a layer if that is known."""
        rows = int(self._padded_rows[num_rows]) if num_rows < len(self._padded_rows) else num_rows
        usual_experts = self._experts.expected_of(rows) if self._experts else 0.0
        expected = self._table.at(rows, context_tokens) + self._expert_s * usual_experts
        if rows > self._rows[-1]:
            expected = float(self.predict_s(np.array([rows]), context_tokens=context_tokens)[0]) / self._table.pace
        measured = seconds / self._table.pace
        self._note_error(abs(expected - measured) / max(measured, 1e-9))
        surprise = _LARGEST_SURPRISE_RATIO * expected
        error = min(max(measured - expected, -surprise), surprise)
        if self._experts and num_experts is not None:
            more = num_experts - usual_experts
            self._learn_experts(self._experts, more, error)
            error -= more * self._expert_s
            self._experts.observe(num_rows=num_rows, num_experts=num_experts)
        self._table.correct(rows, context_tokens, expected_s=expected, error_s=error)

    def keep_pace(self, ratio: float, *, pace_share: float) -> None:
        """A step that is not observed took so many times what was predicted. Cheap, so that every other step can tell.

        `pace_share` is what of an error is the pace's, see `NodeCosts`.
        """
        surprise = min(max(ratio - 1, -_LARGEST_SURPRISE_RATIO), _LARGEST_SURPRISE_RATIO)
        self._table.keep_pace(pace_share * surprise)

    def _learn_experts(self, experts: ExpertUnion, more: float, error: float) -> None:
        """A step woke `more` experts than expected, and took `error` seconds more than predicted."""
        before = self._expert_s
        self._woken_seconds = _FORGETTING * self._woken_seconds + more * error
        self._woken_squared = _FORGETTING * self._woken_squared + more**2
        # The table gives up what experts now account for: predictions of expected steps stay what they were.
        change = self._expert_s - before
        self._table.lower(change * experts.expected(self._rows))

    def _note_error(self, error_ratio: float) -> None:
        self.num_steps += 1
        self.mean_error_ratio += max(1 - _FORGETTING, 1 / self.num_steps) * (error_ratio - self.mean_error_ratio)

    def _points_s(self, context_tokens: float) -> Float64:
        """Seconds at each measured number of rows, for this context."""
        points_s = self._table.line(context_tokens)
        return points_s + self._expert_s * self._experts.expected(self._rows) if self._experts else points_s

    def _padded(self, num_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        padded = self._padded_rows.take(num_rows, mode="clip")
        return np.maximum(padded, num_rows)
