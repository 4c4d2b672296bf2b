"""A cell of the benchmark of drafting: what every system did in it, and what that says of them."""

from __future__ import annotations

import math

import msgspec

from benchmarks.drafting_figures import ceiling, over_best_fixed, ratio_bounds, spread, time_ratio
from benchmarks.drafting_systems import ADAPTED, PLAIN, Query, Served, System, is_fixed


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One cell: what every system did with each group, and llama.cpp's time over our plain one by what it drafts.

    Of `num_prompts` looked at for all cells of its size and temperature `num_loops` and `num_short` were left out.
    """

    name: str
    size: str
    is_moe: bool
    batch: int
    temperature: float
    systems: tuple[System, ...]
    groups: list[list[Query]]
    served: dict[str, list[Served]]
    num_prompts: int
    num_loops: int
    num_short: int
    others_share: float
    llama_over_plain: dict[int, float]


def seconds(cell: Cell, system: str) -> list[float]:
    """Time of a system by group."""
    return [one.seconds for one in cell.served[system]]


def speed_up(cell: Cell, system: str) -> float:
    """Over our plain decoding."""
    return time_ratio(seconds(cell, PLAIN), seconds(cell, system))


def speed_up_bounds(cell: Cell, system: str) -> tuple[float, float]:
    """Paired bounds of 95 % of `speed_up`."""
    return ratio_bounds(seconds(cell, PLAIN), seconds(cell, system))


def over_faster_plain(cell: Cell, system: str) -> float:
    """Speed over the faster of our plain decoding and llama.cpp's, where that was measured."""
    return speed_up(cell, system) * min(1.0, cell.llama_over_plain.get(0, 1.0))


def over_best_llama(cell: Cell) -> float:
    """Speed of the budgeted merge with the adapted draft over llama.cpp's best way; NaN if it was not measured."""
    return speed_up(cell, ADAPTED) * min(cell.llama_over_plain.values(), default=math.nan)


def ceiling_of(cell: Cell, *, with_draft: bool) -> tuple[str, float]:
    """`ceiling` over the fixed settings, without those that need the adapted draft or with them."""
    names = _fixed_settings(cell, with_draft=with_draft)
    pass_s = {name: [one.pass_s for one in cell.served[name]] for name in names}
    return ceiling([one.pass_s for one in cell.served[PLAIN]], pass_s)


def over_best_fixed_of(cell: Cell, system: str, *, with_draft: bool) -> tuple[float, tuple[str, str]]:
    """`over_best_fixed`; plain decoding is a setting too."""
    names = [PLAIN, *_fixed_settings(cell, with_draft=with_draft)]
    return over_best_fixed({name: seconds(cell, name) for name in names}, seconds(cell, system))


def plain_spread(cell: Cell) -> float:
    """`spread` of plain decoding's passes, which all have one row at batch 1."""
    return spread([one for served in cell.served[PLAIN] for one in served.pass_times_s])


def num_differing(cell: Cell, system: str) -> int:
    """Requests that got other tokens than from plain decoding."""
    pairs = zip(cell.served[PLAIN], cell.served[system], strict=True)
    return sum(a != b for plain, other in pairs for a, b in zip(plain.token_ids, other.token_ids, strict=True))


def _fixed_settings(cell: Cell, *, with_draft: bool) -> list[str]:
    return [one.name for one in cell.systems if is_fixed(one) and (with_draft or not one.has_draft)]
