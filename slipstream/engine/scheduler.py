"""Who is served in the next step, and where their keys and values go.

Requests are served in the order of their arrival: `running` and the queue stand in it, whatever is preempted. The
oldest request always makes progress, since any newer one gives up its blocks for it, and alone it always fits.
"""

from __future__ import annotations

import threading
from collections import deque

import msgspec
import numpy as np

from slipstream.engine.batch import NO_SLOT, RunningSequence
from slipstream.engine.blocks import BlockPool, PrefixKey, blocks_for, prefix_key
from slipstream.engine.plan import BLOCK_TOKENS, Int32
from slipstream.errors import EngineStopped, QueueFull


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of an engine; all counts. Defaults are `ServingConfig`'s.

    `num_draft_tokens` bounds the nodes of a draft tree and so its depth; 0 switches speculation off. Nodes come on top
    of `max_step_tokens`. `num_blocks` of 16 positions are the whole K/V cache. `reuses_prefixes` False computes every
    prompt anew.
    """

    max_running_requests: int
    max_queued_requests: int
    max_step_tokens: int
    max_context_tokens: int
    num_draft_tokens: int
    num_blocks: int = 1024
    reuses_prefixes: bool = True


class Scheduler:
    """Plans each step; `enqueue` and `cancel` may be called from any thread, the rest from the engine's.

    `block_tables_BC` holds the blocks of the sequence in each slot; entries behind its last block mean nothing.
    `freed_slots` are those whose sequence left since the engine last emptied the list.
    """

    def __init__(self, limits: EngineLimits, *, max_context_tokens: int) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._waiting: deque[RunningSequence] = deque()
        self._cancelled: set[str] = set()
        self._free_slots = list(reversed(range(limits.max_running_requests)))
        self._is_closed = False
        self.running: list[RunningSequence] = []
        self.freed_slots: list[int] = []
        self.pool = BlockPool(limits.num_blocks)
        self.block_tables_BC: Int32 = np.zeros(
            (limits.max_running_requests, blocks_for(max_context_tokens)), dtype=np.int32
        )
        self.num_hit_tokens = 0
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def enqueue(self, sequence: RunningSequence) -> None:
        """Put a sequence into the queue; raises QueueFull, or EngineStopped after `close`."""
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
            self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request at the next step, wherever it is; an unknown id is ignored."""
        with self._lock:
            self._cancelled.add(request_id)

    def close(self) -> None:
        """Refuse every request from now on."""
        with self._lock:
            self._is_closed = True

    def take_cancelled(self) -> list[RunningSequence]:
        """Take cancelled requests out of batch and queue; returns those that may hold output."""
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            if not cancelled:
                return []
            left = [one for one in (*self.running, *self._waiting) if one.request.request_id in cancelled]
            self._waiting = deque(one for one in self._waiting if one.request.request_id not in cancelled)
        for sequence in left:
            if sequence.slot != NO_SLOT:
                self.release(sequence)
        return left

    def drain(self) -> list[RunningSequence]:
        """Empty batch, queue and cache; returns who was in them."""
        with self._lock:
            left = [*self.running, *self._waiting]
            self._waiting.clear()
            self.freed_slots += [sequence.slot for sequence in self.running]
            self.running.clear()
            self._free_slots = list(reversed(range(self._limits.max_running_requests)))
            # After a step that broke, nothing in the old pool can be trusted.
            self.pool = BlockPool(self._limits.num_blocks)
            return left

    def release(self, sequence: RunningSequence) -> None:
        """Take a sequence out of the batch: its slot is free, and its blocks, though their prefixes can be found."""
        self.pool.release(sequence.blocks)
        sequence.blocks.clear()
        sequence.num_computed = sequence.num_published = 0
        with self._lock:
            self.running.remove(sequence)
            self._free_slots.append(sequence.slot)
        self.freed_slots.append(sequence.slot)
        sequence.slot = NO_SLOT

    def schedule(self, *, has_drafter: bool = True) -> list[RunningSequence]:
        """The sequences of the next step, oldest first, with `num_step_tokens`, `max_depth` and their blocks set.

        Decoding sequences always run and come off the budget of rows first, so prefill does not starve them; what is
        left goes to prefill, oldest first and never less than a block, so that it is not starved either.
        """
        self._admit()
        budget = self._limits.max_step_tokens - sum(one.is_decoding for one in self.running)
        budget = max(budget, BLOCK_TOKENS)
        awaited: set[PrefixKey] = set()
        for sequence in tuple(self.running):
            if sequence.slot == NO_SLOT:
                continue  # preempted by an older one in this very step
            if sequence.is_decoding:
                sequence.num_step_tokens = self._reserve(sequence, 1)
                continue
            missing = self._take_prefix(sequence)
            if missing in awaited:
                sequence.num_step_tokens = 0  # an older one computes this block now; it is found in the next step
                continue
            wanted = min(budget, len(sequence.token_ids) - sequence.num_computed)
            sequence.num_step_tokens = self._reserve(sequence, wanted)
            budget -= sequence.num_step_tokens
            if missing is not None and sequence.num_step_tokens:
                awaited.add(missing)
        working = [sequence for sequence in self.running if sequence.num_step_tokens]
        for sequence in working:
            sequence.max_depth = self._reserve_draft(sequence) if has_drafter and sequence.may_draft else 0
        return working

    def publish(self, sequence: RunningSequence) -> None:
        """Let others find the sequence's blocks that are full by now."""
        while self._limits.reuses_prefixes and (sequence.num_published + 1) * BLOCK_TOKENS <= sequence.num_computed:
            place = sequence.num_published
            block = self.pool.publish(sequence.blocks[place], self._key(sequence))
            self._place(sequence, place, block)
            sequence.num_published += 1

    def _admit(self) -> None:
        with self._lock:
            while self._waiting and self._free_slots and self._has_room_for(self._waiting[0]):
                sequence = self._waiting.popleft()
                sequence.slot = self._free_slots.pop()
                self.running.append(sequence)

    def _has_room_for(self, sequence: RunningSequence) -> bool:
        """Whether its tokens fit beside what the running sequences will soon need: else it would only be preempted."""
        if not self.running:
            return True
        promised = sum(max(blocks_for(len(one.token_ids) + BLOCK_TOKENS) - len(one.blocks), 0) for one in self.running)
        return blocks_for(len(sequence.token_ids)) + promised <= self.pool.num_free

    def _key(self, sequence: RunningSequence) -> PrefixKey:
        """The key of the first block that is not published yet."""
        place = sequence.num_published
        before = sequence.blocks[place - 1] if place else sequence.request.tenant
        return prefix_key(before, sequence.token_ids[place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS])

    def _take_prefix(self, sequence: RunningSequence) -> PrefixKey | None:
        """Take the blocks that hold the tokens to be computed next, as far as they can be found.

        Returns the key of the first that could not; None at the block of the last token, whose row must be computed
        for its logits, and inside a block.
        """
        last = (len(sequence.token_ids) - 1) // BLOCK_TOKENS
        while self._limits.reuses_prefixes and sequence.num_computed == sequence.num_published * BLOCK_TOKENS:
            if sequence.num_published == last:
                return None
            key = self._key(sequence)
            block = self.pool.find(key)
            if block is None:
                return key
            place = sequence.num_published
            if place < len(sequence.blocks):
                self.pool.release([sequence.blocks[place]])
            self._place(sequence, place, block)
            sequence.num_published += 1
            sequence.num_computed += BLOCK_TOKENS
            self.num_hit_tokens += BLOCK_TOKENS
        return None

    def _reserve(self, sequence: RunningSequence, num_tokens: int) -> int:
        """Blocks for this many more tokens, or for as many as there are; newer sequences make room for the first one.

        Returns for how many. 0 means that the sequence waits: it is the newest, and every block is held.
        """
        while num_tokens:
            room = self._grow(sequence, sequence.num_computed + num_tokens) - sequence.num_computed
            if room > 0:
                return min(num_tokens, room)
            if not self._make_room(sequence):
                break
        return 0

    def _reserve_draft(self, sequence: RunningSequence) -> int:
        """The depth that a draft may have: its accepted tokens need blocks too, but nobody is preempted for them."""
        # The last token of a request is always the target's own, so one less than what is left may be drafted.
        depth = min(self._limits.num_draft_tokens, sequence.num_left - 1)
        num_tokens = len(sequence.token_ids)
        return max(min(self._grow(sequence, num_tokens + depth) - num_tokens, depth), 0)

    def _grow(self, sequence: RunningSequence, num_tokens: int) -> int:
        """Add free blocks until they hold this many tokens or there are none; returns how many tokens they hold."""
        while len(sequence.blocks) * BLOCK_TOKENS < num_tokens:
            block = self.pool.allocate()
            if block is None:
                break
            self._place(sequence, len(sequence.blocks), block)
        return len(sequence.blocks) * BLOCK_TOKENS

    def _make_room(self, sequence: RunningSequence) -> bool:
        """Free a block: one meant for a draft, else by preempting the newest; False if that is this sequence.

        A preempted sequence waits at the front of the queue with its tokens, and computes them again.
        """
        if self._drop_surplus():
            return True
        newest = self.running[-1]
        if newest is sequence:
            assert len(self.running) > 1, f"{len(sequence.token_ids)} tokens do not fit {self.pool.num_blocks} blocks"
            return False
        self.release(newest)
        newest.num_step_tokens = 0
        with self._lock:
            self._waiting.appendleft(newest)
        self.num_preemptions += 1
        return True

    def _drop_surplus(self) -> bool:
        """Give back the blocks behind everybody's last token; whether there were any."""
        has_dropped = False
        for one in self.running:
            num_needed = blocks_for(len(one.token_ids))
            if len(one.blocks) > num_needed:
                self.pool.release(one.blocks[num_needed:])
                del one.blocks[num_needed:]
                has_dropped = True
        return has_dropped

    def _place(self, sequence: RunningSequence, place: int, block: int) -> None:
        sequence.blocks[place : place + 1] = [block]
        self.block_tables_BC[sequence.slot, place] = block
