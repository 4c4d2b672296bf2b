"""The engine beside its peers and its floors: `python -m benchmarks.engine [--quick] [--size NAME]`.

Sizes are widened copies of one function each; `--size` takes one of them alone, as in "mix-moe-11m x4".

Every system runs in a process of its own with two threads, on the same bf16 weights and token ids. For plain decoding
all stay loaded and take turns within seconds, because the memory of a rented machine is now half, now twice as fast;
ratios are taken within a turn. Prefill, passes and batches alternate by process. Figures are medians. Peers are
installed by `pip install -e '.[peers]'`; without them their columns stay empty and their goals count as not met.
Widened checkpoints are kept under `results/models`.

A pass over n tokens cannot be faster than reading its bytes or computing its products: its floor, as a multiple of a
pass over one token, is the larger of bytes(n)/bytes(1) and the time of its multiply-adds at the measured rate over the
measured T(1). bytes(n) counts the experts that n tokens of real text were seen to touch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

import slipstream_kernels
from benchmarks.disturbance import Watch
from benchmarks.engine_costs import bytes_read
from benchmarks.engine_figures import (
    HF_BF16,
    HF_FP32,
    LLAMA,
    OURS,
    Bounds,
    Measured,
    Turn,
    draw,
    goals_of,
    plain_ms,
    tables_of,
)
from benchmarks.engine_sizes import MOE_SIZES, SIZES, Prepared, Size, prepare, source_directory
from benchmarks.peers.protocol import INSTALL, Resident, Task, Timing, is_installed, run_system
from benchmarks.report import RESULTS, finish, progress
from slipstream_kernels.measure import multiply_adds_per_s, read_gbps

NUM_THREADS = 2
NUM_TOKENS = 64
PROMPT_TOKENS = 128
TEXT_TOKENS = 256
CONTEXTS = (128, 160, 192, 216)
"""Where passes over trees begin; the last one still has 33 tokens of text behind it."""

TREE_SIZES = (1, 2, 3, 5, 9, 17, 33)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)

MAX_OTHERS_SHARE = 0.05
"""Of the machine's processor time, beside a run that counts without a remark."""

