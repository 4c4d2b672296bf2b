"""Tables, goals and the picture of the benchmark of drafting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec

from benchmarks.drafting_cells import (
    Cell,
    ceiling_of,
    num_differing,
    over_best_fixed_of,
    over_best_llama,
    over_faster_plain,
    plain_spread,
    seconds,
    speed_up,
    speed_up_bounds,
)
from benchmarks.drafting_figures import is_loop, time_ratio
from benchmarks.drafting_systems import ADAPTED, BUDGETED, PLAIN, UNTRAINED, Served
from benchmarks.engine_sizes import WIDENED
from benchmarks.report import Goal, Table

mpl.use("Agg")
from matplotlib import pyplot

MAX_OTHERS_SHARE = 0.05
_NAN = math.nan


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What goals ask for. Every cell, then batch 1 at temperature 0, then what was learned."""

    share_of_ceiling: float
    lower_bound_over_plain: float
    over_best_fixed: float
    dense_adapted: float
    moe_untrained: float
    moe_adapted: float
    over_llama: float
    step_error_ratio: float
    calibration_error: float


FULL_BOUNDS = Bounds(
    share_of_ceiling=0.9,
    lower_bound_over_plain=0.97,
    over_best_fixed=0.95,
    dense_adapted=2.0,
    moe_untrained=1.1,
    moe_adapted=1.3,
    over_llama=1.1,
    step_error_ratio=0.1,
    calibration_error=0.05,
)
QUICK_BOUNDS = Bounds(
    share_of_ceiling=0.75,
    lower_bound_over_plain=0.9,
    over_best_fixed=0.85,
    dense_adapted=1.5,
    moe_untrained=1.0,
    moe_adapted=1.1,
    over_llama=1.0,
    step_error_ratio=0.2,
    calibration_error=0.1,
)


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """What a budgeted system had learned at the end of a size and temperature."""

    where: str
    calibration_error: float
    step_error_ratio: float
    mode_counts: dict[str, int]


def tables_of(cells: Sequence[Cell], learned: Sequence[Learned]) -> list[Table]:
    """The summary, domains at batch 1, every system of every cell, and what was learned."""
    return [_summary(cells), _domains(cells), _every_system(cells), _learned(learned)]


def _summary(cells: Sequence[Cell]) -> Table:
    rows = []
    for cell in cells:
        best, reach = ceiling_of(cell, with_draft=True)
        over_fixed, chosen = over_best_fixed_of(cell, ADAPTED, with_draft=True)
        rows.append(
            (
                cell.name,
                f"{reach:.2f} ({best})",
                _with_bounds(cell, ADAPTED),
                f"{speed_up(cell, ADAPTED) / reach:.0%}",
                f"{over_fixed:.2f} ({' / '.join(dict.fromkeys(chosen))})",
                f"{ceiling_of(cell, with_draft=False)[1]:.2f}",
                _with_bounds(cell, UNTRAINED),
                f"{over_best_llama(cell):.2f}" if cell.llama_over_plain else "",
                f"{plain_spread(cell):.1%}" if cell.batch == 1 else "",
                _remarks(cell),
            )
        )
    return Table(
        columns=(
            "cell",
            "ceiling",
            "adapted over plain",
            "of ceiling",
            "over best fixed",
            "ceiling, nothing trained",
            "nothing trained over plain",
            "adapted over best llama.cpp",
            "plain passes off their median",
            "remarks",
        ),
        rows=tuple(rows),
        caption=f"The budgeted merge, time of the others over its own, with bounds of 95 %; {WIDENED}. How far plain "
        "passes are off their median says what a prediction of one row's time would err that knew it in advance.",
    )


def _with_bounds(cell: Cell, system: str) -> str:
    low, high = speed_up_bounds(cell, system)
    return f"{speed_up(cell, system):.2f} ({low:.2f} to {high:.2f})"


def _remarks(cell: Cell) -> str:
    plain = [ids for served in cell.served[PLAIN] for ids in served.token_ids]
    loops = sum(is_loop(ids[:-1]) for ids in plain)
    text = f"{len(plain)} requests; of {cell.num_prompts} left out {cell.num_loops} loops, {cell.num_short} short"
    if loops:
        text += f"; {loops} loops more than foreseen"
    if cell.others_share > MAX_OTHERS_SHARE:
        text += f"; others used {cell.others_share:.0%} of the machine"
    return text


def _domains(cells: Sequence[Cell]) -> Table:
    """At batch 1 a group is one request, and so of one domain."""
    rows = []
    for cell in (one for one in cells if one.batch == 1):
        for domain in sorted({group[0].prompt.domain for group in cell.groups}):
            places = [place for place, group in enumerate(cell.groups) if group[0].prompt.domain == domain]
            plain = [seconds(cell, PLAIN)[place] for place in places]
            ratios = [time_ratio(plain, [seconds(cell, one.name)[place] for place in places]) for one in BUDGETED]
            rows.append((cell.name, domain, str(len(places)), *(f"{ratio:.2f}" for ratio in ratios)))
    return Table(
        columns=("cell", "domain", "requests", *(one.name for one in BUDGETED)),
        rows=tuple(rows),
        caption="Speed over plain decoding by domain, batch 1.",
    )


def _every_system(cells: Sequence[Cell]) -> Table:
    blank = ("",) * 5
    rows = tuple(_row(cell, system.name) for cell in cells for system in cell.systems)
    llama = tuple(
        (
            cell.name,
            f"llama.cpp, look-up {number}" if number else "llama.cpp, plain",
            *blank,
            f"{1 / ratio:.2f}",
            "",
            "",
        )
        for cell in cells
        for number, ratio in cell.llama_over_plain.items()
    )
    return Table(
        columns=(
            "cell",
            "system",
            "tokens per call",
            "acceptance",
            "step cost",
            "pass cost",
            "expert load",
            "over plain",
            "over the faster plain",
            "other tokens",
        ),
        rows=rows + llama,
        caption="Step cost, pass cost and expert load of a step are over those of plain decoding's.",
    )


