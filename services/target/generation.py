"""One call in flight: blocks of its samples, from the engine's thread, become parts of choices on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from services.target.openai_answers import ChoicePart, FinishReason
from services.target.openai_logprobs import ReportedToken
from services.target.text_stream import TextStream, TokenBytes
from slipstream.engine.request import REPLICA_STOPPING, Request, TokenBlock
from slipstream.errors import EngineStopped, GenerationFailed
from slipstream.telemetry import ReplicaMetrics


class Runner(Protocol):
    """What the ingress needs of `engine.runner.EngineRunner`."""

    def submit(self, request: Request, on_block: Callable[[TokenBlock], None]) -> None:
        """Queue a request; raises RequestError, QueueFull or EngineStopped."""

    def cancel(self, request_id: str) -> None:
        """Drop a request; unknown ids are ignored."""

    def is_healthy(self) -> bool:
        """Whether requests are being served."""

    @property
    def draft_version(self) -> int:
        """The draft version that serves now; 0 without one."""


class Generation:
    """The samples of one call, submitted. Iterate `parts` once, and call `close` whatever happens."""

    def __init__(
        self, runner: Runner, requests: Sequence[Request], *, token_bytes: TokenBytes, metrics: ReplicaMetrics
    ) -> None:
        """Submit all of `requests` or, if one is refused, none; raises what `Runner.submit` raises."""
        self._runner = runner
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._blocks: asyncio.Queue[tuple[int, TokenBlock]] = asyncio.Queue()
        self._samples = [_Sample(index, request, token_bytes) for index, request in enumerate(requests)]
        self._submit()

    @property
    def num_tokens(self) -> int:
        """Tokens taken into the choices so far."""
        return sum(sample.text.num_tokens for sample in self._samples)

    async def parts(self) -> AsyncIterator[ChoicePart]:
        """What each block adds to its choice, in the order in which the engine committed them; may be empty of text.

        Raises GenerationFailed, or EngineStopped if the replica stops under the call.
        """
        while not all(sample.is_over for sample in self._samples):
            index, block = await self._blocks.get()
            sample = self._samples[index]
            if sample.is_over:
                continue  # the engine had more to say after a stop string
            if block.finish_reason in ("error", "cancelled"):
                sample.is_over = True
                if block.error == REPLICA_STOPPING:
                    raise EngineStopped(block.error)
                raise GenerationFailed(block.error or "the request was cancelled; send it again")
            self._note_time(sample)
            part = sample.take(block)
            if sample.is_over:
                self._record(sample)
                if block.finish_reason is None:
                    self._runner.cancel(sample.request.request_id)
            yield part

    def close(self) -> None:
        """Free the engine's slots of the samples that still run: the client left, or another sample failed."""
        for sample in self._samples:
            if not sample.is_over:
                sample.is_over = True
                self._runner.cancel(sample.request.request_id)

    def _submit(self) -> None:
        with contextlib.ExitStack() as undo:
            for sample in self._samples:
                self._runner.submit(sample.request, self._taker(sample.index))
                undo.callback(self._runner.cancel, sample.request.request_id)
            undo.pop_all()

    def _taker(self, index: int) -> Callable[[TokenBlock], None]:
        """What the engine's thread calls: hands a block over; nobody is left to take it when the loop has closed."""

        def on_block(block: TokenBlock) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._blocks.put_nowait, (index, block))

        return on_block

    def _note_time(self, sample: _Sample) -> None:
        sample.last_at = time.monotonic()
        if not sample.first_at:
            sample.first_at = sample.last_at
            self._metrics.first_token_s.observe(sample.first_at - sample.request.arrived_at)

    def _record(self, sample: _Sample) -> None:
        self._metrics.request_latency_s.observe(sample.last_at - sample.request.arrived_at)
        num_intervals = sample.text.num_tokens - 1
        if num_intervals > 0:
            self._metrics.output_token_s.observe((sample.last_at - sample.first_at) / num_intervals)


class _Sample:
    """One choice as its blocks arrive; `first_at` and `last_at` are monotonic times of blocks, 0 before the first."""

    def __init__(self, index: int, request: Request, token_bytes: TokenBytes) -> None:
        self.index = index
        self.request = request
        self.text = TextStream(token_bytes, request.sampling.stop_strings)
        self.first_at = self.last_at = 0.0
        self.is_over = False

    def take(self, block: TokenBlock) -> ChoicePart:
        """Add a block that is no failure; the part that ends the choice carries the reason."""
        num_before = self.text.num_tokens
        text = self.text.push(block.token_ids)
        if block.finish_reason is not None:
            text += self.text.finish()
        self.is_over = self.text.is_stopped or block.finish_reason is not None
        finish_reason: FinishReason | None = None
        if self.is_over:
            is_cut = block.finish_reason == "length" and not self.text.is_stopped
            finish_reason = "length" if is_cut else "stop"
        tokens = self._reported(block, num_before)
        return ChoicePart(index=self.index, text=text, tokens=tokens, finish_reason=finish_reason)

    def _reported(self, block: TokenBlock, num_before: int) -> tuple[ReportedToken, ...]:
        """The log-probabilities of the tokens taken in; what comes after a stop string has none to report."""
        offsets = self.text.token_offsets[num_before:]
        return tuple(
            ReportedToken(token_id=token_id, offset=offset, logprobs=logprobs)
            for token_id, offset, logprobs in zip(block.token_ids, offsets, block.logprobs, strict=False)
        )
