"""Engines that serve the same requests by turns, a few steps at a time, over one copy of the target's weights.

The memory of a rented machine is now half, now twice as fast, and changes within seconds. So the engine that has got
least far with a group of requests takes the next turn: at every moment all of them have met the same machine, and
ratios of their times mean something. Of those that are equally far chance decides: whoever comes second finds in a
large cache the experts that the same tokens woke right before. Each has a part of one decoder's cache of its own; what
finding it takes is left out of all times.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from benchmarks.drafting_prompts import MAX_TOKENS, Prompt
from benchmarks.reference.corpus import CONTEXT_TOKENS, END
from slipstream.drafting.merge import ALL_SOURCES, DraftingOptions, Source
from slipstream.drafting.step_cost import distinct_experts
from slipstream.engine.decoders import OpenDecoder, open_decoder
from slipstream.engine.engine import Engine
from slipstream.engine.plan import BLOCK_TOKENS, NO_NODE, Move, PagedDecoder, StepOutput, StepPlan
from slipstream.engine.request import Request, SamplingParams, TokenBlock
from slipstream.engine.scheduler import EngineLimits
from slipstream.models.checkpoint import Checkpoint
from slipstream.telemetry import ReplicaMetrics

MAX_BATCH = 16
STEPS_OF_TURN = 4
"""Steps in a row: a step of an engine alone finds in the processor's caches what the one before it left there."""

MAX_NODES = 16
"""Of a request's tree, however it is chosen."""

PLAIN = "plain"
UNTRAINED = "budgeted, nothing trained"
ADAPTED = "budgeted, adapted draft"


class System(msgspec.Struct, frozen=True, kw_only=True):
    """One way to draft. `drafting` None: not at all; `has_draft`: with the adapted draft."""

    name: str
    drafting: DraftingOptions | None = None
    has_draft: bool = False


def is_fixed(system: System) -> bool:
    """Whether it always drafts the same number of nodes."""
    return system.drafting is not None and system.drafting.fixed_nodes > 0


def fixed(kind: str, num_nodes: int) -> System:
    """The setting "KIND NODES": one kind of drafter, or "merged" for all, with always that many nodes."""
    alone: dict[str, tuple[Source, ...]] = {"lookup": ("lookup",), "recycling": ("recycling",), "chain": ("chain",)}
    drafting = DraftingOptions(sources=alone.get(kind, ALL_SOURCES), fixed_nodes=num_nodes)
    return System(name=f"{kind} {num_nodes}", drafting=drafting, has_draft=kind in ("chain", "merged"))


BUDGETED = (
    System(name=UNTRAINED, drafting=DraftingOptions()),
    System(name=ADAPTED, drafting=DraftingOptions(), has_draft=True),
)


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, the seed it is always served with, and how long the answer to it is."""

    prompt: Prompt
    seed: int
    answer_tokens: int


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What a system did with one group after every request had its first token.

    `seconds` is the time of its steps, and `pass_times_s` what the target's pass took in each. A call is a request's
    share of a step. `experts` is the mean number of distinct experts of a layer in a step, 0 for a dense target.
    """

    seconds: float
    pass_times_s: tuple[float, ...]
    num_steps: int
    num_calls: int
    num_tokens: int
    num_proposed: int
    num_accepted: int
    experts: float
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def pass_s(self) -> float:
        """The time of all passes."""
        return sum(self.pass_times_s)


class SharedDecoder:
    """One decoder of a target, its cache divided into equal parts."""

    def __init__(self, target: Checkpoint, *, num_parts: int) -> None:
        self._blocks_of_part = MAX_BATCH * CONTEXT_TOKENS // BLOCK_TOKENS
        self._nodes_of_part = MAX_BATCH * MAX_NODES
        self._max_rows = MAX_BATCH * CONTEXT_TOKENS + self._nodes_of_part + BLOCK_TOKENS
        self._decoder = open_decoder(
            target,
            num_blocks=num_parts * self._blocks_of_part,
            num_node_slots=num_parts * self._nodes_of_part,
            max_rows=self._max_rows,
        )
        self.parts: list[DecoderPart] = []

    def next_part(self) -> OpenDecoder:
        """What an engine opens the next part with."""

        def open_part(
            checkpoint: Checkpoint, *, num_blocks: int, num_node_slots: int, max_rows: int, device: str = "cpu"
        ) -> PagedDecoder:
            assert (num_blocks, device) == (self._blocks_of_part, "cpu")
            assert num_node_slots <= self._nodes_of_part
            assert max_rows <= self._max_rows
            place = len(self.parts)
            first = (place * self._blocks_of_part, place * self._nodes_of_part)
            self.parts.append(DecoderPart(self._decoder, first_block=first[0], first_node_slot=first[1]))
            return self.parts[-1]

        return open_part


