"""What the engine's runs add up to: tables, goals, and the picture of what a pass over n tokens costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec

from benchmarks.engine_costs import bytes_read, multiply_adds
from benchmarks.engine_sizes import WIDENED, Prepared
from benchmarks.peers.protocol import Timing
from benchmarks.report import Goal, Table
from slipstream_kernels import instruction_set

mpl.use("Agg")
import itertools

from matplotlib import pyplot

OURS, LLAMA, HF_BF16, HF_FP32 = "ours", "llama.cpp bf16", "transformers bf16", "transformers fp32"
PEERS = (LLAMA, HF_BF16, HF_FP32)

GOAL_TIMES = (4, 8)
"""The widened copies of a mixture of experts that goals are set for: 168 M and 670 M parameters."""

_PASS_OF_GOAL = 9
"""The pass whose cost is compared with llama.cpp's."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Goals of a run, all ratios."""

    speed_over_llama: float
    bandwidth_share: float
    pass_over_floor: float
    pass_gain_over_llama: float
    other_share: float
    batch_gain: float


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """Plain decoding of every system within seconds, and the bandwidth right before: `ms` a token, by system."""

    read_gbps: float
    ms: dict[str, float]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one size: `timings` has a list per system, with an entry a round; `context` is their positions.

    `turns` are the plain runs of processes that stay loaded and take turns; `multiply_adds_per_s` is the machine's.
    """

    prepared: Prepared
    multiply_adds_per_s: float
    timings: dict[str, list[Timing]]
    turns: list[Turn]
    context: int


Figure = Callable[[Timing], float | None]


def median_of(measured: Measured, system: str, figure: Figure) -> float:
    """The median of a figure over a system's runs; NaN if it was not measured."""
    values = _values(measured, system, figure)
    return statistics.median(values) if values else float("nan")


def active_bytes(measured: Measured) -> float:
    """Bytes that a plain step reads."""
    config = measured.prepared.config
    return bytes_read(config, num_tokens=1, experts_touched=config.experts_per_token, context=measured.context)


def plain_ms(measured: Measured, system: str) -> list[float]:
    """Milliseconds a token of plain decoding, a turn each; none if the system was not measured."""
    return [turn.ms[system] for turn in measured.turns if system in turn.ms]


def bandwidth_share(measured: Measured) -> float:
    """Bytes a second of our plain decoding over the bandwidth measured right before it; the median over turns."""
    return statistics.median(active_bytes(measured) / turn.read_gbps / 1e6 / turn.ms[OURS] for turn in measured.turns)


def floor_ms(measured: Measured) -> float:
    """Milliseconds in which the machine reads the bytes of a plain step; the median over turns."""
    return statistics.median(active_bytes(measured) / turn.read_gbps / 1e6 for turn in measured.turns)


def pass_ratio(measured: Measured, system: str, num_tokens: int) -> float:
    """T(n)/T(1) of a system; medians of each."""
    return median_of(measured, system, _pass(num_tokens)) / median_of(measured, system, _pass(1))


def bytes_ratio(measured: Measured, num_tokens: int) -> float:
    """bytes(n)/bytes(1), from the experts that n tokens of the text touch."""
    return _pass_bytes(measured, num_tokens) / _pass_bytes(measured, 1)


def compute_ratio(measured: Measured, num_tokens: int) -> float:
    """The time of n tokens' multiply-adds at the measured rate over our measured T(1)."""
    number = multiply_adds(measured.prepared.config, num_tokens=num_tokens, context=measured.context)
    return number / measured.multiply_adds_per_s * 1e3 / median_of(measured, OURS, _pass(1))


def pass_floor(measured: Measured, num_tokens: int) -> float:
    """The least T(n)/T(1): the larger of its bytes' and its products' ratio."""
    return max(bytes_ratio(measured, num_tokens), compute_ratio(measured, num_tokens))


def batch_gains(measured: Measured) -> list[float]:
    """Tokens a second of each batch size over those of the next smaller one."""
    speeds = [median_of(measured, OURS, _batch(size)) for size in _batch_sizes(measured)]
    return [larger / smaller for smaller, larger in itertools.pairwise(speeds)]


