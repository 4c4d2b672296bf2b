"""Chains or trees: tokens per pass of the target at a fixed number of nodes: `python -m benchmarks.rsd [--quick]`.

Block efficiency = tokens that a verification pass emits, the bonus token included. Drafting time is not charged, which
flatters chains: a chain of 30 nodes costs 30 passes of the draft, a tree of 5 beams costs 6. The first pass of a
request, which has no draft, is left out, and so is a last one that a stop token cut. Every request is dropped after
NUM_TOKENS tokens and had been allowed more, so that no tree is small because its request was about to end. Answers
that fell into a loop are left out and counted. Intervals of 95 % by a bootstrap over prompts; differences by prompt.

"merged" is what a service drafts with, held to the budget: chains of up to 8 tokens of the same draft, Token Recycling
and look-ups in one tree, verified by equality. It has served as many other prompts before, and learns on.

Target: the reference mixture of experts. The good draft learned its domains, the poor one did not. Prompts: gsm8k,
wikisql, python_docstring and sgd_dialog of DIRECTORY.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

import slipstream_kernels
from benchmarks.drafting_figures import is_loop
from benchmarks.exactness import MODELS, SHARED_QUERIES, TARGET, load_prompts
from benchmarks.report import Goal, Table, finish, progress
from slipstream.drafting.drafter import Drafter
from slipstream.drafting.merge import DraftingOptions
from slipstream.drafting.rsd import NoiseKind, RsdDrafter, RsdShape, beam_search, constant_branching
from slipstream.engine.engine import Engine
from slipstream.engine.request import Request, SamplingParams, TokenBlock
from slipstream.engine.scheduler import EngineLimits
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.telemetry import ReplicaMetrics

DRAFTS = {"good": "draft-2m-sibling", "poor": "draft-2m-general"}
TEMPERATURES = (0.3, 1.0)
BUDGETS = (6, 10, 14, 21, 30)
BRANCHING = {
    6: (2, 2),
    10: (2, 1, 1, 1, 1),
    14: (2, 2, 2),
    21: (3, 1, 1, 1, 1, 1, 1),
    30: (2, 2, 2, 2),
}
BEAMS = {6: (2, 3), 10: (2, 5), 14: (2, 7), 21: (3, 7), 30: (5, 6)}
"""Beams and levels."""

NUM_PROMPTS, QUICK_PROMPTS = 32, 12
QUICK_BUDGETS = (14,)
NUM_TOKENS = 48
NUM_RUNNING = 16
MAX_CONTEXT_TOKENS = 400
_RESAMPLES = 2000

Figures = NDArray[np.float64]
OpenDrafter = Callable[[Checkpoint, int], Drafter]
"""From a draft and the budget in nodes."""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way to draft and verify; the engine's own merged drafter where nothing is `opened`."""

    name: str
    rule: str
    opened: OpenDrafter | None


def _rsd(draft: Checkpoint, budget: int, *, shape: Callable[[int], RsdShape], noise: NoiseKind) -> RsdDrafter:
    return RsdDrafter(
        draft,
        version=1,
        shape=shape(budget),
        noise=noise,
        vocab_size=draft.config.vocab_size,
        num_slots=NUM_RUNNING,
        max_context_tokens=MAX_CONTEXT_TOKENS,
        max_catch_up_tokens=512,
    )


def _chain(budget: int) -> RsdShape:
    return constant_branching(*[1] * budget)


def _branching(budget: int) -> RsdShape:
    return constant_branching(*BRANCHING[budget])


def _beams(budget: int) -> RsdShape:
    return beam_search(*BEAMS[budget])


def _way(name: str, rule: str, shape: Callable[[int], RsdShape], noise: NoiseKind) -> Way:
    return Way(name=name, rule=rule, opened=partial(_rsd, shape=shape, noise=noise))


CHAIN, BLOCK, SHARED_CHAIN = "chain, token by token", "chain, by block", "chain, shared noise"
RSD_C, RSD_S, SHARED_S, MERGED = "RSD-C", "RSD-S", "RSD-S, shared noise", "merged"
WAYS = (
    _way(CHAIN, "recursive_rejection", _chain, "independent"),
    _way(BLOCK, "block", _chain, "independent"),
    _way(RSD_C, "recursive_rejection", _branching, "independent"),
    _way(RSD_S, "recursive_rejection", _beams, "independent"),
    _way(SHARED_CHAIN, "equality", _chain, "shared"),
    _way(SHARED_S, "equality", _beams, "shared"),
    Way(name=MERGED, rule="equality", opened=None),
)


class Decoded(msgspec.Struct, frozen=True):
    """Tokens and passes of each prompt's answer; both 0 where it fell into a loop, which `is_loop_B` says."""

    num_tokens_B: Figures
    num_passes_B: Figures
    is_loop_B: Figures


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """What is decoded how: `earlier` prompts come before those that count, for a drafter that learns."""

    target: Checkpoint
    draft: Checkpoint
    prompts: Sequence[tuple[int, ...]]
    earlier: Sequence[tuple[int, ...]]
    temperature: float


