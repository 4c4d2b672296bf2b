"""Output is the same however it is served: `python -m benchmarks.exactness [--prompts N] [--quick]`.

Every prompt is served plainly, 16 at a time and with no prefix reused: the reference. Then alone, behind chains that
are swapped under the running requests, behind random trees, again from prefixes that are found, with a cache so small
that requests are preempted, in small chunks of prefill, and with two threads; then behind every drafter: all of them
merged within a budget or with a fixed number of nodes, each by itself, and stochastic beams. Drafts are swapped under
all of these that have one. Greedy, at temperature 0.6 and at 1. What is compared, to the last bit: the tokens, and the
target's log-probability of each, a function of all its logits.

Prompts: gsm8k, wikisql, python_docstring and sgd_dialog of DIRECTORY where it exists, else the built-in streams.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec
import torch
from tokenizers import Tokenizer

import slipstream_kernels
from benchmarks.report import RESULTS, Goal, Table, finish, progress
from deploy.local.queries import builtin_streams, read_queries
from slipstream.acceptance import acceptance_rate, count
from slipstream.drafting.drafter import DraftContext
from slipstream.drafting.merge import DraftingOptions
from slipstream.drafting.rsd import RsdDrafter, RsdShape, beam_search
from slipstream.drafting.tree import ROOT, DraftTree
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
STREAMS = ("gsm8k", "wikisql", "python_docstring", "sgd_dialog")
NUM_PROMPTS = 500
MAX_PROMPT_TOKENS = 250
MAX_TOKENS = 128
TEMPERATURES = (0.0, 0.6, 1.0)
STEPS_BETWEEN_SWAPS = 30
IN_FLIGHT = 20
SMALL_CACHE_BLOCKS = 80
"""Of 16 positions: room for about four of the longest requests."""

PLAIN = EngineLimits(
    max_running_requests=16,
    max_queued_requests=2000,
    max_step_tokens=512,
    max_context_tokens=512,
    num_draft_tokens=0,
    reuses_prefixes=False,
)
CHAIN = msgspec.structs.replace(PLAIN, max_running_requests=32, num_draft_tokens=2)
TREE = msgspec.structs.replace(PLAIN, num_draft_tokens=8)
MERGED = msgspec.structs.replace(PLAIN, max_running_requests=24, num_draft_tokens=12)
ALONE = msgspec.structs.replace(PLAIN, max_running_requests=1, num_draft_tokens=8)


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way to serve; `is_chain`: behind drafts that are swapped, `is_tree`: behind random trees.

    `drafting` says which drafters take part, `beams` is the shape of stochastic beams instead.
    """

    name: str
    limits: EngineLimits
    is_chain: bool = False
    is_tree: bool = False
    drafting: DraftingOptions | None = None
    beams: RsdShape | None = None
    num_threads: int = 1
    repeats: int = 1


WAYS = (
    Way(name="alone", limits=msgspec.structs.replace(PLAIN, max_running_requests=1)),
    Way(name="chains, swapped", limits=CHAIN, is_chain=True),
    Way(name="random trees", limits=TREE, is_tree=True),
    Way(name="prefixes found", limits=msgspec.structs.replace(CHAIN, reuses_prefixes=True), is_chain=True, repeats=2),
    Way(
        name="preempted",
        limits=msgspec.structs.replace(TREE, num_blocks=SMALL_CACHE_BLOCKS, reuses_prefixes=True),
        is_tree=True,
    ),
    Way(name="chunks of 24", limits=msgspec.structs.replace(PLAIN, max_step_tokens=24)),
    Way(name="two threads", limits=CHAIN, is_chain=True, num_threads=2),
    Way(name="merged, budgeted", limits=MERGED, is_chain=True, drafting=DraftingOptions()),
    Way(name="merged, budgeted, alone", limits=ALONE, is_chain=True, drafting=DraftingOptions(), num_threads=2),
    Way(name="merged, 12 nodes", limits=MERGED, is_chain=True, drafting=DraftingOptions(fixed_nodes=12)),
    Way(
        name="merged, preempted",
        limits=msgspec.structs.replace(MERGED, num_blocks=SMALL_CACHE_BLOCKS, reuses_prefixes=True),
        is_chain=True,
        drafting=DraftingOptions(fixed_nodes=6),
    ),
    Way(
        name="recycling, 8 nodes",
        limits=MERGED,
        drafting=DraftingOptions(sources=("recycling",), fixed_nodes=8, max_tenants=2),
    ),
    Way(name="look-ups, 8 nodes", limits=ALONE, drafting=DraftingOptions(sources=("lookup", "pool"), fixed_nodes=8)),
    Way(name="beams 3 x 4", limits=MERGED, beams=beam_search(3, 4)),
)


