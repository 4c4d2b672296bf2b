"""Which sequences run: a queue of bounded length, slots, and a token budget per step."""

from __future__ import annotations

import threading
from collections import deque

import msgspec

from slipstream.engine.batch import OnBlock, RunningSequence
from slipstream.engine.request import Request
from slipstream.errors import EngineStopped, QueueFull


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of an engine; all counts, `num_draft_tokens` 0 switches speculation off. Defaults are `ServingConfig`'s."""

    max_running_requests: int
    max_queued_requests: int
    max_step_tokens: int
    max_context_tokens: int
    num_draft_tokens: int


class Scheduler:
    """Admits requests in order of arrival; `enqueue` and `cancel` may be called from any thread."""

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Request, OnBlock]] = deque()
        self._cancelled: set[str] = set()
        self._free_slots = list(reversed(range(limits.max_running_requests)))
        self._is_closed = False
        self.running: list[RunningSequence] = []

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def enqueue(self, request: Request, on_block: OnBlock) -> None:
        """Put a request into the queue; raises QueueFull, or EngineStopped after `close`."""
        with self._lock:
            if self._is_closed:
                raise EngineStopped("this replica is stopping and takes no more requests; another one will answer")
            # A free slot is as good as a place in the queue: the limit counts requests that must really wait.
            num_free = len(self._free_slots)
            if len(self._waiting) >= self._limits.max_queued_requests + num_free:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting, the limit is {self._limits.max_queued_requests}; "
                    "retry later"
                )
            self._waiting.append((request, on_block))

    def cancel(self, request_id: str) -> None:
        """Forget a request at the next step, wherever it is; an unknown id is ignored."""
        with self._lock:
            self._cancelled.add(request_id)

    def admit(self) -> list[RunningSequence]:
        """Take waiting requests into free slots and cancelled ones out; returns the sequences taken out."""
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            if cancelled:
                self._waiting = deque(item for item in self._waiting if item[0].request_id not in cancelled)
            left = [sequence for sequence in self.running if sequence.request.request_id in cancelled]
            for sequence in left:
                self._release(sequence)
            while self._waiting and self._free_slots:
                request, on_block = self._waiting.popleft()
                self.running.append(RunningSequence(request, on_block, self._free_slots.pop()))
            return left

    def release(self, sequence: RunningSequence) -> None:
        """Give a finished sequence's slot back."""
        with self._lock:
            self._release(sequence)

    def close(self) -> None:
        """Refuse every request from now on."""
        with self._lock:
            self._is_closed = True

    def drain(self) -> list[tuple[Request, OnBlock]]:
        """Empty the queue; returns what waited."""
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
            return waiting

    def _release(self, sequence: RunningSequence) -> None:
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)

    def prefill_budgets(self) -> dict[int, int]:
        """Tokens each sequence that is still reading its prompt may compute in this step, by slot.

        Decoding sequences always run and come off the budget first, so prefill never starves them; at least one
        token is granted, so prefill is never starved either.
        """
        budget = self._limits.max_step_tokens
        budget -= sum(1 + self._limits.num_draft_tokens for sequence in self.running if sequence.is_decoding)
        budgets: dict[int, int] = {}
        for sequence in self.running:
            if not sequence.is_decoding:
                budgets[sequence.slot] = min(
                    max(budget, 0 if budgets else 1), len(sequence.token_ids) - sequence.num_computed
                )
                budget -= budgets[sequence.slot]
        return budgets
