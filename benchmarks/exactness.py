"""Tokens with speculation equal tokens without it: `python -m benchmarks.exactness [--quick] [--queries DIRECTORY]`.

Every prompt is served plainly, then with a draft while drafts are swapped under the running requests, greedy and
sampled. Prompts: gsm8k, wikisql and python_docstring of DIRECTORY where it exists, else the built-in streams.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import msgspec
import torch
from tokenizers import Tokenizer

from benchmarks.report import RESULTS, Goal, Table, finish, progress
from deploy.local.queries import builtin_streams, read_queries
from slipstream.acceptance import acceptance_rate, count
from slipstream.engine.engine import Engine
from slipstream.engine.request import Request, SamplingParams
from slipstream.engine.scheduler import EngineLimits
from slipstream.models.checkpoint import Checkpoint, load_checkpoint, target_digest
from slipstream.records import Observation
from slipstream.telemetry import ReplicaMetrics

mpl.use("Agg")
from matplotlib import pyplot

MODELS = Path(__file__).parents[1] / "deploy" / "models"
TARGET = MODELS / "mix-moe-11m"
SHARED_QUERIES = Path(__file__).parents[2] / "shared" / "data" / "queries"
STREAMS = ("gsm8k", "wikisql", "python_docstring")
MAX_PROMPT_TOKENS = 250
MAX_TOKENS = 64
NUM_DRAFT_TOKENS = 2
STEPS_BETWEEN_SWAPS = 30
IN_FLIGHT = 20


class Served(msgspec.Struct):
    """What came out of an engine: tokens per prompt, observations, and the requests in flight at each swap."""

    outputs: list[list[int]]
    observations: list[Observation]
    in_flight: list[int]


def load_prompts(directory: Path, number: int) -> list[tuple[int, ...]]:
    """Token ids of prompts in equal shares of the streams, none longer than MAX_PROMPT_TOKENS."""
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    files = [directory / f"{name}.jsonl.gz" for name in STREAMS]
    streams = (
        [read_queries(path) for path in files] if files[0].exists() else [s for _, s in builtin_streams(seed=0)[:3]]
    )

    shares = [-(-(number - index) // len(streams)) for index in range(len(streams))]
    prompts: list[tuple[int, ...]] = []
    for stream, share in zip(streams, shares, strict=True):
        encoded = (tuple(tokenizer.encode(f"<|user|>{query.prompt}<|assistant|>").ids) for query in stream)
        prompts += itertools.islice((ids for ids in encoded if len(ids) <= MAX_PROMPT_TOKENS), share)
    return prompts


def serve(prompts: list[tuple[int, ...]], *, temperature: float, drafts: list[Checkpoint]) -> Served:
    """Serve all prompts at once; with drafts, install the next one every STEPS_BETWEEN_SWAPS steps."""
    served = Served([[] for _ in prompts], [], [])
    engine = Engine(
        load_checkpoint(TARGET),
        limits=EngineLimits(
            max_running_requests=32,
            max_queued_requests=len(prompts),
            max_step_tokens=512,
            max_context_tokens=1024,
            num_draft_tokens=NUM_DRAFT_TOKENS,
        ),
        target_digest=target_digest(TARGET),
        replica_id="benchmark",
        top_n=16,
        observe=served.observations.append,
        metrics=ReplicaMetrics(),
    )
    for index, prompt in enumerate(prompts):
        engine.submit(_request(index, prompt, temperature), _collector(served.outputs[index]))
    versions = itertools.count(1)
    for step in itertools.count():
        if drafts and step % STEPS_BETWEEN_SWAPS == 0:
            if step:
                served.in_flight.append(engine.num_running)
            version = next(versions)
            engine.install_draft(drafts[version % len(drafts)], version=version)
        if not engine.step():
            return served
        if step % 100 == 99:
            progress(f"  step {step + 1}: {engine.num_running} running, {engine.num_waiting} waiting")
    raise AssertionError("unreachable")


def _collector(output: list[int]) -> Callable[..., None]:
    return lambda block: output.extend(block.token_ids)


def _request(index: int, prompt: tuple[int, ...], temperature: float) -> Request:
    return Request(
        request_id=f"prompt-{index}",
        prompt_ids=prompt,
        sampling=SamplingParams(seed=index, max_tokens=MAX_TOKENS, temperature=temperature, stop_token_ids=(0,)),
        tenant="benchmark",
        domain="benchmark",
        may_train=True,
        arrived_at=0.0,
    )


def draw(runs: dict[str, Served]) -> None:
    """Acceptance rate of every draft version that served, at each temperature."""
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for place, (name, served) in enumerate(runs.items()):
        rounds = [one for observation in served.observations for one in observation.rounds if one.proposed]
        versions = sorted({one.draft_version for one in rounds})
        rates = [acceptance_rate(count(one for one in rounds if one.draft_version == version)) for version in versions]
        axes.bar([version + 0.4 * place for version in versions], rates, width=0.4, label=f"temperature {name}")
    axes.set(xlabel="draft version, swapped in under running requests", ylabel="acceptance rate")
    axes.legend()
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "exactness.png", dpi=120)


def main() -> int:
    """Run the comparison at temperature 0 and 1; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 prompts instead of 200")
    parser.add_argument("--queries", type=Path, default=SHARED_QUERIES, metavar="DIRECTORY")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_prompts = 60 if arguments.quick else 200
    prompts = load_prompts(arguments.queries, num_prompts)
    drafts = [load_checkpoint(MODELS / name) for name in ("draft-2m-general", "draft-2m-sibling", "draft-2m-sibling")]
    runs: dict[str, Served] = {}
    rows: list[tuple[str, ...]] = []
    goals: list[Goal] = [Goal(figure="prompts", value=len(prompts), at_least=num_prompts)]
    for temperature in (0.0, 1.0):
        progress(f"temperature {temperature:g}, plain")
        plain = serve(prompts, temperature=temperature, drafts=[])
        progress(f"temperature {temperature:g}, speculating, with swaps")
        drafted = serve(prompts, temperature=temperature, drafts=drafts)
        runs[f"{temperature:g}"] = drafted
        num_different = sum(a != b for a, b in zip(plain.outputs, drafted.outputs, strict=True))
        rate = acceptance_rate(count(one for observation in drafted.observations for one in observation.rounds))
        num_tokens = sum(map(len, plain.outputs))
        num_busy = sum(number >= IN_FLIGHT for number in drafted.in_flight)
        counts = (len(prompts), num_tokens, num_different, len(drafted.in_flight), num_busy)
        rows.append((f"{temperature:g}", *map(str, counts), f"{rate:.3f}"))
        at = f"at temperature {temperature:g}"
        goals += [
            Goal(figure=f"prompts whose tokens differ {at}", value=num_different, at_most=0),
            Goal(
                figure=f"swaps with {IN_FLIGHT} or more in flight {at}",
                value=num_busy,
                at_least=1 if arguments.quick else 3,
            ),
            Goal(figure=f"acceptance rate {at}", value=rate, at_least=0.2),
        ]
    columns = ("temperature", "prompts", "tokens", "different", "swaps", "with 20 in flight", "acceptance rate")
    draw(runs)
    figures = {goal.figure: goal.value for goal in goals}
    return finish("exactness", tables=[Table(columns=columns, rows=tuple(rows))], figures=figures, goals=goals)


if __name__ == "__main__":
    sys.exit(main())
