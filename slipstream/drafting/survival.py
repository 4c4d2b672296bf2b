"""How often drafted nodes are accepted, learned from every verification.

    survival of a node        probability that it is accepted, given that its parent is (the root always is)
    trial                     a node whose parent was accepted, so that what followed the parent is known; nodes
                              further from the accepted path were not tried, and say nothing
    survival along a path     probability that a node and all its ancestors are accepted: the product

Siblings exclude each other, at most one is accepted; a later sibling's survival is not conditional on its elders'
rejection. Under the equality rule the target's token is known wherever a path was accepted, so every candidate there
is a trial, verified or not (`outcomes`): the budget may prune by these estimates without starving them of evidence.
Under a rule that rejects, only verified nodes are tried (`trials`). Estimates belong to the shapes that were drafted:
those of a forced shape do not transfer.

Counts of tried and accepted nodes are kept in cells of rank x depth x what the drafter itself says of a candidate: how
long its match was (look-ups), or how sure it is of it (models). They forget exponentially. A cell with little
evidence leans on that of all depths, which leans on that of its rank. Over what the drafter says, estimates then follow
the nearest rising curve (isotonic regression, Barlow et al., 1972): that a longer match or a likelier token is accepted
no less often is all that can be trusted of it. Memory is fixed: 32 KiB a drafter. What candidates of several drafters
survive beside each other is learned from these estimates (`merged_survival`).

The engine reads and counts in compiled code, node by node (`slipstream_kernels.merging`); the methods here that do so
for arrays of nodes are what that code is checked against, and what shapes for the rejection rules come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NewType, TypeVar, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.drafting.tree import ROOT

Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

ForecastSurvivals = NewType("ForecastSurvivals", NDArray[np.float64])
"""Survivals that know nothing of what this step draws; a type of their own, so that a checker tells them apart."""

Survivals = TypeVar("Survivals", bound=Float64)

NUM_RANKS = 8
"""Later siblings count as the last of these."""

_DEPTHS = np.array([0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7])
"""Cell of each depth (index); 13 and deeper are one."""

_NUM_DEPTHS = 8

_MATCHES = np.array([0, 0, 1, 2, 2, 3, 3, 3, 3, *[4] * 8, *[5] * 16, 6])
"""Cell of each match length (index): 1, 2, 3-4, 5-8, 9-16, 17-32, longer."""

_SCORE_EDGES = np.array([0.01, 0.03, 0.06, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])

_LEANING_TRIALS = 4.0
"""How many trials of its own weigh as much as the wider cell's estimate."""

_REFIT_TRIALS = 64
"""New trials after which estimates are made anew, at first; later once they are a quarter of what is known."""

NUM_BINS = 20
"""Of a calibration curve."""

CURVE_WINDOW_TRIALS = 50_000


NUM_MATCH_LEVELS = int(_MATCHES[-1]) + 1
NUM_SCORE_LEVELS = len(_SCORE_EDGES) + 1

_NONE: Mapping[str, int] = MappingProxyType({})


def survival_in_chain(estimates_SL: Float64, *, depth: int, score: float) -> float:
    """What the estimates [depths, levels] of a chain's cells say of its token at this depth, which it scores so."""
    return float(estimates_SL[_DEPTHS.take(depth, mode="clip"), _score_levels(np.array(score))])


class NodeFeatures(msgspec.Struct, frozen=True):
    """What is known of X nodes before their tokens are drawn, integer arrays of any shape.

    `ranks_X` is the order among siblings of the same drafter from 0, `depths_X` 1 for children of the root,
    `match_lengths_X` what a look-up found; drafters that look nothing up may give zeros.
    """

    ranks_X: Int32
    depths_X: Int32
    match_lengths_X: Int32

    def of(self, nodes: Bool) -> NodeFeatures:
        """Those of some nodes."""
        return NodeFeatures(self.ranks_X[nodes], self.depths_X[nodes], self.match_lengths_X[nodes])


class Trials(msgspec.Struct, frozen=True):
    """Which of X nodes were tried, and which of those were accepted."""

    is_trial_X: Bool
    is_accepted_X: Bool