class Served(msgspec.Struct):
    """What came out of an engine: tokens and observation of each request, and the requests in flight at each swap."""

    outputs: list[list[int]]
    observations: dict[str, Observation]
    in_flight: list[int]
    metrics: ReplicaMetrics

    def total(self, name: str) -> float:
        """A counter's value."""
        return self.metrics.registry.get_sample_value(f"slipstream_{name}_total") or 0.0


class RandomTrees:
    """A drafter that knows what the target will say, and hides it in random trees."""

    version = 1
    digest = "random trees"

    def __init__(self, known: dict[int, list[int]], vocab_size: int) -> None:
        self._known = known
        self._vocab_size = vocab_size
        self._rng = random.Random(0)

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        """A random tree per context; about every second node continues what the target will say."""
        return [self._tree(context) for context in contexts]

    def release(self, slot: int) -> None:
        """Nothing to do: there is no cache."""

    def _tree(self, context: DraftContext) -> DraftTree:
        future = self._known[context.sampling.seed][len(context.token_ids) :]
        edges: dict[tuple[int, int], int] = {}
        depths: list[int] = []
        for _ in range(context.max_nodes):
            open_nodes = [node for node, depth in enumerate(depths) if depth < context.max_depth]
            parent = self._rng.choice([ROOT, *open_nodes, *open_nodes[-2:] * 2])
            depth = 1 if parent == ROOT else depths[parent] + 1
            is_right = depth <= len(future) and self._rng.random() < 0.6
            token = future[depth - 1] if is_right else self._rng.randrange(self._vocab_size)
            if (parent, token) not in edges:
                edges[parent, token] = len(edges)
                depths.append(depth)
        parents, tokens = zip(*edges, strict=True)
        return DraftTree(token_ids=tokens, parents=parents, drafter="random", version=self.version)


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


def serve(
    prompts: Sequence[tuple[int, ...]],
    way: Way,
    *,
    temperature: float,
    drafts: Sequence[Checkpoint] = (),
    known: dict[int, list[int]] | None = None,
) -> Served:
    """Serve all prompts in a way; where it has drafts, install the next one every STEPS_BETWEEN_SWAPS steps.

    `known` are all tokens of each request by its seed, for random trees.
    """
    target = load_checkpoint(TARGET)
    observations: list[Observation] = []
    outputs: list[list[int]] = [[] for _ in range(way.repeats * len(prompts))]
    served = Served(outputs, {}, [], ReplicaMetrics())
    engine = Engine(
        target,
        limits=way.limits,
        target_digest=target_digest(TARGET),
        replica_id="benchmark",
        top_n=16,
        observe=observations.append,
        metrics=served.metrics,
        drafting=way.drafting,
    )
    if way.is_tree and known is not None:
        engine.install_drafter(RandomTrees(known, engine.vocab_size))
    if way.beams is not None:
        engine.install_drafter(_beams(way.beams, drafts[-1], engine))
    for index, output in enumerate(outputs):
        prompt = prompts[index % len(prompts)]
        engine.submit(_request(index, prompt, temperature, seed=index % len(prompts)), _collector(output))
    _run(engine, drafts if way.is_chain else (), served.in_flight)
    served.observations = {one.request_id: one for one in observations}
    return served


def _beams(shape: RsdShape, draft: Checkpoint, engine: Engine) -> RsdDrafter:
    return RsdDrafter(
        draft,
        version=1,
        shape=shape,
        noise="shared",
        vocab_size=engine.vocab_size,
        num_slots=engine.limits.max_running_requests,
        max_context_tokens=engine.max_context_tokens,
        max_catch_up_tokens=engine.limits.max_step_tokens,
    )


def _run(engine: Engine, drafts: Sequence[Checkpoint], in_flight: list[int]) -> None:
    versions = itertools.count(1)
    for step in itertools.count():
        if drafts and step % STEPS_BETWEEN_SWAPS == 0:
            if step:
                in_flight.append(engine.num_running)
            version = next(versions)
            engine.install_draft(drafts[version % len(drafts)], version=version)
        if not engine.step():
            return


def _collector(output: list[int]) -> Callable[..., None]:
    return lambda block: output.extend(block.token_ids)


def _request(index: int, prompt: tuple[int, ...], temperature: float, *, seed: int) -> Request:
    return Request(
        request_id=f"prompt-{index}",
        prompt_ids=prompt,
        sampling=SamplingParams(seed=seed, max_tokens=MAX_TOKENS, temperature=temperature, stop_token_ids=(0,)),
        tenant="benchmark",
        domain="benchmark",
        may_train=True,
        arrived_at=0.0,
    )


def num_different(served: Served, reference: Served) -> tuple[int, int]:
    """Requests whose tokens differ from the reference's, and requests whose log-probabilities do in any bit."""
    tokens = logprobs = 0
    for index, output in enumerate(served.outputs):
        expected = index % len(reference.outputs)
        tokens += output != reference.outputs[expected]
        said, should = served.observations[f"prompt-{index}"], reference.observations[f"prompt-{expected}"]
        logprobs += (said.output_logprobs, said.top_logprobs) != (should.output_logprobs, should.top_logprobs)
    return tokens, logprobs


