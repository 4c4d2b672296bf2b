"""Our engine, measured in a process of its own as its peers are (`benchmarks.peers.protocol`).

Plain decoding, prefill and batches go through `Engine.step`, as served: observations are gathered, prefixes are not
reused. Verification passes go to the decoder itself (`engine_passes`).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import slipstream_kernels
from benchmarks.engine_passes import measure_passes
from benchmarks.peers.protocol import Task, Timing, answer, median_gap_ms
from slipstream import __version__
from slipstream.engine import passes, sampling
from slipstream.engine.decoders import open_decoder
from slipstream.engine.engine import Engine
from slipstream.engine.plan import BLOCK_TOKENS, Move, PagedDecoder, StepOutput, StepPlan
from slipstream.engine.request import Request, SamplingParams, TokenBlock
from slipstream.engine.scheduler import EngineLimits
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.telemetry import ReplicaMetrics

MAX_STEP_TOKENS = 512
BATCH_PROMPT_TOKENS = 32
BATCH_TOKENS = 32
_WARM_UP_TOKENS = 8
_PLAIN_RUNS = 5
"""So many that a collection of Python's garbage (80 ms, once in some hundred steps of a new process) is no median."""


class KernelClock:
    """Seconds spent inside kernels: the decoder's calls, and the choice of tokens and log-probabilities."""

    def __init__(self) -> None:
        self.seconds = 0.0
        # Where the engine calls the two kernels that are not the decoder's.
        for module, name in ((sampling, "choose"), (passes, "top_logprobs")):
            setattr(module, name, self.timed(getattr(module, name)))

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time added to `seconds`."""

        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **named)
            self.seconds += time.perf_counter() - started
            return result

        return call

    def open_decoder(
        self, checkpoint: Checkpoint, *, num_blocks: int, num_node_slots: int, max_rows: int, device: str = "cpu"
    ) -> PagedDecoder:
        """`decoders.open_decoder`, with the decoder's calls timed."""
        return TimedDecoder(
            open_decoder(
                checkpoint, num_blocks=num_blocks, num_node_slots=num_node_slots, max_rows=max_rows, device=device
            ),
            self,
        )


class TimedDecoder:
    """A `PagedDecoder` whose calls run on a clock."""

    def __init__(self, decoder: PagedDecoder, clock: KernelClock) -> None:
        self.config = decoder.config
        self.is_exact = decoder.is_exact
        self._forward = clock.timed(decoder.forward)
        self._keep = clock.timed(decoder.keep)

    def forward(self, plan: StepPlan) -> StepOutput:
        """See `PagedDecoder.forward`."""
        output: StepOutput = self._forward(plan)
        return output

    def keep(self, moves: Sequence[Move]) -> None:
        """See `PagedDecoder.keep`."""
        self._keep(moves)


def measure(task: Task) -> Timing:
    """Run the task in this process."""
    torch.set_num_threads(task.num_threads)
    slipstream_kernels.set_num_threads(task.num_threads)
    checkpoint = load_checkpoint(Path(task.model))
    clock = KernelClock()
    engine = make_engine(checkpoint, task, clock)
    run(engine, [task.prompt_ids], num_tokens=_WARM_UP_TOKENS)
    plain = [run(engine, [task.prompt_ids], num_tokens=task.num_tokens, clock=clock) for _ in range(_PLAIN_RUNS)]
    prefills = [run(engine, [task.text_ids], num_tokens=1).first_token_s for _ in range(task.num_repeats)]
    batches = {size: batch_tokens_per_s(engine, task, size) for size in task.batch_sizes}
    del engine
    pass_ms, experts = measure_passes(checkpoint, task)
    return Timing(
        token_ids=tuple(plain[0].token_ids[0]),
        prefill_tokens_per_s=len(task.text_ids) / statistics.median(prefills),
        pass_ms=pass_ms,
        experts_touched=experts,
        kernel_share=statistics.median(each.kernel_s / each.decode_s for each in plain),
        batch_tokens_per_s=batches,
        version=f"slipstream {__version__}, {slipstream_kernels.instruction_set()}",
    )