def along_paths(survivals_X: Survivals, parents_X: Int32) -> Survivals:
    """Each node's product with its ancestors; parents are node numbers among the X or ROOT. Inputs are not changed.

    Products never rise along a path: each factor counts 2**-40 less than it is, and what falls below 1e-200 is 0.
    """
    # Each round doubles how many ancestors a product holds; ROOT looks at the entry after the last node. A child's
    # factors are grouped otherwise than its parent's, and so round otherwise, by less than what is taken off.
    products = np.append(survivals_X * (1 - 2**-40), 1.0)
    above = np.append(parents_X, ROOT).astype(np.intp)
    while above.max() >= 0:
        products *= products.take(above)
        above = above.take(above)
    products[products < 1e-200] = 0.0
    return cast(Survivals, products[:-1])


def outcomes(
    token_ids_X: Int32, parents_X: Int32, depths_X: Int32, *, requests_X: Int32, committed_BS: Int32
) -> Trials:
    """Trials under the equality rule: candidates, verified or not, beside what was committed.

    `committed_BS` holds the tokens that came after each request's root, -1 where they are not known yet; `requests_X`
    is each node's line of it. Parents come before their children.
    """
    places = depths_X - 1
    known = np.full(len(token_ids_X), -1, dtype=np.int64)
    is_within = places < committed_BS.shape[1]
    known[is_within] = committed_BS[requests_X[is_within], places[is_within]]
    # A path agrees if every node on it does.
    agrees = along_paths((token_ids_X == known).astype(np.float64), parents_X) > 0
    return Trials(trials(parents_X, agrees).is_trial_X & (known >= 0), agrees)


def trials(parents_X: Int32, is_accepted_X: Bool) -> Trials:
    """Trials among verified nodes, under any rule; `is_accepted_X` marks the accepted path."""
    return Trials(np.append(is_accepted_X, True)[parents_X], is_accepted_X)


class CalibrationBin(msgspec.Struct, frozen=True):
    """Trials of similar predictions: their mean prediction, the share accepted, and how many; newer ones count more."""

    predicted: float
    accepted_ratio: float
    num_trials: float