def draw(runs: dict[str, Served]) -> None:
    """Acceptance rate of every draft version that served, at each temperature."""
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for place, (name, served) in enumerate(runs.items()):
        rounds = [one for observation in served.observations.values() for one in observation.rounds if one.proposed]
        versions = sorted({one.draft_version for one in rounds})
        rates = [acceptance_rate(count(one for one in rounds if one.draft_version == version)) for version in versions]
        axes.bar([version + 0.27 * place for version in versions], rates, width=0.27, label=f"temperature {name}")
    axes.set(xlabel="draft version, swapped in under running requests", ylabel="acceptance rate")
    axes.legend()
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "exactness.png", dpi=120)


def compare(
    prompts: Sequence[tuple[int, ...]], drafts: Sequence[Checkpoint], temperature: float
) -> tuple[list[tuple[str, ...]], list[Goal], Served]:
    """All ways at one temperature: rows of the table, goals, and what the swapped chains gave."""
    progress(f"temperature {temperature:g}: reference")
    reference = serve(prompts, Way(name="reference", limits=PLAIN), temperature=temperature)
    known = {seed: [*prompts[seed], *output] for seed, output in enumerate(reference.outputs)}
    rows: list[tuple[str, ...]] = []
    goals: list[Goal] = []
    runs: dict[str, Served] = {}
    for way in WAYS:
        progress(f"temperature {temperature:g}: {way.name}")
        if slipstream_kernels.is_available():
            slipstream_kernels.set_num_threads(way.num_threads)
        runs[way.name] = served = serve(prompts, way, temperature=temperature, drafts=drafts, known=known)
        tokens, logprobs = num_different(served, reference)
        rate = acceptance_rate(count(one for seen in served.observations.values() for one in seen.rounds))
        pressure = (len(served.in_flight), served.total("preemptions"), served.total("prefix_hit_tokens"))
        counts = (len(served.outputs), sum(map(len, served.outputs)), tokens, logprobs)
        rows.append(
            (f"{temperature:g}", way.name, *map(str, counts), f"{rate:.3f}", *(f"{one:.0f}" for one in pressure))
        )
        goals += [
            Goal(figure=f"{what} differ, temperature {temperature:g}, {way.name}", value=number, at_most=0)
            for what, number in (("tokens", tokens), ("log-probabilities", logprobs))
        ]
    goals += _goals_of_pressure(runs, temperature, at_least=1 if len(prompts) < NUM_PROMPTS // 2 else 3)
    return rows, goals, runs["chains, swapped"]


def _goals_of_pressure(runs: dict[str, Served], temperature: float, *, at_least: int) -> list[Goal]:
    """That what should have happened did: or the comparison would say nothing."""
    swapped = runs["chains, swapped"]
    rate = acceptance_rate(count(one for seen in swapped.observations.values() for one in seen.rounds))
    num_busy = sum(number >= IN_FLIGHT for number in swapped.in_flight)
    at = f"at temperature {temperature:g}"
    return [
        Goal(figure=f"swaps with {IN_FLIGHT} or more in flight {at}", value=num_busy, at_least=at_least),
        Goal(figure=f"acceptance rate of chains {at}", value=rate, at_least=0.2),
        Goal(figure=f"preemptions {at}", value=runs["preempted"].total("preemptions"), at_least=at_least),
        Goal(figure=f"prefix tokens found {at}", value=runs["prefixes found"].total("prefix_hit_tokens"), at_least=16),
    ]


def main() -> int:
    """Run the comparison at each temperature; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, metavar="N")
    parser.add_argument("--quick", action="store_true", help="60 prompts")
    parser.add_argument("--queries", type=Path, default=SHARED_QUERIES, metavar="DIRECTORY")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_prompts = 60 if arguments.quick else arguments.prompts
    prompts = load_prompts(arguments.queries, num_prompts)
    drafts = [load_checkpoint(MODELS / name) for name in ("draft-2m-general", "draft-2m-sibling", "draft-2m-sibling")]
    rows: list[tuple[str, ...]] = []
    goals = [Goal(figure="prompts", value=len(prompts), at_least=num_prompts)]
    swapped: dict[str, Served] = {}
    for temperature in TEMPERATURES:
        more_rows, more_goals, swapped[f"{temperature:g}"] = compare(prompts, drafts, temperature)
        rows += more_rows
        goals += more_goals
    draw(swapped)
    columns = (
        "temperature",
        "served",
        "requests",
        "tokens",
        "different tokens",
        "different log-probabilities",
        "acceptance rate",
        "swaps",
        "preemptions",
        "prefix tokens found",
    )
    figures = {goal.figure: goal.value for goal in goals}
    return finish("exactness", tables=[Table(columns=columns, rows=tuple(rows))], figures=figures, goals=goals)


if __name__ == "__main__":
    sys.exit(main())