def decode(serving: Serving, way: Way, *, budget: int) -> Decoded:
    """Decode all prompts through an engine, prompt number i under seed i."""
    engine = _engine(serving, way, budget)
    if way.opened is None:
        seeds = range(len(serving.prompts), len(serving.prompts) + len(serving.earlier))
        _answers(engine, serving.earlier, seeds, serving.temperature, budget)
    answers = _answers(engine, serving.prompts, range(len(serving.prompts)), serving.temperature, budget)
    sums = np.array([_sums(blocks) for blocks in answers], dtype=np.float64)
    return Decoded(*sums.T)


def _engine(serving: Serving, way: Way, budget: int) -> Engine:
    engine = Engine(
        serving.target,
        limits=EngineLimits(
            max_running_requests=NUM_RUNNING,
            max_queued_requests=len(serving.prompts),
            max_step_tokens=512,
            max_context_tokens=MAX_CONTEXT_TOKENS,
            num_draft_tokens=budget,
        ),
        target_digest="",
        replica_id="benchmark",
        top_n=1,
        observe=lambda _: None,
        metrics=ReplicaMetrics(),
        drafting=DraftingOptions(fixed_nodes=budget) if way.opened is None else None,
        rule=way.rule,
    )
    if way.opened is None:
        engine.install_draft(serving.draft, version=1)
    else:
        engine.install_drafter(way.opened(serving.draft, budget))
    return engine


def _answers(
    engine: Engine, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], temperature: float, budget: int
) -> list[list[TokenBlock]]:
    answers: list[list[TokenBlock]] = [[] for _ in prompts]
    for seed, prompt, blocks in zip(seeds, prompts, answers, strict=True):
        engine.submit(_request(seed, prompt, temperature, budget), blocks.append)
    while engine.step():
        for blocks in answers:
            if blocks and blocks[-1].finish_reason is None and _num_tokens(blocks) >= NUM_TOKENS:
                engine.cancel(blocks[-1].request_id)
    return answers


def _request(index: int, prompt: tuple[int, ...], temperature: float, budget: int) -> Request:
    # A tree is at most as deep as its budget, so none is cut before NUM_TOKENS tokens are out.
    sampling = SamplingParams(
        seed=index, max_tokens=NUM_TOKENS + budget + 1, temperature=temperature, stop_token_ids=(0,)
    )
    return Request(
        request_id=f"request-{index}",
        prompt_ids=prompt,
        sampling=sampling,
        tenant="",
        domain="default",
        may_train=False,
        arrived_at=0.0,
    )


def _num_tokens(blocks: Sequence[TokenBlock]) -> int:
    return sum(len(block.token_ids) for block in blocks)


def _sums(blocks: Sequence[TokenBlock]) -> tuple[int, int, bool]:
    """Tokens and passes that count, and whether the answer fell into a loop."""
    is_stopped = blocks[-1].finish_reason == "stop"
    token_ids = [token for block in blocks for token in block.token_ids]
    if is_loop(token_ids[:-1] if is_stopped else token_ids):
        return 0, 0, True
    counted = blocks[1:-1] if is_stopped else blocks[1:]
    return _num_tokens(counted), len(counted), False


def efficiency(decoded: Decoded, weights_RB: Figures) -> Figures:
    """Block efficiency under each row of weights of the prompts."""
    ratios: Figures = (weights_RB @ decoded.num_tokens_B) / (weights_RB @ decoded.num_passes_B)
    return ratios


def estimate(one: Decoded, other: Decoded | None = None) -> tuple[float, float, float]:
    """Block efficiency, or how much more one has than another, with its bounds of 95 %."""
    num_prompts = len(one.num_tokens_B)
    resampled = np.random.default_rng(0).multinomial(num_prompts, [1 / num_prompts] * num_prompts, _RESAMPLES)
    weights_RB = np.concatenate([np.ones((1, num_prompts)), resampled])
    values = efficiency(one, weights_RB)
    if other is not None:
        values = values - efficiency(other, weights_RB)
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


Cells = dict[tuple[str, float, str, int], Decoded]
"""By draft, temperature, way and budget."""


def measure(prompts: Sequence[tuple[int, ...]], budgets: Sequence[int]) -> Cells:
    """Every way at every budget, with either draft at each temperature, on every second of these prompts."""
    target = load_checkpoint(TARGET)
    cells: Cells = {}
    for name, folder in DRAFTS.items():
        draft = load_checkpoint(MODELS / folder)
        for temperature in TEMPERATURES:
            serving = Serving(
                target=target, draft=draft, prompts=prompts[::2], earlier=prompts[1::2], temperature=temperature
            )
            for way in WAYS:
                for budget in budgets:
                    cells[name, temperature, way.name, budget] = decode(serving, way, budget=budget)
                figures = [estimate(cells[name, temperature, way.name, budget])[0] for budget in budgets]
                listed = " ".join(f"{figure:.2f}" for figure in figures)
                progress(f"{name} draft, temperature {temperature:g}, {way.name}: {listed}")
    return cells