class CalibrationCurve:
    """Predicted against real survival, in bins of equal width; each prediction was made before its outcome counted.

    `sums` [3, NUM_BINS] float64 holds the trials of each bin, the sum of their predictions, and how many were accepted.
    """

    def __init__(self) -> None:
        self.sums = np.zeros((3, NUM_BINS))

    def add(self, predicted_X: Float64, is_accepted_X: Bool) -> None:
        """These were predicted, and this came of them."""
        bins = np.minimum((predicted_X * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        self.sums[0] += np.bincount(bins, minlength=NUM_BINS)
        self.sums[1] += np.bincount(bins, weights=predicted_X, minlength=NUM_BINS)
        self.sums[2] += np.bincount(bins, weights=is_accepted_X, minlength=NUM_BINS)

    def forget(self, num_trials: float) -> None:
        """So many trials were added since the last call: older ones count less, by half in CURVE_WINDOW_TRIALS."""
        self.sums *= 0.5 ** (num_trials / CURVE_WINDOW_TRIALS)

    def bins(self) -> list[CalibrationBin]:
        """The bins that have trials, by rising prediction."""
        return [
            CalibrationBin(float(predicted / count), float(accepted / count), float(count))
            for count, predicted, accepted in self.sums.T
            if count > 0
        ]

    def expected_error(self) -> float:
        """Mean of |predicted - real| over bins, each by its trials; 0 without any."""
        counts, predicted, accepted = self.sums
        return float(np.abs(predicted - accepted).sum() / counts.sum()) if counts.sum() > 0 else 0.0


class SurvivalModel:
    """Survival of the nodes of several drafters; see the module's docstring.

    `matching` drafters are told apart by match length, `scoring` ones by their own score. Each is given how many of its
    trials its estimates remember: fewer follow drift sooner, more are less noisy.
    """

    def __init__(self, *, matching: Mapping[str, int] = _NONE, scoring: Mapping[str, int] = _NONE) -> None:
        """Raises ValueError for a number of trials below 1."""
        self._matching = {drafter: Cells(NUM_MATCH_LEVELS, window) for drafter, window in matching.items()}
        self._scoring = {drafter: Cells(NUM_SCORE_LEVELS, window) for drafter, window in scoring.items()}

    def cells(self, drafter: str) -> Cells:
        """Counts and estimates of one drafter."""
        return self._matching.get(drafter) or self._scoring_cells(drafter)

    def forecast(self, drafter: str, features: NodeFeatures) -> ForecastSurvivals:
        """Survivals that know nothing of what is drawn: those of a shape, for any rule, and those of look-ups."""
        if drafter in self._matching:
            return ForecastSurvivals(self._matching[drafter].said_of(features, _match_levels(features)))
        return ForecastSurvivals(self._scoring_cells(drafter).unsaid_of(features))

    def read(self, drafter: str, features: NodeFeatures, scores_X: Float64) -> Float64:
        """Survivals of drawn candidates, for the equality rule: `scores_X` is the drafter's own idea of them, 0 to 1.

        A NaN is the lowest score: a draft that computes one is not to be believed. Raises ValueError for a drafter
        that has no scores.
        """
        return self._scoring_cells(drafter).said_of(features, _score_levels(scores_X))

    def observe(self, drafter: str, features: NodeFeatures, scores_X: Float64 | None, result: Trials) -> None:
        """Count the trials among these nodes; the scores are those of `read`, None for a drafter that matches.

        Raises ValueError if scores are given for a drafter that has none, or none for one that has.
        """
        tried = result.is_trial_X
        if not tried.any():
            return
        features = features.of(tried)
        if scores_X is None:
            cells, levels = self._matching.get(drafter), _match_levels(features)
        else:
            cells, levels = self._scoring.get(drafter), _score_levels(scores_X[tried])
        if cells is None:
            raise ValueError(
                f"drafter is {drafter!r}; give scores for {[*self._scoring]}, None for {[*self._matching]}"
            )
        cells.count(features, levels, result.is_accepted_X[tried])

    def forget(self, drafter: str) -> None:
        """Start anew with a drafter whose weights were replaced; its calibration curve goes on."""
        self.cells(drafter).forget()

    @property
    def num_bytes(self) -> int:
        """Memory of counts and estimates, whatever was observed."""
        return sum(cells.num_bytes for cells in (*self._matching.values(), *self._scoring.values()))

    def _scoring_cells(self, drafter: str) -> Cells:
        if drafter not in self._scoring:
            raise ValueError(f"drafter is {drafter!r}, expected one that scores: {[*self._scoring]}")
        return self._scoring[drafter]


class Cells:
    """Counts and estimates of one drafter, by rank, depth and level: what it says of a candidate, as a small number.

    float64 arrays [ranks, depths, levels] that stay where they are: `said`, the estimates; `new_tried` and
    `new_accepted`, what was counted since they were made; and `curve`.
    """

    def __init__(self, num_levels: int, window_trials: int) -> None:
        if window_trials < 1:
            raise ValueError(f"window_trials is {window_trials}, expected at least 1")
        self._keep_ratio = 1 - 1 / window_trials
        shape = (NUM_RANKS, _NUM_DEPTHS, num_levels)
        self._tried, self._accepted, self.new_tried, self.new_accepted, self.said = np.zeros((5, *shape))
        self.curve = CalibrationCurve()
        self.forget()

    def forget(self) -> None:
        """Start anew; the calibration curve goes on."""
        for table in (self._tried, self._accepted, self.new_tried, self.new_accepted):
            table[:] = 0
        self._fit()

    @property
    def num_bytes(self) -> int:
        """Memory of counts and estimates."""
        tables = (self._tried, self._accepted, self.new_tried, self.new_accepted, self.said, self._unsaid)
        return sum(table.nbytes for table in tables)

    def said_of(self, features: NodeFeatures, levels_X: NDArray[np.intp]) -> Float64:
        """Survivals given what the drafter says."""
        survivals_X: Float64 = self.said.take(_shape_cells(features) * self.said.shape[2] + levels_X)
        return survivals_X

    def unsaid_of(self, features: NodeFeatures) -> Float64:
        """Survivals by rank and depth alone."""
        survivals_X: Float64 = self._unsaid.take(_shape_cells(features))
        return survivals_X

    def count(self, features: NodeFeatures, levels_X: NDArray[np.intp], is_accepted_X: Bool) -> None:
        """These were tried."""
        self.curve.add(self.said_of(features, levels_X), is_accepted_X)
        cells = _shape_cells(features) * self.said.shape[2] + levels_X
        for table, weights in ((self.new_tried, None), (self.new_accepted, is_accepted_X)):
            table += np.bincount(cells, weights=weights, minlength=table.size).reshape(table.shape)
        self.refit_if_due()

    def refit_if_due(self) -> None:
        """Make the estimates anew if enough was counted since."""
        num_new = self.new_tried.sum()
        if num_new < max(_REFIT_TRIALS, self._num_known / 4):
            return
        keep = self._keep_ratio**num_new
        for table, new in ((self._tried, self.new_tried), (self._accepted, self.new_accepted)):
            table *= keep
            table += new
            new[:] = 0
        self.curve.forget(num_new)
        self._fit()

    def _fit(self) -> None:
        # Before any evidence the first of several siblings is right half the time, the second a quarter, and so on.
        guess: Float64 = np.exp2(-(np.arange(NUM_RANKS) + 1.0)).reshape(-1, 1, 1)
        of_rank = self._leaning_on(guess, merged_axes=(1, 2))
        self._unsaid = self._leaning_on(of_rank, merged_axes=(2,))
        estimate = self._leaning_on(self._leaning_on(of_rank, merged_axes=(1,)), merged_axes=())
        self.said[:] = _rising(estimate, self._tried + _LEANING_TRIALS)
        self._num_known = float(self._tried.sum())

    def _leaning_on(self, wider: Float64, *, merged_axes: tuple[int, ...]) -> Float64:
        """Accepted over tried in cells that span `merged_axes`, with the wider estimate as _LEANING_TRIALS more."""
        tried = self._tried.sum(axis=merged_axes, keepdims=True)
        accepted = self._accepted.sum(axis=merged_axes, keepdims=True)
        estimate: Float64 = (accepted + _LEANING_TRIALS * wider) / (tried + _LEANING_TRIALS)
        return estimate


def _shape_cells(features: NodeFeatures) -> NDArray[np.intp]:
    ranks_X = np.minimum(features.ranks_X, NUM_RANKS - 1).astype(np.intp)
    cells_X: NDArray[np.intp] = ranks_X * _NUM_DEPTHS + _DEPTHS.take(features.depths_X, mode="clip")
    return cells_X


def _match_levels(features: NodeFeatures) -> NDArray[np.intp]:
    levels: NDArray[np.intp] = _MATCHES.take(features.match_lengths_X, mode="clip")
    return levels


def _score_levels(scores_X: Float64) -> NDArray[np.intp]:
    levels: NDArray[np.intp] = np.searchsorted(_SCORE_EDGES, np.nan_to_num(scores_X, nan=0.0), side="right")
    return levels


def _rising(values: Float64, weights: Float64) -> Float64:
    """The weighted isotonic regression along the last axis, of all lines at once, by its max-min formula.

    The value at i is the largest, over j <= i, of the smallest weighted mean of j..k over k >= i.
    """
    # With that axis first, each operation runs over all lines at once.
    leading, weighing = np.ascontiguousarray(np.moveaxis(values, -1, 0)), np.moveaxis(weights, -1, 0)
    none = ((1, 0),) + ((0, 0),) * (values.ndim - 1)
    sums, totals = (np.pad(np.cumsum(terms, axis=0), none) for terms in (leading * weighing, weighing))
    rising = np.full_like(leading, -np.inf)
    for first in range(len(rising)):
        means = (sums[first + 1 :] - sums[first]) / (totals[first + 1 :] - totals[first])
        smallest = np.minimum.accumulate(means[::-1], axis=0)[::-1]
        np.maximum(rising[first:], smallest, out=rising[first:])
    return np.ascontiguousarray(np.moveaxis(rising, 0, -1))
