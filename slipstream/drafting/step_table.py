"""Seconds of steps over a grid of rows and contexts, corrected by every step that is seen.

A Kalman filter (Kalman, 1960). What is not known of the points is kept as a covariance, in units of the variance of a
single step's time. Points that lie near each other are wrong together, and drift together: so a step moves those around
it most, their neighbours some, and those that no step has moved for long more than others. What drifts is what the
measurement at start-up could not know: what the processor's caches hold, and what the tokens of the day wake.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_DRIFT = 0.02
"""What drifts between two steps that are seen, as a share of what is not known at start-up: one counts a seventh."""

_ALIKE_PER_DOUBLING = 0.7
"""Correlation of sizes of which one has twice as many rows as the other."""

_ALIKE_PER_CONTEXT = 0.9
"""Correlation of neighbouring contexts."""

_SMALLEST_S = 1e-9
"""No step is predicted to take no time, whatever noise the table has taken over."""


class StepTable:
    """Straight lines between G x C points; level outside them."""

    def __init__(
        self, rows: Sequence[int], contexts: Sequence[int], seconds_GC: Float64, *, errors_s_GC: Float64
    ) -> None:
        """`errors_s_GC` says by how much points may be wrong beside each other: by equal shares of it.

        Raises ValueError unless rows and contexts ascend, at least one of each.
        """
        for points in (rows, contexts):
            if not points or any(one >= other for one, other in itertools.pairwise(points)):
                raise ValueError(f"rows {rows}, contexts {contexts}: expected both ascending, not empty")
        self.rows = np.array(rows, dtype=np.float64)
        self._row_points, self._context_points = [float(one) for one in rows], [float(one) for one in contexts]
        self._seconds_GC = np.maximum(seconds_GC, _SMALLEST_S)
        self._errors_s_P = errors_s_GC.reshape(-1).copy()
        doublings, steps = np.log2(self.rows), np.arange(len(contexts))
        alike = _ALIKE_PER_DOUBLING ** np.abs(doublings[:, None] - doublings)
        # One line and column a point, contexts varying fastest.
        self._covariance_PP = np.kron(alike, _ALIKE_PER_CONTEXT ** np.abs(steps[:, None] - steps))
        self._drifts_PP = _DRIFT * self._covariance_PP

    def at(self, num_rows: float, context_tokens: float) -> float:
        """Seconds there."""
        points, shares = self._around(num_rows, context_tokens)
        return float(shares @ self._seconds_GC.reshape(-1)[points])

    def line(self, context_tokens: float) -> Float64:
        """Seconds at every number of rows [G], for this context."""
        return sum(
            (share * self._seconds_GC[:, place] for place, share in _around(self._context_points, context_tokens)),
            np.zeros(1),
        )

    def lower(self, seconds_G: Float64) -> None:
        """Take so much from every number of rows."""
        self._seconds_GC = np.maximum(self._seconds_GC - seconds_G[:, None], _SMALLEST_S)

    def correct(self, num_rows: float, context_tokens: float, *, error_s: float) -> None:
        """A step there took so much more than it should have."""
        points, shares = self._around(num_rows, context_tokens)
        with_step_P = shares @ self._covariance_PP[points]
        gains_P = with_step_P / (1.0 + shares @ with_step_P[points])
        seconds_P = self._seconds_GC.reshape(-1)
        seconds_P += error_s / (shares @ self._errors_s_P[points]) * gains_P * self._errors_s_P
        np.maximum(seconds_P, _SMALLEST_S, out=seconds_P)
        self._covariance_PP -= gains_P[:, None] * with_step_P
        self._covariance_PP *= 1 - _DRIFT
        self._covariance_PP += self._drifts_PP

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
