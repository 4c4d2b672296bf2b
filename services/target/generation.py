"""One request in flight: blocks from the engine's thread become text on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from services.target.openai_answers import FinishReason
from services.target.text_stream import TextStream
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
    """A submitted request. Iterate `texts` once, and call `close` whatever happens.

    After `texts` has ended, `finish_reason` says why and `num_tokens` counts the tokens the answer is made of.
    """

    def __init__(self, runner: Runner, request: Request, *, text: TextStream, metrics: ReplicaMetrics) -> None:
        """Submit `request`; raises what `Runner.submit` raises."""
        self.finish_reason: FinishReason = "length"
        self._runner = runner
        self._request = request
        self._text = text
        self._metrics = metrics
        self._first_at = self._last_at = 0.0
        self._is_over = False
        self._loop = asyncio.get_running_loop()
        self._blocks: asyncio.Queue[TokenBlock] = asyncio.Queue()
        runner.submit(request, self._on_block)

    @property
    def num_tokens(self) -> int:
        """Tokens taken into the answer so far."""
        return self._text.num_tokens

    async def texts(self) -> AsyncIterator[str]:
        """The text of each block that has some, then what was held back.

        Raises GenerationFailed, or EngineStopped if the replica stops under the request.
        """
        while not self._is_over:
            block = await self._blocks.get()
            if block.finish_reason in ("error", "cancelled"):
                self._is_over = True
                if block.error == REPLICA_STOPPING:
                    raise EngineStopped(block.error)
                raise GenerationFailed(block.error or "the request was cancelled; send it again")
            self._note_time()
            text = self._text.push(block.token_ids)
            if block.finish_reason is not None:
                self._is_over = True
                self.finish_reason = "length" if block.finish_reason == "length" else "stop"
                text += self._text.finish()
            if self._text.is_stopped:
                self.finish_reason = "stop"
            if text:
                yield text
            if self._text.is_stopped:
                break
        self._record()

    def close(self) -> None:
        """Free the engine's slot if the request still runs (the client left, or a stop string ended it)."""
        if not self._is_over:
            self._is_over = True
            self._runner.cancel(self._request.request_id)

    def _on_block(self, block: TokenBlock) -> None:
        """On the engine's thread: hand the block over; nobody is left to take it when the loop has closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._blocks.put_nowait, block)

    def _note_time(self) -> None:
        self._last_at = time.monotonic()
        if not self._first_at:
            self._first_at = self._last_at
            self._metrics.first_token_s.observe(self._first_at - self._request.arrived_at)

    def _record(self) -> None:
        self._metrics.request_latency_s.observe(self._last_at - self._request.arrived_at)
        if self.num_tokens > 1:
            self._metrics.output_token_s.observe((self._last_at - self._first_at) / (self.num_tokens - 1))
