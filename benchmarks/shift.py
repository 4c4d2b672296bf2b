"""Online learning against a frozen draft while the traffic shifts, through the real processes and a Kafka broker.

`python -m benchmarks.shift [--streams gsm8k,wikisql,python_docstring] [--queries 300] [--quick]`

Queries of one stream after another arrive at a fixed rate. Online acceptance is what the replica measured. Frozen is
the draft that was serving when the first stream ended, replayed on exactly the same requests: output does not depend
on the draft, so that replay is what this draft would have done. It was trained on the first stream, so only the later
ones compare. Both rates are accepted / proposed draft tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import msgspec
import torch

from benchmarks.report import RESULTS, Goal, Table, finish, progress
from benchmarks.service import running_service, wait_until, with_serving
from deploy.local.queries import Query, read_queries
from deploy.local.traffic import Client, Outcome, connected
from deploy.local.verdict import load_draft
from slipstream.acceptance import AcceptanceCounts, acceptance_rate, count
from slipstream.config import Config, Settings
from slipstream.errors import ConfigError
from slipstream.learning.shadow import score
from slipstream.models.checkpoint import Checkpoint
from slipstream.promotion import lower_bound
from slipstream.records import Observation, decode_observation, observation_id
from slipstream.stores.opening import open_log, open_pointers
from slipstream.stores.protocols import PointerStore
from slipstream.versions import DEFAULT_DOMAIN, ServingPointer
from tests.servers import KAFKA_START, KafkaBroker

mpl.use("Agg")
from matplotlib import pyplot

SHARED_QUERIES = Path(__file__).parents[2] / "shared" / "data" / "queries"
INITIAL_DRAFT = Path(__file__).parents[1] / "deploy" / "models" / "draft-2m-general"
WINDOW = 50
GAIN = 0.10
QUICK_GAIN = 0.03
ERROR_RATE = 0.025
MAX_PROMPT_CHARS = 600
DRAIN_TIMEOUT_S = 60.0


class Answered(msgspec.Struct, frozen=True):
    """One request: what the replica counted, and what the frozen draft would have had."""

    stream: str
    at: float
    online: AcceptanceCounts
    frozen: AcceptanceCounts

    @property
    def difference(self) -> float:
        """Acceptance rate online minus frozen."""
        return acceptance_rate(self.online) - acceptance_rate(self.frozen)


async def send(client: Client, queries: Sequence[Query], *, stream: str, per_s: float) -> list[Outcome]:
    """Send queries at a fixed rate; returns when all are answered."""
    clock = asyncio.get_running_loop()
    began = clock.time()
    tasks = []
    for number, query in enumerate(queries):
        await asyncio.sleep(max(0.0, began + number / per_s - clock.time()))
        tasks.append(asyncio.create_task(client.ask(query, domain=stream)))
        if number % WINDOW == WINDOW - 1:
            progress(f"  {stream}: {number + 1} of {len(queries)} sent, {clock.time() - began:.0f} s")
    return list(await asyncio.gather(*tasks))


async def run_streams(
    api_url: str, streams: dict[str, list[Query]], pointers: PointerStore, *, per_s: float
) -> tuple[ServingPointer, int]:
    """Send every stream in order; returns the pointer at the end of the first one, and how many requests failed."""
    frozen: ServingPointer | None = None
    num_failed = 0
    async with connected(api_url) as client:
        for stream, queries in streams.items():
            outcomes = await send(client, queries, stream=stream, per_s=per_s)
            failures = [outcome.error for outcome in outcomes if outcome.error]
            num_failed += len(failures)
            if failures:
                progress(f"  {len(failures)} requests failed, the first: {failures[0]}")
            current = pointers.read("draft", DEFAULT_DOMAIN)
            assert current is not None
            progress(f"  {stream} done, draft version {current.version} serves")
            frozen = frozen or current
    assert frozen is not None
    return frozen, num_failed


def read_log(settings: Settings, *, num_expected: int) -> list[Observation]:
    """Every observation in the log, each once, in order of time."""
    log = open_log(settings)
    subscription = log.subscribe("benchmark")
    found: dict[str, Observation] = {}

    def has_all() -> bool:
        for entry in subscription.poll(max_records=500, timeout_s=1.0):
            observation = decode_observation(entry.record)
            found[observation_id(observation)] = observation
        return len(found) >= num_expected

    wait_until(has_all, timeout_s=DRAIN_TIMEOUT_S, what="the log to hold every observation")
    subscription.close()
    log.close()
    return sorted(found.values(), key=lambda one: one.at)


def answered(observations: Sequence[Observation], frozen: Checkpoint, *, num_draft_tokens: int) -> list[Answered]:
    """Each request's counts, online as logged and frozen as replayed."""
    return [
        Answered(one.domain, one.at, count(one.rounds), score(frozen, one, num_draft_tokens=num_draft_tokens).counts)
        for one in observations
    ]


def pooled(counts: Sequence[AcceptanceCounts]) -> float:
    """Acceptance rate over many requests: all accepted over all proposed tokens."""
    proposed = sum(one.num_proposed for one in counts)
    return sum(one.num_accepted for one in counts) / proposed if proposed else 0.0


