"""Seconds of steps over a grid of rows and contexts, times a pace: both corrected by every step that is seen.

A Kalman filter (Kalman, 1960). The state is the pace and the points of the grid; what is not known of them is kept as a
covariance, in units of the variance of a single step's time. The pace is lost within a few steps, since the machine
changes within seconds. Points were measured at start-up, with other tokens and other things in the processor's caches
than those of the day, so they may be far off, and neighbours are off together; then they drift, slowly. So the first
steps of a size correct the table, there and around it, later ones rather the pace, and a size that was not seen for
long follows again more.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_POINT_AT_FIRST = 8.0
"""Variance of a point at start-up: a quarter of its seconds, where a step's time varies by a tenth."""

_POINT_DRIFT = 0.02
"""Variance that a point gains between two steps that are seen: seen by all of them, it takes over an eighth."""

_PACE_AT_FIRST, _PACE_DRIFT = 0.25, 0.05
"""Variance of the pace, and what it gains between two such steps: where sizes are known, it takes over a fifth."""

_ALIKE_PER_DOUBLING = 0.7
"""Correlation of sizes of which one has twice as many rows as the other."""

_ALIKE_PER_CONTEXT = 0.9
"""Correlation of neighbouring contexts."""

_KEPT = 1 - _POINT_DRIFT / _POINT_AT_FIRST
"""So no point is ever known less than at start-up."""

_SMALLEST_S = 1e-9
"""No step is predicted to take no time, whatever noise the table has taken over."""


class StepTable:
    """Straight lines between G x C points, level outside them; `pace` is what to multiply them with."""

    def __init__(
        self, rows: Sequence[int], contexts: Sequence[int], seconds_GC: Float64, *, errors_s_GC: Float64
    ) -> None:
        """`errors_s_GC` says by how much points may be wrong beside each other: by equal shares of it.

        Raises ValueError unless rows and contexts ascend, at least one of each.
        """
        for points in (rows, contexts):
            if not points or any(one >= other for one, other in itertools.pairwise(points)):
                raise ValueError(f"rows {rows}, contexts {contexts}: expected both ascending, not empty")
        self.pace = 1.0
        self.rows = np.array(rows, dtype=np.float64)
        self._row_points, self._context_points = [float(one) for one in rows], [float(one) for one in contexts]
        self._seconds_GC = np.maximum(seconds_GC, _SMALLEST_S)
        self._errors_s_P = errors_s_GC.reshape(-1).copy()
        doublings, steps = np.log2(self.rows), np.arange(len(contexts))
        alike = _ALIKE_PER_DOUBLING ** np.abs(doublings[:, None] - doublings)
        # A line and column for every point, contexts varying fastest, and the last ones for the pace.
        alike_PP = np.kron(alike, _ALIKE_PER_CONTEXT ** np.abs(steps[:, None] - steps))
        self._covariance = np.pad(_POINT_AT_FIRST * alike_PP, (0, 1))
        self._drifts = np.pad(_POINT_DRIFT * alike_PP, (0, 1))
        self._covariance[-1, -1], self._drifts[-1, -1] = _PACE_AT_FIRST, _PACE_DRIFT

    def at(self, num_rows: float, context_tokens: float) -> float:
        """Seconds there, without the pace."""
        points, shares = self._around(num_rows, context_tokens)
        return float(shares @ self._seconds_GC.reshape(-1)[points])

    def line(self, context_tokens: float) -> Float64:
        """Seconds at every number of rows [G] for this context, without the pace."""
        return self._line(self._seconds_GC, context_tokens)

    def pace_line(self, context_tokens: float) -> Float64:
        """What share of an error is the pace's, at every number of rows [G]: more, the better it is known."""
        variances_P = self._covariance.diagonal()
        variances_G = self._line(variances_P[:-1].reshape(self._seconds_GC.shape), context_tokens)
        shares_G: Float64 = variances_P[-1] / (1.0 + variances_P[-1] + variances_G)
        return shares_G

    def lower(self, seconds_G: Float64) -> None:
        """Take so much from every number of rows."""
        self._seconds_GC = np.maximum(self._seconds_GC - seconds_G[:, None], _SMALLEST_S)

    def correct(self, num_rows: float, context_tokens: float, *, expected_s: float, error_s: float) -> None:
        """A step there took so much longer than expected (shorter, below 0), both without the pace."""
        points, shares = self._around(num_rows, context_tokens)
        covariance = self._covariance
        with_step = shares @ covariance[points] + covariance[-1]
        gains = with_step / (1.0 + shares @ with_step[points] + with_step[-1])
        seconds_P = self._seconds_GC.reshape(-1)
        seconds_P += error_s / (shares @ self._errors_s_P[points]) * gains[:-1] * self._errors_s_P
        np.maximum(seconds_P, _SMALLEST_S, out=seconds_P)
        self.keep_pace(error_s / expected_s * float(gains[-1]))
        covariance -= gains[:, None] * with_step
        covariance *= _KEPT
        covariance += self._drifts

    def keep_pace(self, change_ratio: float) -> None:
        """Everything takes longer by this share."""
        self.pace *= 1.0 + change_ratio

    def _line(self, values_GC: Float64, context_tokens: float) -> Float64:
        around = _around(self._context_points, context_tokens)
        line_G: Float64 = sum((share * values_GC[:, place] for place, share in around), np.zeros(1))
        return line_G

    def _around(self, num_rows: float, context_tokens: float) -> tuple[list[int], Float64]:
        """Points around a place, and their shares."""
        width = len(self._context_points)
        rows, contexts = _around(self._row_points, num_rows), _around(self._context_points, context_tokens)
        points = [row * width + context for row, _ in rows for context, _ in contexts]
        return points, np.array([share * other for _, share in rows for _, other in contexts])


def _around(points: Sequence[float], value: float) -> tuple[tuple[int, float], ...]:
    """Places of the points around a value, and their shares."""
    right = bisect.bisect_left(points, value)
    if right == 0:
        return ((0, 1.0),)
    if right == len(points):
        return ((right - 1, 1.0),)
    share = (value - points[right - 1]) / (points[right] - points[right - 1])
    return ((right, 1.0),) if share == 1.0 else ((right - 1, 1 - share), (right, share))