def _row(cell: Cell, system: str) -> tuple[str, ...]:
    served, plain = cell.served[system], cell.served[PLAIN]
    proposed = sum(one.num_proposed for one in served)
    accepted = sum(one.num_accepted for one in served)
    experts = _of_step(served, lambda one: one.experts * one.num_steps)
    plain_experts = _of_step(plain, lambda one: one.experts * one.num_steps)
    return (
        cell.name,
        system,
        f"{sum(one.num_tokens for one in served) / sum(one.num_calls for one in served):.2f}",
        f"{accepted / proposed:.2f}" if proposed else "",
        f"{_of_step(served, lambda one: one.seconds) / _of_step(plain, lambda one: one.seconds):.2f}",
        f"{_of_step(served, lambda one: one.pass_s) / _of_step(plain, lambda one: one.pass_s):.2f}",
        f"{experts / plain_experts:.2f}" if plain_experts else "",
        f"{speed_up(cell, system):.2f}",
        f"{over_faster_plain(cell, system):.2f}",
        str(num_differing(cell, system)),
    )


def _of_step(served: Sequence[Served], total: Callable[[Served], float]) -> float:
    """Mean over all steps of something that `total` gives the sum of in a group."""
    return sum(total(one) for one in served) / max(1, sum(one.num_steps for one in served))


def _learned(learned: Sequence[Learned]) -> Table:
    return Table(
        columns=("system", "error of predicted step time", "calibration error of survival", "decisions"),
        rows=tuple(
            (
                one.where,
                f"{one.step_error_ratio:.1%}",
                f"{one.calibration_error:.3f}",
                ", ".join(f"{mode} {number}" for mode, number in one.mode_counts.items()),
            )
            for one in learned
        ),
        caption="What the budget had learned at the end.",
    )


def goals_of(cells: Sequence[Cell], learned: Sequence[Learned], bounds: Bounds) -> list[Goal]:
    """Goals of every cell, of those at batch 1 and temperature 0, and of what was learned."""
    goals = [goal for cell in cells for goal in _goals_of_cell(cell, bounds)]
    for cell in cells:
        if cell.batch == 1 and not cell.temperature:
            goals += _goals_of_single(cell, bounds)
    for one in learned:
        goals += [
            Goal(
                figure=f"{one.where}: error of predicted step time",
                value=one.step_error_ratio,
                at_most=bounds.step_error_ratio,
            ),
            Goal(
                figure=f"{one.where}: calibration error of survival",
                value=one.calibration_error,
                at_most=bounds.calibration_error,
            ),
        ]
    return goals


def _goals_of_cell(cell: Cell, bounds: Bounds) -> list[Goal]:
    share = speed_up(cell, ADAPTED) / ceiling_of(cell, with_draft=True)[1]
    lows = {one.name: speed_up_bounds(cell, one.name)[0] for one in BUDGETED}
    differing = sum(num_differing(cell, one.name) for one in cell.systems)
    return [
        Goal(figure=f"{cell.name}: requests with other tokens", value=differing, at_most=0),
        Goal(figure=f"{cell.name}: share of the ceiling", value=share, at_least=bounds.share_of_ceiling),
        *(
            Goal(
                figure=f"{cell.name}: {name}, lower bound over plain",
                value=low,
                at_least=bounds.lower_bound_over_plain,
            )
            for name, low in lows.items()
        ),
        *(
            Goal(
                figure=f"{cell.name}: {one.name} over the best fixed setting",
                value=over_best_fixed_of(cell, one.name, with_draft=one.has_draft)[0],
                at_least=bounds.over_best_fixed,
            )
            for one in BUDGETED
        ),
    ]


def _goals_of_single(cell: Cell, bounds: Bounds) -> list[Goal]:
    # Without llama.cpp's time nothing is known of the faster plain: NaN misses every goal.
    known = 1.0 if cell.llama_over_plain else _NAN
    adapted = over_faster_plain(cell, ADAPTED) * known
    goals = [
        Goal(
            figure=f"{cell.name}: adapted draft over the faster plain",
            value=adapted,
            at_least=bounds.moe_adapted if cell.is_moe else bounds.dense_adapted,
        ),
        Goal(
            figure=f"{cell.name}: adapted draft over the best of llama.cpp",
            value=over_best_llama(cell),
            at_least=bounds.over_llama,
        ),
    ]
    if cell.is_moe:
        goals.append(
            Goal(
                figure=f"{cell.name}: nothing trained over the faster plain",
                value=over_faster_plain(cell, UNTRAINED) * known,
                at_least=bounds.moe_untrained,
            )
        )
    return goals


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Speed over plain decoding of both budgeted merges in every cell, and the ceiling above them."""
    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(cells) + 1.5))
    for place, cell in enumerate(cells):
        for shift, (system, colour) in enumerate(((UNTRAINED, "tab:orange"), (ADAPTED, "tab:blue"))):
            label = system if place == 0 else None
            axes.barh(place + 0.38 * shift, speed_up(cell, system), height=0.36, color=colour, label=label)
        reach = ceiling_of(cell, with_draft=True)[1]
        axes.plot([reach, reach], [place - 0.2, place + 0.58], color="black", label=None if place else "ceiling")
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks([place + 0.19 for place in range(len(cells))], [cell.name for cell in cells], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="speed over plain decoding")
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
