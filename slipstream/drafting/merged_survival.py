"""How often candidates of several drafters are accepted beside each other, behind one node.

    source            the chain, Token Recycling, or look-ups
    set of sources    which of them propose a candidate: bit s is set if source s does
    utility           a weighted sum of the log-odds that the sources give a candidate (`survival`), and a constant;
                      every set of sources has weights of its own
    share             the candidate's part of exp(utility), among its siblings and "none of them", whose utility is 0

At most one sibling is accepted, so their shares are a multinomial logit (McFadden, 1974): what speaks for one speaks
against the others. A set's weights say how far its sources are to be believed: a token that the draft model and a
look-up agree on is worth more than either says, one that the draft model passes over is worth less. Weights follow the
gradient of the log-likelihood, node by node along every path that was taken, in steps scaled by its past squares
(AdaGrad, Duchi et al., 2011), which are slowly forgotten. Before any evidence a lone candidate survives as its source
says, and one of several sources as they say in the mean of their log-odds.

The engine reads and counts in compiled code (`slipstream_kernels.merging`), which is checked against this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slipstream.drafting.survival import CalibrationCurve

Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

NUM_SOURCES = 3
"""The chain, Token Recycling, look-ups; in a set of sources they are 1, 2 and 4."""

_SUREST = 1e-4
"""No survival counts as less than this, or as nearer to 1."""

_RATE = 0.15
"""No step moves a weight further."""

_KEPT = 0.9999
"""What past squares of the gradient still count for with every new node at which the set of sources is seen."""

_LEAST_SQUARE = 1.0
"""Of all past gradients together: so long as there were few, or small ones, steps are small too."""


class MergedSurvival:
    """Learns what candidates behind one node survive.

    `weights` float64 [sets, NUM_SOURCES + 1], the constant last, and the past `squares` of their gradients stay where
    they are; `curve` is the calibration curve of shares.
    """

    def __init__(self) -> None:
        sets = np.arange(1 << NUM_SOURCES)
        has_source = (sets[:, None] >> np.arange(NUM_SOURCES)) & 1
        self.weights = np.zeros((len(sets), NUM_SOURCES + 1))
        self.weights[:, :NUM_SOURCES] = has_source / np.maximum(has_source.sum(1, keepdims=True), 1)
        self.squares = np.full_like(self.weights, _LEAST_SQUARE)
        self.curve = CalibrationCurve()
        self._num_trials = 0.0

    def shares(self, survivals_CO: Float64) -> Float64:
        """How often each of C siblings is accepted, float64 [C].

        `survivals_CO` [C, NUM_SOURCES] is what each source says of it, NaN where it does not propose it.
        """
        sets_C, features_CF = _features(survivals_CO)
        utilities_C = (self.weights[sets_C] * features_CF).sum(1)
        most = utilities_C.max(initial=0.0)
        parts_C = np.exp(utilities_C - most)
        shares_C: Float64 = parts_C / (parts_C.sum() + np.exp(-most))
        return shares_C

    def learn(self, survivals_CO: Float64, shares_C: Float64, is_accepted_C: Bool) -> None:
        """One of these siblings was accepted, or none; `shares_C` is what was said of them."""
        sets_C, features_CF = _features(survivals_CO)
        slopes = np.zeros_like(self.weights)
        np.add.at(slopes, sets_C, features_CF * (is_accepted_C - shares_C)[:, None])
        for seen in np.unique(sets_C):
            squares = _KEPT * self.squares[seen] + slopes[seen] ** 2
            self.squares[seen] = np.maximum(squares, _LEAST_SQUARE)
            self.weights[seen] += _RATE * slopes[seen] / np.sqrt(self.squares[seen])
        self.curve.add(shares_C, is_accepted_C)

    def let_curve_fade(self) -> None:
        """Older trials of the curve count less, by those that came since this was called last."""
        self.curve.forget(self.curve.sums[0].sum() - self._num_trials)
        self._num_trials = float(self.curve.sums[0].sum())


def _features(survivals_CO: Float64) -> tuple[Int32, Float64]:
    """The set of sources of each candidate, and [C, NUM_SOURCES + 1] their log-odds (0 for the others) and 1."""
    is_source_CO = ~np.isnan(survivals_CO)
    bounded_CO = np.clip(survivals_CO, _SUREST, 1 - _SUREST)
    log_odds_CO = np.where(is_source_CO, np.log(bounded_CO / (1 - bounded_CO)), 0.0)
    sets_C = (is_source_CO << np.arange(NUM_SOURCES)).sum(1).astype(np.int32)
    return sets_C, np.hstack([log_odds_CO, np.ones((len(survivals_CO), 1))])
