"""What measured turns add up to: loops, ratios and bounds, ceilings, the best fixed setting, how passes vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

LONGEST_PERIOD = 24
_LOOP_TURNS = 3
_SHORTEST_LOOP = 16
_RESAMPLES = 4000

Float64 = NDArray[np.float64]


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether an answer ends in a loop.

    It does if for some period of at most LONGEST_PERIOD tokens its last max(3 periods, 16) tokens repeat with it. A
    stop token at the end is to be left out by the caller.
    """
    for period in range(1, LONGEST_PERIOD + 1):
        length = max(_LOOP_TURNS * period, _SHORTEST_LOOP)
        if length > len(token_ids):
            continue
        tail = token_ids[-length:]
        if all(tail[i] == tail[i - period] for i in range(period, length)):
            return True
    return False


def time_ratio(plain_s: Sequence[float], system_s: Sequence[float]) -> float:
    """How many times as fast a system served all groups as plain decoding, which took `plain_s` for the same ones."""
    _check_paired(plain_s, system_s)
    return float(np.sum(plain_s) / np.sum(system_s))


def ratio_bounds(plain_s: Sequence[float], system_s: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Bounds of 95 % for `time_ratio`, by a bootstrap over the groups in which both were measured by turns."""
    _check_paired(plain_s, system_s)
    plain, system = np.asarray(plain_s, np.float64), np.asarray(system_s, np.float64)
    drawn = np.random.default_rng(seed).integers(len(plain), size=(_RESAMPLES, len(plain)))
    ratios = plain[drawn].sum(1) / system[drawn].sum(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def ceiling(plain_pass_s: Sequence[float], pass_s: Mapping[str, Sequence[float]]) -> tuple[str, float]:
    """The fixed setting that would serve fastest if nothing but passes of the target took time, and how fast.

    For n nodes that is tokens(n) x cost(1) / cost(n), with what n nodes gave and what their passes cost: the time of
    plain decoding's passes over that of the setting's for the same tokens. Not speculating is among the settings.
    """
    reached = {name: time_ratio(plain_pass_s, seconds) for name, seconds in pass_s.items()}
    return max([*reached.items(), ("plain", 1.0)], key=lambda setting: setting[1])


def over_best_fixed(fixed_s: Mapping[str, Sequence[float]], system_s: Sequence[float]) -> tuple[float, tuple[str, str]]:
    """Time of the best fixed setting over a system's, the setting chosen on one half and compared on the other.

    Both halves choose once for the other; groups alternate between them. The names are those chosen. With a single
    group there is no other half, and it both chooses and compares.
    """
    num_groups = len(system_s)
    halves = [list(range(start, num_groups, 2)) for start in (0, 1)] if num_groups > 1 else [[0], [0]]
    chosen: list[str] = []
    theirs = ours = 0.0
    for choosing, comparing in (halves, halves[::-1]):
        best = min(fixed_s, key=lambda name: sum(fixed_s[name][group] for group in choosing))
        chosen.append(best)
        theirs += sum(fixed_s[best][group] for group in comparing)
        ours += sum(system_s[group] for group in comparing)
    return theirs / ours, (chosen[0], chosen[1])


def spread(pass_times_s: Sequence[float]) -> float:
    """Mean of |median - time| / time: how far a prediction is off that knows the median of passes in advance."""
    times = np.asarray(pass_times_s, np.float64)
    return float(np.mean(np.abs(np.median(times) - times) / times))


def _check_paired(plain_s: Sequence[float], system_s: Sequence[float]) -> None:
    if len(plain_s) != len(system_s) or not len(plain_s):
        raise ValueError(f"{len(plain_s)} and {len(system_s)} times; expected a pair for every group, at least one")