FULL = Bounds(
    speed_over_llama=1.0,
    bandwidth_share=0.7,
    pass_over_floor=1.15,
    pass_gain_over_llama=2.0,
    other_share=0.1,
    batch_gain=1.0,
)
QUICK = Bounds(
    speed_over_llama=0.9,
    bandwidth_share=0.6,
    pass_over_floor=1.4,
    pass_gain_over_llama=1.5,
    other_share=0.15,
    batch_gain=0.9,
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run measures; a system is the module that runs it, by name. A process measures `num_repeats` times."""

    sizes: tuple[Size, ...]
    systems: dict[str, str]
    num_rounds: int
    num_turns: int
    num_tries: int
    num_repeats: int
    bounds: Bounds


def plan_of(*, is_quick: bool) -> Plan:
    """The full or the quick run, with the peers that are installed; names those that are not."""
    systems = {OURS: "benchmarks.engine_own"}
    if is_installed("llama_cpp") and is_installed("gguf"):
        systems[LLAMA] = "benchmarks.peers.llamacpp"
    if is_installed("transformers"):
        dtypes = (HF_BF16,) if is_quick else (HF_BF16, HF_FP32)
        systems |= dict.fromkeys(dtypes, "benchmarks.peers.transformers_generate")
    if len(systems) < (3 if is_quick else 4):
        progress(f"peers are missing: their columns stay empty and their goals unmet; install them with {INSTALL}")
    return Plan(
        sizes=MOE_SIZES if is_quick else SIZES,
        systems=systems,
        num_rounds=2 if is_quick else 5,
        num_turns=5 if is_quick else 15,
        num_tries=1 if is_quick else 5,
        num_repeats=2 if is_quick else 3,
        bounds=QUICK if is_quick else FULL,
    )


def measure(size: Size, plan: Plan, cache: Path) -> Measured | None:
    """All rounds of one size; None, and a line that says so, if its trained model is not on this machine."""
    source = source_directory(size)
    if source is None:
        progress(f"{size.name}: left out, {size.source} is not on this machine")
        return None
    prepared = prepare(size, source, cache)
    context = PROMPT_TOKENS + NUM_TOKENS // 2
    # Of all experts: a cache that holds what one token reads does not hold what the next one does.
    experts = prepared.config.num_experts
    working_set = int(bytes_read(prepared.config, num_tokens=1, experts_touched=experts, context=context))
    timings: dict[str, list[Timing]] = {system: [] for system in plan.systems}
    rates: list[float] = []
    for number in range(plan.num_rounds):
        for system, module in plan.systems.items():
            rates.append(multiply_adds_per_s(num_threads=NUM_THREADS))
            timings[system].append(_undisturbed(module, task_for(system, prepared, plan), num_tries=plan.num_tries))
        progress(f"{size.name}, round {number + 1} of {plan.num_rounds}")
    return Measured(
        prepared=prepared,
        multiply_adds_per_s=statistics.median(rates),
        timings=timings,
        turns=take_turns(prepared, plan, working_set),
        context=context,
    )


def take_turns(prepared: Prepared, plan: Plan, working_set: int) -> list[Turn]:
    """Plain decoding of all systems, each loaded in a process of its own, one after the other within seconds."""
    residents = {system: Resident(module, task_for(system, prepared, plan)) for system, module in plan.systems.items()}
    turns = []
    for number in range(plan.num_turns):
        gbps = read_gbps(working_set, num_threads=NUM_THREADS)
        turns.append(Turn(read_gbps=gbps, ms={system: one.turn() for system, one in residents.items()}))
        times = ", ".join(f"{system} {ms:.3f}" for system, ms in turns[-1].ms.items())
        progress(f"{prepared.size.name}, turn {number + 1} of {plan.num_turns}, {gbps:.0f} GB/s, ms a token: {times}")
    for resident in residents.values():
        resident.close()
    return turns


def _undisturbed(module: str, task: Task, *, num_tries: int) -> Timing:
    """Run a system; again if something else ran meanwhile, since spinning threads then wait for each other."""
    for last in range(1, num_tries + 1):
        watch = Watch()
        timing = run_system(module, task)
        others = watch.others_share()
        if others <= MAX_OTHERS_SHARE:
            break
        progress(f"  {module}: others used {others:.0%} of the machine{', again' if last < num_tries else ''}")
    return timing


def task_for(system: str, prepared: Prepared, plan: Plan) -> Task:
    """What a system is asked to measure at this size."""
    text = prepared.text_ids
    is_llama = system == LLAMA
    return Task(
        model=str(prepared.gguf if is_llama else prepared.directory),
        dtype="float32" if system == HF_FP32 else "bfloat16",
        num_threads=NUM_THREADS,
        prompt_ids=text[:PROMPT_TOKENS],
        num_tokens=NUM_TOKENS,
        text_ids=text[:TEXT_TOKENS],
        contexts=CONTEXTS if system in (OURS, LLAMA) else (),
        tree_sizes=TREE_SIZES if system in (OURS, LLAMA) else (),
        num_repeats=plan.num_repeats,
        batch_sizes=BATCH_SIZES if system == OURS else (),
    )


def figures_of(results: Sequence[Measured]) -> dict[str, float]:
    """Plain decoding of every system at every size: the figures beside the goals'."""
    return {
        f"ms a token, {each.prepared.size.name}, {system}": statistics.median(plain_ms(each, system))
        for each in results
        for system in each.timings
    }


def main() -> int:
    """Measure, print, store and judge; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes and three rounds, at most three minutes")
    parser.add_argument("--size", metavar="NAME", choices=[size.name for size in SIZES], help="one size alone")
    arguments = parser.parse_args()
    if not slipstream_kernels.is_available():
        progress(f"nothing to measure: {slipstream_kernels.why_unavailable()}")
        return 1
    plan = plan_of(is_quick=arguments.quick)
    if arguments.size:
        plan = msgspec.structs.replace(plan, sizes=tuple(size for size in SIZES if size.name == arguments.size))
    measured = [measure(size, plan, RESULTS / "models") for size in plan.sizes]
    results = [each for each in measured if each is not None]
    draw(results, RESULTS / "engine.png")
    goals = goals_of(results, plan.bounds)
    figures = figures_of(results) | {goal.figure: goal.value for goal in goals}
    return finish("engine", tables=tables_of(results), figures=figures, goals=goals)


if __name__ == "__main__":
    sys.exit(main())
