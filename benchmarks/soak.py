"""Nothing leaks under load and cancellations: `python -m benchmarks.soak [--quick]`.

Thousands of requests of real prompts and mixed lengths, 32 at a time, a fifth of them cancelled at a random step, with
a draft, over a cache so small that requests are preempted. At the end every block is free, memory is what it was after
warm-up, and every request that was not cancelled has exactly its tokens.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec
import torch

from benchmarks.exactness import MODELS, SHARED_QUERIES, TARGET, load_prompts
from benchmarks.report import RESULTS, Goal, Table, finish, progress
from slipstream.engine.engine import Engine
from slipstream.engine.plan import BLOCK_TOKENS
from slipstream.engine.request import Request, SamplingParams, TokenBlock
from slipstream.engine.scheduler import EngineLimits
from slipstream.models.checkpoint import load_checkpoint, target_digest
from slipstream.telemetry import ReplicaMetrics

mpl.use("Agg")
from matplotlib import pyplot

NUM_CONCURRENT = 32
CONTEXT_TOKENS = 512
NUM_BLOCKS = 4 * CONTEXT_TOKENS // BLOCK_TOKENS
"""Room for 4 of the longest requests where 32 would run, so that some wait and some are preempted."""

TOKENS_OF_A_REQUEST = (1, 200)
CANCELLED_SHARE = 0.2
STEPS_BEFORE_CANCEL = (1, 150)
NEVER = -(1 << 40)
"""The step of a request that is not cancelled."""

NUM_PROMPTS = 600

WARM_UP_SHARE = 0.25
MAX_GROWTH_MB = 16.0
"""What the process may be larger by at the end than when WARM_UP_SHARE of the requests had ended; a kilobyte kept of
every token would be ten times that."""

STEPS_BETWEEN_SAMPLES = 20


class Caller(msgspec.Struct, kw_only=True):
    """One request from outside: what it asked for, and what it got so far."""

    request: Request
    cancel_at_step: int
    num_tokens: int = 0
    is_cancelled: bool = False
    finish_reason: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self.is_cancelled or self.finish_reason is not None

    @property
    def is_right(self) -> bool:
        """Whether it got exactly its tokens; true of a cancelled one."""
        wanted = self.request.sampling.max_tokens
        return self.is_cancelled or (self.finish_reason == "length" and self.num_tokens == wanted)

    def receive(self, block: TokenBlock) -> None:
        """Take a block of tokens."""
        self.num_tokens += len(block.token_ids)
        self.finish_reason = block.finish_reason


class Soaked(msgspec.Struct):
    """What a run left: `samples` are (requests ended, resident megabytes), one every STEPS_BETWEEN_SAMPLES steps."""

    num_steps: int = 0
    num_ended: int = 0
    num_cancelled: int = 0
    num_wrong: int = 0
    num_tokens: int = 0
    least_free_blocks: int = NUM_BLOCKS
    samples: list[tuple[int, float]] = []


def soak(engine: Engine, prompts: Sequence[tuple[int, ...]], number: int) -> Soaked:
    """Serve `number` requests, NUM_CONCURRENT at a time, until the engine has nothing left to do."""
    rng = random.Random(0)
    left = _callers(prompts, number, rng)
    callers: list[Caller] = []
    done = Soaked()
    is_busy = True
    while is_busy or callers:
        while len(callers) < NUM_CONCURRENT and (caller := next(left, None)) is not None:
            caller.cancel_at_step += done.num_steps
            callers.append(caller)
            engine.submit(caller.request, caller.receive)
        _cancel_some(engine, callers, done.num_steps)
        is_busy = engine.step()
        callers = _retire(callers, done)
        done.num_steps += 1
        done.least_free_blocks = min(done.least_free_blocks, engine.num_free_blocks)
        if done.num_steps % STEPS_BETWEEN_SAMPLES == 0:
            done.samples.append((done.num_ended, resident_mb()))
        if done.num_steps % 1000 == 0:
            progress(f"  step {done.num_steps}: {done.num_ended} of {number} ended, {resident_mb():.0f} MB")
    done.samples.append((done.num_ended, resident_mb()))
    return done


def _cancel_some(engine: Engine, callers: Sequence[Caller], step: int) -> None:
    for caller in callers:
        if caller.cancel_at_step == step:
            engine.cancel(caller.request.request_id)
            caller.is_cancelled = True


def _retire(callers: Sequence[Caller], done: Soaked) -> list[Caller]:
    """Count the callers that are done; returns the others."""
    for caller in callers:
        if caller.is_done:
            done.num_ended += 1
            done.num_cancelled += caller.is_cancelled
            done.num_wrong += not caller.is_right
            done.num_tokens += caller.num_tokens
    return [caller for caller in callers if not caller.is_done]


def _callers(prompts: Sequence[tuple[int, ...]], number: int, rng: random.Random) -> Iterator[Caller]:
    for index in range(number):
        sampling = SamplingParams(
            seed=index, max_tokens=rng.randint(*TOKENS_OF_A_REQUEST), temperature=rng.choice((0.0, 0.6, 1.0))
        )
        request = Request(
            request_id=f"soak-{index}",
            prompt_ids=prompts[index % len(prompts)],
            sampling=sampling,
            tenant=f"tenant-{index % 3}",
            domain="soak",
            may_train=True,
            arrived_at=0.0,
        )
        is_cancelled = rng.random() < CANCELLED_SHARE
        yield Caller(request=request, cancel_at_step=rng.randint(*STEPS_BEFORE_CANCEL) if is_cancelled else NEVER)


def resident_mb() -> float:
    """Memory of this process that is in RAM, in 10^6 bytes; needs /proc."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth_mb(soaked: Soaked, number: int) -> float:
    """Megabytes at the end over those when WARM_UP_SHARE of the requests had ended."""
    warm = next(megabytes for ended, megabytes in soaked.samples if ended >= WARM_UP_SHARE * number)
    return soaked.samples[-1][1] - warm