class DecoderPart:
    """A `PagedDecoder` with a part of another one's cache, and clocks on its passes and on what being a part takes."""

    def __init__(self, decoder: PagedDecoder, *, first_block: int, first_node_slot: int) -> None:
        self.config = decoder.config
        self.is_exact = decoder.is_exact
        self.pass_times_s: list[float] = []
        self.moving_s = 0.0
        self._decoder = decoder
        self._first_block = first_block
        self._first_node_slot = first_node_slot
        self._last: StepOutput | None = None

    def forward(self, plan: StepPlan) -> StepOutput:
        """See `PagedDecoder.forward`."""
        began = time.perf_counter()
        is_node_T = plan.node_slots_T != NO_NODE
        moved = msgspec.structs.replace(
            plan,
            block_tables_BC=plan.block_tables_BC + np.int32(self._first_block),
            node_slots_T=plan.node_slots_T + is_node_T * np.int32(self._first_node_slot),
            ancestors=plan.ancestors + np.int32(self._first_node_slot),
        )
        started = time.perf_counter()
        self._last = self._decoder.forward(moved)
        self.pass_times_s.append(time.perf_counter() - started)
        self.moving_s += started - began
        return self._last

    def keep(self, moves: Sequence[Move]) -> None:
        """See `PagedDecoder.keep`."""
        began = time.perf_counter()
        moved = [
            Move(one.node_slot + self._first_node_slot, one.block + self._first_block, one.offset) for one in moves
        ]
        self.moving_s += time.perf_counter() - began
        self._decoder.keep(moved)

    def experts_of_last_pass(self) -> float:
        """Distinct experts of a layer, their mean over layers; 0 for a dense target. Valid until the next pass."""
        return 0.0 if self._last is None else distinct_experts(self._last.expert_ids_TLK) or 0.0


class Runner:
    """A system's engine, and what it has done with the group at hand."""

    def __init__(self, system: System, target: Checkpoint, shared: SharedDecoder, draft: Checkpoint | None) -> None:
        self.system = system
        self.engine = Engine(
            target,
            limits=EngineLimits(
                max_running_requests=MAX_BATCH,
                max_queued_requests=MAX_BATCH,
                # All prompts of a group in one step: then all requests decode from the second on.
                max_step_tokens=MAX_BATCH * CONTEXT_TOKENS,
                max_context_tokens=CONTEXT_TOKENS,
                num_draft_tokens=MAX_NODES if system.drafting else 0,
                num_blocks=MAX_BATCH * CONTEXT_TOKENS // BLOCK_TOKENS,
                reuses_prefixes=False,
            ),
            target_digest=target.digest,
            replica_id="benchmark",
            top_n=16,
            observe=lambda observation: None,
            metrics=ReplicaMetrics(),
            decoders=shared.next_part(),
            drafting=system.drafting,
        )
        self._part = shared.parts[-1]
        if system.has_draft and draft is not None:
            self.engine.install_draft(draft, version=1)
        self.num_tokens = 0
        self.is_done = True

    def begin(self, queries: Sequence[Query], temperature: float) -> None:
        """Take a group of requests and serve it until each has its first token."""
        self.is_done = False
        self._blocks: list[list[TokenBlock]] = [[] for _ in queries]
        for blocks, query in zip(self._blocks, queries, strict=True):
            self.engine.submit(_request(query, temperature), blocks.append)
        while not all(self._blocks):
            self.engine.step()
        self._num_first = [len(blocks) for blocks in self._blocks]
        self._seconds, self._num_steps, self._experts = 0.0, 0, 0.0
        self._part.pass_times_s.clear()
        self._part.moving_s = 0.0
        self._count()

    def take_turn(self) -> None:
        """A few steps, timed; the last one ends the group."""
        for _ in range(STEPS_OF_TURN):
            if not self.is_done:
                self.step()

    def step(self) -> None:
        """One step, timed."""
        started = time.perf_counter()
        self.engine.step()
        self._seconds += time.perf_counter() - started
        self._num_steps += 1
        self._experts += self._part.experts_of_last_pass()
        self._count()

    def served(self) -> Served:
        """What came of the group."""
        calls = [one for blocks, first in zip(self._blocks, self._num_first, strict=True) for one in blocks[first:]]
        return Served(
            seconds=self._seconds - self._part.moving_s,
            pass_times_s=tuple(self._part.pass_times_s),
            num_steps=self._num_steps,
            num_calls=len(calls),
            num_tokens=sum(len(one.token_ids) for one in calls),
            num_proposed=sum(one.num_proposed for one in calls),
            num_accepted=sum(one.num_accepted for one in calls),
            experts=self._experts / max(1, self._num_steps),
            token_ids=tuple(tuple(token for one in blocks for token in one.token_ids) for blocks in self._blocks),
        )

    def _count(self) -> None:
        self.num_tokens = sum(len(one.token_ids) for blocks in self._blocks for one in blocks)
        self.is_done = all(blocks[-1].finish_reason for blocks in self._blocks)


def serve_by_turns(runners: Sequence[Runner], queries: Sequence[Query], temperature: float) -> list[Served]:
    """Serve one group with every runner; whoever has the fewest tokens so far takes the next turn."""
    gc.collect()
    gc.disable()  # a collection in one system's step would be nobody's cost
    for runner in runners:
        runner.begin(queries, temperature)
    working = [runner for runner in runners if not runner.is_done]
    chance = random.Random(queries[0].seed)
    while working:
        min(working, key=lambda runner: (runner.num_tokens, chance.random())).take_turn()
        working = [runner for runner in working if not runner.is_done]
    gc.enable()
    return [runner.served() for runner in runners]


def _request(query: Query, temperature: float) -> Request:
    return Request(
        request_id=query.prompt.id,
        prompt_ids=query.prompt.token_ids,
        sampling=SamplingParams(seed=query.seed, max_tokens=MAX_TOKENS, temperature=temperature, stop_token_ids=(END,)),
        tenant="",
        domain=query.prompt.domain,
        may_train=True,
        arrived_at=0.0,
    )