def summarize(requests: Sequence[Answered], streams: Sequence[str], *, gain: float) -> tuple[list[Table], list[Goal]]:
    """Acceptance per WINDOW queries of each stream, and the goals on the last window of all but the first."""
    rows: list[tuple[str, ...]] = []
    goals: list[Goal] = []
    for stream in streams:
        mine = [one for one in requests if one.stream == stream]
        for first in range(0, len(mine), WINDOW):
            window = mine[first : first + WINDOW]
            online, frozen = pooled([one.online for one in window]), pooled([one.frozen for one in window])
            compared = ("trained on", "") if stream == streams[0] else (f"{frozen:.3f}", f"{online - frozen:+.3f}")
            rows.append((stream, f"{first + 1}-{first + len(window)}", f"{online:.3f}", *compared))
        if stream == streams[0]:
            continue
        differences = tuple(one.difference for one in mine[-WINDOW:])
        mean, low = lower_bound(differences, error_rate=ERROR_RATE)
        progress(
            f"{stream}, last {len(differences)}: online - frozen = {mean:+.3f}, "
            f"95 % interval {low:+.3f} to {2 * mean - low:+.3f}"
        )
        goals.append(Goal(figure=f"{stream}: online - frozen, last {WINDOW}", value=mean, at_least=gain))
        goals.append(Goal(figure=f"{stream}: lower end of its 95 % interval", value=low, at_least=1e-9))
    return [Table(columns=("stream", "queries", "online", "frozen", "difference"), rows=tuple(rows))], goals


def draw(requests: Sequence[Answered], streams: Sequence[str], history: Sequence[ServingPointer]) -> None:
    """Acceptance over the queries; solid lines where a stream begins, dotted ones where the pointer moved."""
    ordered = [one for stream in streams for one in requests if one.stream == stream]
    starts = [next(i for i, one in enumerate(ordered) if one.stream == stream) for stream in streams]
    figure, axes = pyplot.subplots(figsize=(9, 4))
    for name, first in (("online", 0), ("frozen", starts[1] if len(starts) > 1 else 0)):
        places = range(first, len(ordered))
        windows = [ordered[max(first, place - WINDOW // 2) : place + 1] for place in places]
        axes.plot(places, [pooled([getattr(one, name) for one in window]) for window in windows], label=name)
    for start, stream in zip(starts, streams, strict=True):
        axes.axvline(start, color="grey", linewidth=0.8)
        axes.text(start + 2, axes.get_ylim()[1], stream, va="top", fontsize=8)
    for pointer in history:
        axes.axvline(sum(one.at < pointer.set_at for one in ordered), color="grey", linewidth=0.6, linestyle=":")
    axes.set(xlabel="query", ylabel=f"acceptance rate, last {WINDOW // 2} queries")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.9))
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "shift.png", dpi=120)


def load_streams(directory: Path, names: Sequence[str], number: int) -> dict[str, list[Query]]:
    """The first `number` prompts of each stream that fit the target's context of training."""
    streams = {}
    for name in names:
        path = directory / f"{name}.jsonl.gz"
        if not path.exists():
            raise ConfigError(f"no {path}; expected one gzipped JSON Lines file a stream, see --data")
        streams[name] = list(
            islice((query for query in read_queries(path) if len(query.prompt) <= MAX_PROMPT_CHARS), number)
        )
    return streams


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="gsm8k,wikisql,python_docstring")
    parser.add_argument("--queries", type=int, default=300, help="queries a stream")
    parser.add_argument("--per-second", type=float, default=2.5, help="arrivals a second")
    parser.add_argument("--data", type=Path, default=SHARED_QUERIES, metavar="DIRECTORY")
    parser.add_argument("--quick", action="store_true", help="two streams of 120 queries")
    return parser


def main() -> int:
    """Run the benchmark; returns the exit code."""
    arguments = _parser().parse_args()
    names, number = arguments.streams.split(","), arguments.queries
    if arguments.quick:
        names, number = names[:2], 120
    torch.set_num_threads(1)
    try:
        streams = load_streams(arguments.data, names, number)
        if not KAFKA_START.is_file():
            raise ConfigError(f"no {KAFKA_START}; expected a script that starts a Kafka broker (tests/servers.py)")
    except ConfigError as error:
        print(f"benchmarks.shift: {error}", file=sys.stderr)
        return 2
    config = with_serving(Config(), initial_draft=str(INITIAL_DRAFT), drafting="chain")
    with tempfile.TemporaryDirectory(prefix="slipstream-shift-") as directory:
        progress("starting a Kafka broker")
        broker = KafkaBroker(Path(directory) / "kafka")
        try:
            progress("starting the service")
            with running_service(Path(directory) / "state", config, kafka=broker.bootstrap) as (endpoints, settings):
                pointers = open_pointers(settings)
                wait_until(
                    lambda: any(one.version for one in pointers.acknowledgements("draft", DEFAULT_DOMAIN)),
                    timeout_s=60.0,
                    what="the initial draft",
                )
                frozen, num_failed = asyncio.run(
                    run_streams(endpoints.api_url, streams, pointers, per_s=arguments.per_second)
                )
                history = pointers.history("draft", DEFAULT_DOMAIN, limit=1000)
                observations = read_log(settings, num_expected=len(names) * number - num_failed)
                progress(
                    f"replaying draft version {frozen.version}, frozen at the end of {names[0]}, "
                    f"on {len(observations)} requests"
                )
                requests = answered(observations, load_draft(frozen), num_draft_tokens=config.serving.num_draft_tokens)
        finally:
            broker.stop()
    tables, goals = summarize(requests, names, gain=QUICK_GAIN if arguments.quick else GAIN)
    draw(requests, names, history)
    goals.append(Goal(figure="failed requests", value=num_failed, at_most=0))
    later = [one for one in requests if one.stream != names[0]]
    figures = {goal.figure: goal.value for goal in goals} | {
        "pointer moves": float(len(history)),
        "mean acceptance rate online, later streams": fmean(acceptance_rate(one.online) for one in later),
        "mean acceptance rate frozen, later streams": fmean(acceptance_rate(one.frozen) for one in later),
    }
    return finish("shift", tables=tables, figures=figures, goals=goals)


if __name__ == "__main__":
    sys.exit(main())