def plain_runs(task: Task) -> Callable[[], float]:
    """Load the task's model; what is returned decodes plainly and gives the milliseconds a token."""
    torch.set_num_threads(task.num_threads)
    slipstream_kernels.set_num_threads(task.num_threads)
    engine = make_engine(load_checkpoint(Path(task.model)), task, KernelClock())
    return lambda: median_gap_ms(run(engine, [task.prompt_ids], num_tokens=task.num_tokens).stamps)


def make_engine(checkpoint: Checkpoint, task: Task, clock: KernelClock) -> Engine:
    """An engine as a replica builds it, without a draft, with room for the largest batch."""
    gc.freeze()  # as a replica does
    longest = max(len(task.prompt_ids) + task.num_tokens, len(task.text_ids) + 1, BATCH_PROMPT_TOKENS + BATCH_TOKENS)
    max_running = max(task.batch_sizes)
    return Engine(
        checkpoint,
        limits=EngineLimits(
            max_running_requests=max_running,
            max_queued_requests=max_running,
            max_step_tokens=MAX_STEP_TOKENS,
            max_context_tokens=longest,
            num_draft_tokens=0,
            num_blocks=max_running * -(-longest // BLOCK_TOKENS),
            reuses_prefixes=False,
        ),
        target_digest=checkpoint.digest,
        replica_id="benchmark",
        top_n=16,
        observe=lambda observation: None,
        metrics=ReplicaMetrics(),
        decoders=clock.open_decoder,
    )


class Run:
    """What came of some requests, by request: tokens and the second each was given out.

    `decode_s` and `kernel_s` are the time of the steps after every request had its first token, and the part of it
    inside kernels; `first_token_s` is how long the first of all tokens took.
    """

    def __init__(self, number: int) -> None:
        self.token_ids: list[list[int]] = [[] for _ in range(number)]
        self.stamps: list[list[float]] = [[] for _ in range(number)]
        self.decode_s = 0.0
        self.kernel_s = 0.0
        self.first_token_s = 0.0

    def collector(self, index: int) -> Callable[[TokenBlock], None]:
        """What a request's blocks are given to."""

        def collect(block: TokenBlock) -> None:
            self.token_ids[index] += block.token_ids
            self.stamps[index] += [time.perf_counter()] * len(block.token_ids)

        return collect


def run(engine: Engine, prompts: Sequence[Sequence[int]], *, num_tokens: int, clock: KernelClock | None = None) -> Run:
    """Serve the prompts together to the end, greedily."""
    done = Run(len(prompts))
    started = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.submit(_request(index, prompt, num_tokens), done.collector(index))
    while not all(done.stamps):
        engine.step()
    done.first_token_s = done.stamps[0][0] - started
    kernel_began, began = clock.seconds if clock else 0.0, time.perf_counter()
    while engine.step():
        pass
    done.decode_s = time.perf_counter() - began
    done.kernel_s = clock.seconds - kernel_began if clock else 0.0
    return done


def batch_tokens_per_s(engine: Engine, task: Task, size: int) -> float:
    """Tokens a second of `size` requests together while all of them decode; the median of the task's repeats."""
    text, length = task.text_ids, BATCH_PROMPT_TOKENS
    starts = [index * (len(text) - length) // max(task.batch_sizes) for index in range(size)]
    prompts = [text[start : start + length] for start in starts]
    return statistics.median(
        _tokens_per_s(run(engine, prompts, num_tokens=BATCH_TOKENS)) for _ in range(task.num_repeats)
    )


def _tokens_per_s(done: Run) -> float:
    """From when every request has its first token until the first of them ends."""
    began = max(stamps[0] for stamps in done.stamps)
    ended = min(stamps[-1] for stamps in done.stamps)
    return sum(began < stamp <= ended for stamps in done.stamps for stamp in stamps) / (ended - began)


def _request(index: int, prompt: Sequence[int], num_tokens: int) -> Request:
    return Request(
        request_id=f"request-{index}",
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(seed=index, max_tokens=num_tokens, temperature=0.0),
        tenant="benchmark",
        domain="benchmark",
        may_train=True,
        arrived_at=time.monotonic(),
    )


if __name__ == "__main__":
    answer(measure, plain_runs)