def make_engine(metrics: ReplicaMetrics) -> Engine:
    """The reference target and a draft over NUM_BLOCKS blocks; observations are made and thrown away."""
    engine = Engine(
        load_checkpoint(TARGET),
        limits=EngineLimits(
            max_running_requests=NUM_CONCURRENT,
            max_queued_requests=NUM_CONCURRENT,
            max_step_tokens=512,
            max_context_tokens=CONTEXT_TOKENS,
            num_draft_tokens=2,
            num_blocks=NUM_BLOCKS,
        ),
        target_digest=target_digest(TARGET),
        replica_id="benchmark",
        top_n=16,
        observe=lambda observation: None,
        metrics=metrics,
    )
    engine.install_draft(load_checkpoint(MODELS / "draft-2m-sibling"), version=1)
    return engine


def draw(soaked: Soaked) -> None:
    """Resident memory over the requests that ended."""
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.plot(*zip(*soaked.samples, strict=True))
    axes.set(xlabel="requests ended", ylabel="resident memory, MB", ylim=(0, None))
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "soak.png", dpi=120)


def main() -> int:
    """Run the soak; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="400 requests instead of 2,000")
    number = 400 if parser.parse_args().quick else 2000
    torch.set_num_threads(1)
    metrics = ReplicaMetrics()
    engine = make_engine(metrics)
    soaked = soak(engine, load_prompts(SHARED_QUERIES, NUM_PROMPTS), number)
    draw(soaked)
    num_preempted = metrics.registry.get_sample_value("slipstream_preemptions_total") or 0.0
    goals = [
        Goal(figure="requests ended", value=soaked.num_ended, at_least=number),
        Goal(figure="requests not cancelled without exactly their tokens", value=soaked.num_wrong, at_most=0),
        Goal(figure="requests cancelled", value=soaked.num_cancelled, at_least=number * CANCELLED_SHARE / 4),
        Goal(figure="blocks not free at the end", value=NUM_BLOCKS - engine.num_free_blocks, at_most=0),
        Goal(figure="preemptions", value=num_preempted, at_least=1),
        Goal(figure="growth after warm-up, MB", value=growth_mb(soaked, number), at_most=MAX_GROWTH_MB),
    ]
    figures = {goal.figure: goal.value for goal in goals} | {
        "steps": soaked.num_steps,
        "tokens": soaked.num_tokens,
        "least free blocks": soaked.least_free_blocks,
        "resident memory at the end, MB": soaked.samples[-1][1],
    }
    rows = tuple((name, f"{value:.6g}") for name, value in figures.items())
    return finish("soak", tables=[Table(columns=("figure", "value"), rows=rows)], figures=figures, goals=goals)


if __name__ == "__main__":
    sys.exit(main())