def efficiency_table(cells: Cells, draft: str, temperature: float, budgets: Sequence[int]) -> Table:
    """A row per way."""
    rows = []
    for way in WAYS:
        row = [cells[draft, temperature, way.name, budget] for budget in budgets]
        bounds = [estimate(one) for one in row]
        cells_of_row = [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in bounds]
        rows.append((way.name, *cells_of_row, f"{sum(one.is_loop_B.sum() for one in row):.0f}"))
    columns = ("drafted and verified", *(f"{budget} nodes" for budget in budgets), "loops left out")
    return Table(
        columns=columns,
        rows=tuple(rows),
        caption=f"Tokens per pass, {draft} draft ({DRAFTS[draft]}), temperature {temperature:g}",
    )


PAIRS = (
    (RSD_S, CHAIN),
    (RSD_S, BLOCK),
    (RSD_C, CHAIN),
    (SHARED_S, SHARED_CHAIN),
    (SHARED_S, RSD_S),
    (MERGED, SHARED_S),
)
"""Trees and what each is compared with: chains, and at last other trees."""


def comparison(cells: Cells, budgets: Sequence[int]) -> Table:
    """Where trees win and where chains do."""
    rows = []
    for draft in DRAFTS:
        for temperature in TEMPERATURES:
            for one, other in PAIRS:
                pairs = [
                    estimate(cells[draft, temperature, one, budget], cells[draft, temperature, other, budget])
                    for budget in budgets
                ]
                rows.append((f"{draft}, {temperature:g}", one, other, *(_verdict(pair, one, other) for pair in pairs)))
    return Table(
        columns=("draft, temperature", "this", "less that", *(f"{budget} nodes" for budget in budgets)),
        rows=tuple(rows),
        caption="Tokens per pass more than the other; who wins where the interval leaves out 0",
    )


def _verdict(pair: tuple[float, float, float], one: str, other: str) -> str:
    value, low, high = pair
    winner = one if low > 0 else other if high < 0 else "undecided"
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f}) {winner}"


def in_words(cells: Cells, budgets: Sequence[int]) -> Table:
    """The best way of each cell, and whether it is a chain."""
    rows = []
    for draft in DRAFTS:
        for temperature in TEMPERATURES:
            for budget in budgets:
                ranked = sorted(WAYS, key=lambda way: -estimate(cells[draft, temperature, way.name, budget])[0])
                best = ranked[0].name
                kind = "a chain wins" if best in (CHAIN, BLOCK, SHARED_CHAIN) else "a tree wins"
                rows.append((draft, f"{temperature:g}", str(budget), kind, best, ranked[1].name))
    num_chains = sum(row[3] == "a chain wins" for row in rows)
    return Table(
        columns=("draft", "temperature", "nodes", "", "most tokens per pass", "second"),
        rows=tuple(rows),
        caption=f"Where chains win, and where trees do: a chain has the most tokens per pass in {num_chains} of "
        f"{len(rows)} cells, drafting time not charged",
    )


def pooled(cells: Cells, draft: str, temperature: float, budgets: Sequence[int], names: tuple[str, str]) -> float:
    """Lower bound of 95 % of what the first way has more than the second, all budgets' tokens and passes together."""
    one, other = (_together([cells[draft, temperature, name, budget] for budget in budgets]) for name in names)
    return estimate(one, other)[1]


def _together(some: Sequence[Decoded]) -> Decoded:
    """The same prompts decoded several times."""
    columns = (np.sum([getattr(one, name) for one in some], axis=0) for name in Decoded.__struct_fields__)
    return Decoded(*columns)


def main() -> int:
    """Measure, print and judge; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PROMPTS} prompts and one budget")
    parser.add_argument("--queries", type=Path, default=SHARED_QUERIES, metavar="DIRECTORY")
    arguments = parser.parse_args()
    if not arguments.queries.is_dir():
        progress(f"skipped: no query files in {arguments.queries}; give their place with --queries DIRECTORY")
        return 0
    torch.set_num_threads(1)
    if slipstream_kernels.is_available():
        slipstream_kernels.set_num_threads(2)
    budgets = QUICK_BUDGETS if arguments.quick else BUDGETS
    prompts = load_prompts(arguments.queries, 2 * (QUICK_PROMPTS if arguments.quick else NUM_PROMPTS))
    cells = measure(prompts, budgets)
    tables = [efficiency_table(cells, draft, at, budgets) for draft in DRAFTS for at in TEMPERATURES]
    tables += [comparison(cells, budgets), in_words(cells, budgets)]
    figures = {
        f"{draft} T={at:g} {way} {budget}": estimate(decoded)[0] for (draft, at, way, budget), decoded in cells.items()
    }
    goals = [
        Goal(
            figure=f"RSD-S less the chain, poor draft, temperature {at:g}, all budgets, lower bound",
            value=pooled(cells, "poor", at, budgets, (RSD_S, CHAIN)),
            at_least=-0.1 if arguments.quick else 0.0,
        )
        for at in TEMPERATURES
    ]
    return finish("rsd", tables=tables, figures=figures, goals=goals)


if __name__ == "__main__":
    sys.exit(main())