def tables_of(results: Sequence[Measured]) -> list[Table]:
    """The four tables: plain decoding, prefill, passes over a tree, and batches."""
    return [_decode_table(results), _prefill_table(results), _pass_table(results), _batch_table(results)]


def _decode_table(results: Sequence[Measured]) -> Table:
    columns = (
        *("size", "parameters", "MB a token", "GB/s measured", "floor, ms", OURS, "of bandwidth", "outside kernels"),
        *PEERS,
        "ours over llama.cpp",
    )
    rows = []
    for each in results:
        rows.append(
            (
                each.prepared.size.name,
                f"{each.prepared.num_parameters / 1e6:.1f} M",
                f"{active_bytes(each) / 1e6:.1f}",
                f"{statistics.median(turn.read_gbps for turn in each.turns):.1f}",
                f"{floor_ms(each):.3f}",
                _spread(each, OURS),
                f"{bandwidth_share(each):.0%}",
                f"{_other_share(each):.1%}",
                *(f"{_spread(each, peer)}{_agreement(each, peer)}" for peer in PEERS),
                _number(_speed_over_llama(each)),
            )
        )
    caption = (
        f"Plain greedy decoding, ms a token, medians (least to most of the turns); shares and ratios are medians of "
        f"the ratios within a turn; {WIDENED}."
    )
    return Table(columns=columns, rows=tuple(rows), caption=caption)


def _prefill_table(results: Sequence[Measured]) -> Table:
    rows = [
        (each.prepared.size.name, *(_number(median_of(each, system, _prefill), 0) for system in (OURS, *PEERS)))
        for each in results
    ]
    return Table(columns=("size", OURS, *PEERS), rows=tuple(rows), caption=f"Prefill, tokens a second; {WIDENED}.")


def _pass_table(results: Sequence[Measured]) -> Table:
    columns = (
        *("size", "n", "experts a layer", "bytes(n)/bytes(1)", "products(n)/T(1)", "floor"),
        *("ours, ms", "ours T(n)/T(1)", "over floor", "llama.cpp T(n)/T(1)"),
    )
    rows = []
    for each in results:
        for number in _tree_sizes(each):
            floor, ratio = pass_floor(each, number), pass_ratio(each, OURS, number)
            rows.append(
                (
                    each.prepared.size.name,
                    str(number),
                    _number(_experts(each, number)),
                    _number(bytes_ratio(each, number)),
                    _number(compute_ratio(each, number)),
                    _number(floor),
                    _number(median_of(each, OURS, _pass(number)), 3),
                    _number(ratio),
                    _number(ratio / floor),
                    _number(pass_ratio(each, LLAMA, number)),
                )
            )
    rate = statistics.median(each.multiply_adds_per_s for each in results) / 1e9
    caption = (
        f"A pass over n tokens as multiples of one; {instruction_set()}, {rate:.1f} billion multiply-adds a second; "
        f"{WIDENED}."
    )
    return Table(columns=columns, rows=tuple(rows), caption=caption)


def _batch_table(results: Sequence[Measured]) -> Table:
    sizes = _batch_sizes(results[0])
    columns = ("size", *map(str, sizes), "least step up")
    rows = [
        (
            each.prepared.size.name,
            *(_number(median_of(each, OURS, _batch(size)), 0) for size in sizes),
            _number(min(batch_gains(each))),
        )
        for each in results
    ]
    caption = f"Tokens a second of all requests together, by batch; {WIDENED}."
    return Table(columns=columns, rows=tuple(rows), caption=caption)


def goals_of(results: Sequence[Measured], bounds: Bounds) -> list[Goal]:
    """The goals: most of them for the sizes of GOAL_TIMES that were measured, batches for every size."""
    goals: list[Goal] = []
    for each in results:
        if each.prepared.config.num_experts and each.prepared.size.times in GOAL_TIMES:
            goals += _size_goals(each, bounds)
        goals.append(
            Goal(
                figure=f"tokens a second over those of the next smaller batch, least, {each.prepared.size.name}",
                value=min(batch_gains(each)),
                at_least=bounds.batch_gain,
            )
        )
    return goals


