"""What drafting gains: `python -m benchmarks.drafting [--full | --quick] [--cell NAME]`.

A cell is a size of a target, a batch and a temperature. In each, systems serve the same groups of requests by turns,
step by step (`drafting_systems`): plain decoding; every fixed setting, one kind of drafter or all of them merged with
always the same number of nodes; and the budgeted merge, with nothing trained and with a draft adapted to the target
(`adapt`). At batch 1 llama.cpp takes turns with plain decoding, with its own draft option too. Two threads.

Prompts are held out: gsm8k, wikisql, python_docstring and sgd_dialog in the wording of the target's training, and
Spec-Bench's, as far as they fit the context of 256. Answers have at most 96 tokens and no cell repeats a prompt of
another. Prompts whose answer ends in a loop are counted and left out, and so are answers of fewer than 8 tokens, where
there is little to draft. What is measured begins when all requests of a group have their first token; requests of a
group have answers of similar length. Every system has served 56 training prompts before.

The reduced grid (default, within an hour) has all 18 cells: mix-moe-11m x4 and x8 and mix-dense-6m x8, batch 1, 4 and
16, temperature 0 and 1, with 10, 3 and 2 groups; fixed settings are look-up 4, recycling 4 and 8, chain 2, 4 and 8,
merged 4, 8 and 16. `--full` has 40, 12 and 8 groups, and also look-up 8, recycling 2 and 16. `--quick` has one size at
batch 1 and 16, temperature 0, few settings and groups, and goals of its own. `--cell` takes a part of the grid,
as in "mix-moe-11m x8, temperature 0" or "batch 1".
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer

import slipstream_kernels
from benchmarks.adapt import BEST, adapted_draft, answers
from benchmarks.disturbance import Watch
from benchmarks.drafting_cells import Cell
from benchmarks.drafting_figures import is_loop
from benchmarks.drafting_llamacpp import NUM_PREDICTED, Ask, LlamaPeer
from benchmarks.drafting_prompts import Prompt, held_out_prompts, training_prompts
from benchmarks.drafting_report import FULL_BOUNDS, QUICK_BOUNDS, Bounds, Learned, draw, goals_of, tables_of
from benchmarks.drafting_systems import (
    BUDGETED,
    PLAIN,
    Query,
    Runner,
    Served,
    SharedDecoder,
    System,
    fixed,
    serve_by_turns,
)
from benchmarks.engine_sizes import QUERIES, Prepared, Size, prepare, source_directory
from benchmarks.peers.protocol import INSTALL, is_installed
from benchmarks.reference.corpus import END
from benchmarks.report import RESULTS, finish, progress
from slipstream.drafting.merge import MergedDrafter
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.records import unpack_ids

NUM_THREADS = 2
SHORTEST_ANSWER = 8
WARM_UP_GROUPS = (16, 16, 4, 4, *[1] * 16)
SEED = 1
SIZES = (
    Size(source="mix-moe-11m", times=4),
    Size(source="mix-moe-11m", times=8),
    Size(source="mix-dense-6m", times=8),
)


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """What a run measures: sizes, temperatures, groups by batch, and fixed settings."""

    sizes: tuple[Size, ...]
    temperatures: tuple[float, ...]
    num_groups: dict[int, int]
    settings: tuple[System, ...]
    bounds: Bounds
    cell: tuple[str, ...] = ()


def _cells(grid: Grid, size: Size, temperature: float) -> list[tuple[str, int]]:
    """Names and batches of the cells wanted at this size and temperature; the largest batch first."""
    names = [(f"{size.name}, batch {batch}, temperature {temperature:g}", batch) for batch in grid.num_groups]
    return sorted((one for one in names if set(grid.cell) <= set(one[0].split(", "))), key=lambda one: -one[1])


def _settings(**nodes: Sequence[int]) -> tuple[System, ...]:
    return tuple(fixed(kind, number) for kind, numbers in nodes.items() for number in numbers)


REDUCED = Grid(
    sizes=SIZES,
    temperatures=(0.0, 1.0),
    num_groups={1: 10, 4: 3, 16: 2},
    settings=_settings(lookup=(4,), recycling=(4, 8), chain=(2, 4, 8), merged=(4, 8, 16)),
    bounds=FULL_BOUNDS,
)
FULL = msgspec.structs.replace(
    REDUCED,
    num_groups={1: 40, 4: 12, 16: 8},
    settings=_settings(lookup=(4, 8), recycling=(2, 4, 8, 16), chain=(2, 4, 8), merged=(4, 8, 16)),
)
QUICK = Grid(
    sizes=SIZES[:1],
    temperatures=(0.0,),
    num_groups={1: 6, 16: 1},
    settings=_settings(recycling=(4,), chain=(4,), merged=(8,)),
    bounds=QUICK_BOUNDS,
)


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """The requests that a target is measured on at a temperature, and how many of all looked at were left out."""

    queries: list[Query]
    num_prompts: int
    num_loops: int
    num_short: int


@functools.cache
def chosen_queries(source: Path, temperature: float, num_wanted: int) -> Chosen:
    """Held-out prompts and the lengths of the answers that the narrow target gives; wider copies give the same.

    Twice as many prompts are looked at as are wanted, and all that remain are returned.
    """
    prompts = held_out_prompts(QUERIES, Tokenizer.from_file(str(source / "tokenizer.json")), seed=SEED)
    prompts = prompts[: 2 * num_wanted]
    place = {prompt.id: index for index, prompt in enumerate(prompts)}
    queries: list[Query] = []
    num_loops = num_short = 0
    for one in answers(load_checkpoint(source), prompts, temperature=temperature):
        token_ids = [token for token in unpack_ids(one.output_ids).tolist() if token != END]
        index = place[one.request_id]
        if is_loop(token_ids):
            num_loops += 1
        elif len(token_ids) < SHORTEST_ANSWER:
            num_short += 1
        else:
            queries.append(Query(prompt=prompts[index], seed=index, answer_tokens=len(token_ids)))
    # Requests end in any order; theirs is that of the prompts.
    return Chosen(
        queries=sorted(queries, key=lambda one: one.seed),
        num_prompts=len(prompts),
        num_loops=num_loops,
        num_short=num_short,
    )


def groups_of(queries: Sequence[Query], *, batch: int, number: int) -> list[list[Query]]:
    """`number` groups of `batch` requests with answers of similar length."""
    taken = queries[: batch * number]
    if batch > 1:
        taken = sorted(taken, key=lambda one: one.answer_tokens)
    return [list(taken[first : first + batch]) for first in range(0, len(taken) - batch + 1, batch)]


def measure(size: Size, temperature: float, grid: Grid) -> Iterator[Cell | Learned]:
    """The cells of a size and temperature, one after the other, and what the budgeted systems had learned then."""
    cells, source = _cells(grid, size, temperature), source_directory(size)
    if source is None or not cells:
        if source is None:
            progress(f"{size.name}: left out, {size.source} is not on this machine")
        return
    prepared = prepare(size, source, RESULTS / "models")
    num_wanted = sum(batch * number for batch, number in grid.num_groups.items())
    chosen = chosen_queries(source, temperature, num_wanted)
    draft = load_checkpoint(adapted_draft(BEST[size.source])[0])
    systems = (System(name=PLAIN), *grid.settings, *BUDGETED)
    runners = _warm_runners(systems, load_checkpoint(prepared.directory), draft, source, temperature)
    first = 0
    for name, batch in cells:
        number = grid.num_groups[batch]
        queries = chosen.queries[first : first + batch * number]
        first += len(queries)
        watch = Watch()
        served = _serve_all(runners, groups_of(queries, batch=batch, number=number), temperature, name)
        cell = Cell(
            name=name,
            size=size.name,
            is_moe=prepared.config.num_experts > 0,
            batch=batch,
            temperature=temperature,
            systems=systems,
            groups=groups_of(queries, batch=batch, number=number),
            served=served,
            num_prompts=chosen.num_prompts,
            num_loops=chosen.num_loops,
            num_short=chosen.num_short,
            others_share=watch.others_share(),
            llama_over_plain=_beside_llama(prepared, runners[0], queries) if batch == 1 and not temperature else {},
        )
        yield cell
    for runner in runners[-len(BUDGETED) :]:
        drafter = runner.engine.drafter
        assert isinstance(drafter, MergedDrafter)
        economy = drafter.economy
        assert economy is not None
        yield Learned(
            where=f"{size.name}, temperature {temperature:g}, {runner.system.name}",
            calibration_error=drafter.calibration_error(),
            step_error_ratio=economy.step_cost.mean_error_ratio,
            mode_counts={mode.name.lower(): number for mode, number in economy.modes.counts.items()},
        )
    runners.clear()
    gc.unfreeze()
    gc.collect()  # the next size needs the memory


def _warm_runners(
    systems: Sequence[System], target: Checkpoint, draft: Checkpoint, source: Path, temperature: float
) -> list[Runner]:
    """An engine for every system, each with the same training prompts behind it."""
    shared = SharedDecoder(target, num_parts=len(systems))
    runners = [Runner(system, target, shared, draft) for system in systems]
    gc.collect()
    gc.freeze()  # as a replica does
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    prompts: list[Prompt] = training_prompts(QUERIES, tokenizer, per_domain=sum(WARM_UP_GROUPS), seed=SEED + 1)
    queries = [Query(prompt=one, seed=index, answer_tokens=0) for index, one in enumerate(prompts)]
    first = 0
    for place, number in enumerate(WARM_UP_GROUPS):
        progress(f"warming up {len(runners)} systems, group {place + 1} of {len(WARM_UP_GROUPS)}: {number} requests")
        serve_by_turns(runners, queries[first : first + number], temperature)
        first += number
    return runners


def _serve_all(
    runners: Sequence[Runner], groups: Sequence[Sequence[Query]], temperature: float, name: str
) -> dict[str, list[Served]]:
    by_group: list[dict[str, Served]] = []
    for number, group in enumerate(groups):
        # Whoever begins finds what the one before it left in the processor's caches: another one every time.
        turned = [*runners[number % len(runners) :], *runners[: number % len(runners)]]
        served = dict(zip([one.system.name for one in turned], serve_by_turns(turned, group, temperature), strict=True))
        by_group.append(served)
        ratios = ", ".join(f"{one.name} {served[PLAIN].seconds / served[one.name].seconds:.2f}" for one in BUDGETED)
        progress(f"{name}, group {number + 1} of {len(groups)}: {ratios}")
    return {one.system.name: [served[one.system.name] for served in by_group] for one in runners}


def _beside_llama(prepared: Prepared, plain: Runner, queries: Sequence[Query]) -> dict[int, float]:
    """Time of llama.cpp over ours, both at their greedy best alone, by how much it drafts; empty without it."""
    if prepared.gguf is None or not is_installed("llama_cpp"):
        progress(f"llama.cpp is missing, its columns stay empty and its goals unmet; install it with {INSTALL}")
        return {}
    peer = LlamaPeer(prepared.gguf, num_threads=NUM_THREADS)
    theirs, ours_s = dict.fromkeys(NUM_PREDICTED, 0.0), 0.0
    for query in queries:
        own = serve_by_turns([plain], [query], 0.0)[0]
        ours_s += own.seconds
        for num_predicted in NUM_PREDICTED:
            ask = Ask(prompt_ids=query.prompt.token_ids, num_tokens=len(own.token_ids[0]), num_predicted=num_predicted)
            theirs[num_predicted] += peer.decode(ask).seconds
    peer.close()
    return {number: seconds / ours_s for number, seconds in theirs.items()}


def main() -> int:
    """Measure, print, store and judge; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--reduced", action="store_true", help="the grid that runs within an hour (default)")
    which.add_argument("--full", action="store_true", help="the whole grid")
    which.add_argument("--quick", action="store_true", help="at most three minutes, once the draft is there")
    parser.add_argument("--cell", metavar="PARTS", default="", help="only cells with these parts in their names")
    arguments = parser.parse_args()
    if not slipstream_kernels.is_available():
        progress(f"nothing to measure: {slipstream_kernels.why_unavailable()}")
        return 1
    if not QUERIES.is_dir():
        progress(f"skipped: no {QUERIES}, where the prompts are")
        return 0
    torch.set_num_threads(NUM_THREADS)
    slipstream_kernels.set_num_threads(NUM_THREADS)
    grid = FULL if arguments.full else QUICK if arguments.quick else REDUCED
    grid = msgspec.structs.replace(grid, cell=tuple(part for part in arguments.cell.split(", ") if part))
    results = [one for size in grid.sizes for t in grid.temperatures for one in measure(size, t, grid)]
    cells = [one for one in results if isinstance(one, Cell)]
    learned = [one for one in results if isinstance(one, Learned)]
    if not cells:
        progress(f"no such cell: {arguments.cell!r}; or no model of the grid is on this machine")
        return 1
    draw(cells, RESULTS / "drafting.png")
    goals = goals_of(cells, learned, grid.bounds)
    return finish(
        "drafting",
        tables=tables_of(cells, learned),
        figures={goal.figure: goal.value for goal in goals},
        goals=goals,
    )


if __name__ == "__main__":
    sys.exit(main())
