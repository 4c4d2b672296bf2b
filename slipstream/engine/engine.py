"""The engine: one target, its drafter, and the step that serves every running request at once.

`step` reads top to bottom: swap if a draft is waiting, schedule, draft, one pass of the target, choose and verify, keep
the accepted nodes, commit, observe. Output is a function of prompt and seed only (`sampling`), so nothing that changes
between steps can change what users get.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from slipstream.drafting.chain import ChainDrafter
from slipstream.drafting.drafter import DraftContext, Drafter
from slipstream.drafting.tree import NO_DRAFT, DraftTree
from slipstream.engine.admission import Admissible, check_request
from slipstream.engine.batch import OnBlock, RunningSequence
from slipstream.engine.counting import StepCounts
from slipstream.engine.decoders import open_decoder
from slipstream.engine.observer import ObservationSource, observations_of
from slipstream.engine.packing import pack
from slipstream.engine.passes import (
    Pass,
    accepted_moves,
    choose_and_verify,
    note_what_was_said,
    passes_of,
    token_logprobs,
)
from slipstream.engine.plan import BLOCK_TOKENS, PagedDecoder
from slipstream.engine.request import FinishReason, Request, TokenBlock, TokenLogprobs
from slipstream.engine.scheduler import EngineLimits, Scheduler
from slipstream.engine.stops import StopStrings, TokenBytes
from slipstream.errors import ArtifactRejected
from slipstream.models.checkpoint import Checkpoint, check_draft
from slipstream.records import Observation
from slipstream.telemetry import ReplicaMetrics
from slipstream.verification import rule_named
from slipstream.versions import NO_VERSION

NO_ROUTING_VERSION = 0


class OpenDecoder(Protocol):
    """`decoders.open_decoder`, or what stands in for it."""

    def __call__(
        self, checkpoint: Checkpoint, *, num_blocks: int, num_node_slots: int, max_rows: int, device: str = "cpu"
    ) -> PagedDecoder:
        """A decoder of this checkpoint with a cache of these sizes."""


class Engine:
    """Serves one target. `submit`, `cancel` and `install_draft` may be called from any thread, `step` from one.

    `observe` receives the observations of every finished request that may be learned from; it must not wait.
    `token_bytes` tells what stop strings are looked for in; without it requests that have some are refused. `rule` names
    one of `verification.RULES`.
    """

    def __init__(
        self,
        target: Checkpoint,
        *,
        limits: EngineLimits,
        target_digest: str,
        replica_id: str,
        top_n: int,
        observe: Callable[[Observation], None],
        metrics: ReplicaMetrics,
        token_bytes: TokenBytes | None = None,
        device: str = "cpu",
        decoders: OpenDecoder = open_decoder,
        rule: str = "equality",
    ) -> None:
        self.limits = limits
        self.metrics = metrics
        self.vocab_size = target.config.vocab_size
        self.max_context_tokens = min(limits.max_context_tokens, target.config.max_position_embeddings)
        self._admissible = Admissible(
            vocab_size=self.vocab_size,
            max_context_tokens=self.max_context_tokens,
            num_blocks=limits.num_blocks,
            knows_token_bytes=token_bytes is not None,
        )
        self._source = ObservationSource(
            target_digest=target_digest,
            replica_id=replica_id,
            top_n=min(top_n, self.vocab_size),
            num_experts=target.config.num_experts,
        )
        self._observe = observe
        self._token_bytes = token_bytes
        self._device = device
        self._decoders = decoders
        self._rule = rule_named(rule)
        self._counts = StepCounts(metrics)
        self._scheduler = Scheduler(limits, max_context_tokens=self.max_context_tokens)
        rows_of_request = 1 + limits.num_draft_tokens
        self._target = decoders(
            target,
            num_blocks=limits.num_blocks,
            num_node_slots=limits.max_running_requests * limits.num_draft_tokens,
            # A prefilling sequence may get a block's worth of rows when decoding takes the whole budget.
            max_rows=max(limits.max_step_tokens, limits.max_running_requests * rows_of_request) + BLOCK_TOKENS,
            device=device,
        )
        self._drafter: Drafter | None = None
        self._swap_lock = threading.Lock()
        self._incoming: tuple[Drafter | None, threading.Event] | None = None
        metrics.kv_blocks.set(limits.num_blocks)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._scheduler.num_waiting

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the cache that no request holds."""
        return self._scheduler.pool.num_free

    @property
    def draft_version(self) -> int:
        """The version drafting now; 0 without a draft."""
        drafter = self._drafter  # read once: the engine's thread may switch it meanwhile
        return drafter.version if drafter else NO_VERSION

    @property
    def draft_digest(self) -> str:
        """Digest of the draft tensors in memory; empty without a draft."""
        drafter = self._drafter
        return drafter.digest if drafter else ""

    def submit(self, request: Request, on_block: OnBlock) -> None:
        """Queue a request; `on_block` is called from `step` with every block of its tokens.

        Raises RequestError if it can never be served here, QueueFull if too many wait.
        """
        check_request(request, self._admissible)
        stops = request.sampling.stop_strings
        watch = StopStrings(stops, self._token_bytes) if stops and self._token_bytes else None
        self._scheduler.enqueue(RunningSequence(request, on_block, watch))

    def cancel(self, request_id: str) -> None:
        """Drop a request at the next step; its `on_block` is not called again. What it got is still observed."""
        self._scheduler.cancel(request_id)

    def install_draft(self, draft: Checkpoint | None, *, version: int) -> threading.Event:
        """Draft chains with this version from the next step on; None switches speculation off.

        Checks, loads and warms the draft beside the running one before it returns. Raises ArtifactRejected if the draft
        does not fit the target or cannot run. See `install_drafter`.
        """
        return self.install_drafter(None if draft is None else self._warmed(draft, version=version))

    def install_drafter(self, drafter: Drafter | None) -> threading.Event:
        """Draft with this from the next step on, None: not at all.

        The event is set when the switch has happened; never, if a later call came first.
        """
        with self._swap_lock:
            switched = threading.Event()
            self._incoming = (drafter, switched)
        return switched

    def step(self) -> bool:
        """Serve every running request once; False if there was nothing to do."""
        started = time.perf_counter()
        self._swap_if_waiting()
        self._drop_cancelled()
        working = self._scheduler.schedule(has_drafter=self._drafter is not None)
        self._forget_freed_slots()
        if working:
            trees = self._draft(working)
            plan = pack(working, trees, self._scheduler.block_tables_BC)
            output = self._target.forward(plan)
            passes = passes_of(working, trees)
            choose_and_verify(passes, output, rule=self._rule)
            self._target.keep(accepted_moves(passes))
            self._commit(working, passes)
            note_what_was_said(passes, plan, output, top_n=self._source.top_n)
            for one in passes:
                self._hand_out(one)
        self._measure(time.perf_counter() - started, has_worked=bool(working))
        return bool(working)

    def fail_all(self, error: str) -> None:
        """End every request with an error, after a step that broke."""
        for sequence in self._scheduler.drain():
            sequence.on_block(_error_block(sequence.request.request_id, error))
        self._forget_freed_slots()

    def close(self, error: str) -> None:
        """Take no more requests, and end those that run or wait with an error."""
        self._scheduler.close()
        self.fail_all(error)

    def _warmed(self, draft: Checkpoint, *, version: int) -> ChainDrafter:
        check_draft(draft, vocab_size=self.vocab_size)
        try:
            drafter = ChainDrafter(
                draft,
                version=version,
                num_slots=self.limits.max_running_requests,
                max_context_tokens=self.max_context_tokens,
                max_catch_up_tokens=self.limits.max_step_tokens,
                device=self._device,
            )
            drafter.warm()
        except (RuntimeError, MemoryError, IndexError, ValueError) as error:
            raise ArtifactRejected(f"draft version {version} cannot run: {error}", reason="format") from error
        return drafter

    def _swap_if_waiting(self) -> None:
        with self._swap_lock:
            incoming, self._incoming = self._incoming, None
        if incoming is not None:
            self._drafter, switched = incoming
            switched.set()

    def _drop_cancelled(self) -> None:
        for sequence in self._scheduler.take_cancelled():
            self._observe_all(sequence, "cancelled")

    def _forget_freed_slots(self) -> None:
        freed = self._scheduler.freed_slots
        if self._drafter is not None:
            for slot in freed:
                self._drafter.release(slot)
        freed.clear()

    def _draft(self, working: Sequence[RunningSequence]) -> Sequence[DraftTree]:
        """One tree per sequence; NO_DRAFT for those that read their prompt or must not speculate."""
        wanting = [sequence for sequence in working if sequence.max_depth]
        if self._drafter is None or not wanting:
            return [NO_DRAFT] * len(working)
        max_nodes = self.limits.num_draft_tokens
        contexts = [
            DraftContext(
                one.slot,
                one.token_ids,
                one.request.sampling,
                max_nodes,
                one.max_depth,
                tenant=one.request.tenant,
                num_passes=len(one.rounds),
            )
            for one in wanting
        ]
        trees = iter(self._drafter.propose(contexts))
        return [next(trees) if sequence.max_depth else NO_DRAFT for sequence in working]

    def _commit(self, working: Sequence[RunningSequence], passes: Sequence[Pass]) -> None:
        """Append what was accepted to its sequence, and let others find the blocks that are full by now."""
        for sequence in working:
            if not sequence.is_choosing:
                sequence.num_computed += sequence.num_step_tokens
        for one in passes:
            one.kept_ids = one.sequence.commit(one.token_ids, one.tree)
            if self._drafter is not None:
                self._drafter.committed(one.sequence.slot, num_tokens=len(one.sequence.token_ids))
        for sequence in working:
            self._scheduler.publish(sequence)

    def _hand_out(self, one: Pass) -> None:
        """Count a pass, keep what it tells the observer, and give its tokens to the caller; end the request if so."""
        sequence, request, said = one.sequence, one.sequence.request, one.said
        num_proposed, num_accepted = len(one.tree.token_ids), sequence.rounds[-1].num_accepted
        self._counts.add(
            request.domain, num_tokens=len(one.kept_ids), num_proposed=num_proposed, num_accepted=num_accepted
        )
        if not one.is_sound:
            self.metrics.unsound_drafts.inc()
        if len(sequence.rounds) == 1:
            self._counts.add_prompt(sequence.num_prompt)
        if said is not None and request.may_train:
            sequence.observed.append(said)
        if sequence.finish_reason is not None:
            self._scheduler.release(sequence)
            self._observe_all(sequence, sequence.finish_reason)
        logprobs: tuple[TokenLogprobs, ...] = ()
        if said is not None and request.num_logprobs is not None:
            logprobs = token_logprobs(*said, num_top=request.num_logprobs)
        sequence.on_block(
            TokenBlock(
                request_id=request.request_id,
                token_ids=one.kept_ids,
                draft_version=one.tree.version,
                routing_version=NO_ROUTING_VERSION,
                num_proposed=num_proposed,
                num_accepted=num_accepted,
                logprobs=logprobs,
                finish_reason=sequence.finish_reason,
            )
        )

    def _observe_all(self, sequence: RunningSequence, finish_reason: FinishReason) -> None:
        for observation in observations_of(sequence, self._source, finish_reason=finish_reason):
            self._observe(observation)

    def _measure(self, step_s: float, *, has_worked: bool) -> None:
        scheduler, metrics = self._scheduler, self.metrics
        metrics.running.set(len(scheduler.running))
        metrics.waiting.set(scheduler.num_waiting)
        metrics.kv_blocks_free.set(scheduler.pool.num_free)
        if not has_worked:
            return
        self._counts.hand_over()
        metrics.step_s.observe(step_s)
        if scheduler.num_hit_tokens:
            metrics.prefix_hit_tokens.inc(scheduler.num_hit_tokens)
        if scheduler.num_preemptions:
            metrics.preemptions.inc(scheduler.num_preemptions)
        scheduler.num_hit_tokens = scheduler.num_preemptions = 0


def _error_block(request_id: str, error: str) -> TokenBlock:
    return TokenBlock(
        request_id=request_id,
        token_ids=(),
        draft_version=NO_VERSION,
        routing_version=NO_ROUTING_VERSION,
        num_proposed=0,
        num_accepted=0,
        finish_reason="error",
        error=error,
    )