def _size_goals(each: Measured, bounds: Bounds) -> list[Goal]:
    name = each.prepared.size.name
    llama, ours = (pass_ratio(each, system, _PASS_OF_GOAL) for system in (LLAMA, OURS))
    worst = max(pass_ratio(each, OURS, number) / pass_floor(each, number) for number in _tree_sizes(each))
    return [
        Goal(
            figure=f"plain decoding over llama.cpp's, {name}",
            value=_speed_over_llama(each),
            at_least=bounds.speed_over_llama,
        ),
        Goal(
            figure=f"share of the streaming bandwidth, {name}",
            value=bandwidth_share(each),
            at_least=bounds.bandwidth_share,
        ),
        Goal(figure=f"T(n)/T(1) over its floor, worst, {name}", value=worst, at_most=bounds.pass_over_floor),
        Goal(
            figure=f"llama.cpp's T({_PASS_OF_GOAL})/T(1) over ours, {name}",
            value=llama / ours,
            at_least=bounds.pass_gain_over_llama,
        ),
        Goal(figure=f"share of a step outside kernels, {name}", value=_other_share(each), at_most=bounds.other_share),
    ]


def draw(results: Sequence[Measured], path: Path) -> None:
    """T(n)/T(1) of ours and of llama.cpp's beside the floor, a panel a size."""
    figure, panels = pyplot.subplots(1, len(results), figsize=(3.2 * len(results), 3.2), squeeze=False)
    for axes, each in zip(panels[0], results, strict=True):
        numbers = [1, *_tree_sizes(each)]
        for system, style in ((OURS, "o-"), (LLAMA, "s-")):
            axes.plot(numbers, [pass_ratio(each, system, number) for number in numbers], style, ms=3, label=system)
        axes.plot(numbers, [pass_floor(each, number) for number in numbers], "k--", label="floor")
        axes.set(title=each.prepared.size.name, xlabel="verified tokens n", ylabel="T(n) / T(1)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    panels[0][0].legend()
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def _prefill(timing: Timing) -> float:
    return timing.prefill_tokens_per_s


def _pass(num_tokens: int) -> Figure:
    return lambda timing: timing.pass_ms.get(num_tokens)


def _batch(size: int) -> Figure:
    return lambda timing: timing.batch_tokens_per_s.get(size)


def _values(measured: Measured, system: str, figure: Figure) -> list[float]:
    return [value for value in map(figure, measured.timings.get(system, ())) if value is not None]


def _tree_sizes(measured: Measured) -> list[int]:
    return [number for number in measured.timings[OURS][0].pass_ms if number > 1]


def _batch_sizes(measured: Measured) -> list[int]:
    return list(measured.timings[OURS][0].batch_tokens_per_s)


def _experts(measured: Measured, num_tokens: int) -> float:
    return median_of(measured, OURS, lambda timing: timing.experts_touched.get(num_tokens))


def _pass_bytes(measured: Measured, num_tokens: int) -> float:
    return bytes_read(
        measured.prepared.config,
        num_tokens=num_tokens,
        experts_touched=_experts(measured, num_tokens),
        context=measured.context,
    )


def _other_share(measured: Measured) -> float:
    return 1.0 - median_of(measured, OURS, lambda timing: timing.kernel_share)


def _speed_over_llama(measured: Measured) -> float:
    ratios = [turn.ms[LLAMA] / turn.ms[OURS] for turn in measured.turns if LLAMA in turn.ms]
    return statistics.median(ratios) if ratios else float("nan")


def _agreement(measured: Measured, peer: str) -> str:
    """How many of a peer's first tokens are ours: the proof that both compute one function."""
    if not measured.timings.get(peer):
        return ""
    ours, theirs = (measured.timings[system][0].token_ids for system in (OURS, peer))
    pairs = list(zip(ours, theirs, strict=True))
    first = next((index for index, (own, other) in enumerate(pairs) if own != other), len(pairs))
    return f", {first} of {len(pairs)} tokens ours"


def _spread(measured: Measured, system: str) -> str:
    values = plain_ms(measured, system)
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""


def _number(value: float, digits: int = 2) -> str:
    return "" if value != value else f"{value:.{digits}f}"  # NaN: not measured
