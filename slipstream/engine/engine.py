"""The engine: one target, its drafter, and the step that serves every running request at once.

`step` reads top to bottom: swap if a draft is waiting, schedule, draft, one pass of the target, choose and verify, keep
the accepted nodes, commit, observe. Output is a function of prompt and seed only (`sampling`), so nothing that changes
between steps can change what users get.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from slipstream.drafting.chain import ChainDrafter
from slipstream.drafting.drafter import DraftContext, Drafter
from slipstream.drafting.merge import CATCH_UP_WINDOW, DraftingOptions
from slipstream.drafting.recycling_artifact import StoredMatrix
from slipstream.drafting.tree import NO_DRAFT, DraftTree
from slipstream.engine.admission import Admissible, check_request
from slipstream.engine.batch import OnBlock, RunningSequence
from slipstream.engine.counting import DraftingCounts, StepCounts
from slipstream.engine.decoders import OpenDecoder, open_decoder
from slipstream.engine.observer import ObservationSource, observations_of
from slipstream.engine.opening import open_chain, open_merged, open_target
from slipstream.engine.packing import pack
from slipstream.engine.passes import (
    Pass,
    accepted_moves,
    choose_and_verify,
    lesson_of,
    load_of,
    note_what_was_said,
    passes_of,
    token_logprobs,
)
from slipstream.engine.plan import StepOutput, StepPlan
from slipstream.engine.request import FinishReason, Request, TokenBlock, TokenLogprobs
from slipstream.engine.scheduler import EngineLimits, Scheduler
from slipstream.engine.stops import StopStrings, TokenBytes
from slipstream.errors import ArtifactRejected
from slipstream.models.checkpoint import Checkpoint, check_draft
from slipstream.records import Observation
from slipstream.telemetry import ReplicaMetrics
from slipstream.verification import rule_named
from slipstream.versions import DEFAULT_DOMAIN, NO_VERSION

NO_ROUTING_VERSION = 0

_STEPS_BETWEEN_REPORTS = 8
"""While requests run, metrics are told how steps went so often: telling them took a tenth of the time beside a pass."""

_REPORTS_OF_DRAFTING = 8
"""One in so many reports says what a drafter decided: reading that costs more than all other counts."""


class Engine:
    """Serves one target. `submit`, `cancel` and `install_draft` may be called from any thread, `step` from one.

    `observe` receives the observations of every finished request that may be learned from; it must not wait.
    `token_bytes` tells what stop strings are looked for in; without it requests that have some are refused. `drafting`
    says which drafters take part (needs the compiled kernels); without it chains of the installed draft are drafted,
    always `num_draft_tokens` long. `rule` names one of `verification.RULES`.
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
        drafting: DraftingOptions | None = None,
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
        self._rule = rule_named(rule)
        self._counts = StepCounts(metrics)
        self._drafting_counts = DraftingCounts(metrics.drafting)
        self._num_steps = 0
        self._scheduler = Scheduler(limits, max_context_tokens=self.max_context_tokens)
        self._target = open_target(target, limits, device=device, decoders=decoders)
        self._merged = open_merged(drafting, self._target, limits) if drafting else None
        self._drafter: Drafter | None = self._merged
        self._swap_lock = threading.Lock()
        self._incoming: list[tuple[Callable[[], None], threading.Event]] = []
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
    def drafter(self) -> Drafter | None:
        """What drafts now."""
        return self._drafter

    @property
    def draft_version(self) -> int:
        """The version drafting now for the default domain; 0 without a draft."""
        return self.draft_versions.get(DEFAULT_DOMAIN, NO_VERSION)

    @property
    def draft_digest(self) -> str:
        """Digest of the draft tensors in memory; empty without a draft."""
        return self.draft_digest_of(DEFAULT_DOMAIN)

    @property
    def draft_versions(self) -> dict[str, int]:
        """The version drafting now for each domain that has a draft of its own."""
        return {domain: draft.version for domain, draft in self._drafts().items()}

    def draft_digest_of(self, domain: str) -> str:
        """Digest of the tensors in memory of a domain's own draft; empty without one."""
        draft = self._drafts().get(domain)
        return draft.digest if draft else ""

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

    def install_draft(self, draft: Checkpoint | None, *, version: int, domain: str = DEFAULT_DOMAIN) -> threading.Event:
        """Draft with this version for the requests of a domain from the next step on; None: with none of its own.

        Requests of a domain without one get that of DEFAULT_DOMAIN. Checks, loads and warms the draft beside the
        running one before it returns; the event is set when the switch has happened. Raises ArtifactRejected if the
        draft does not fit the target or cannot run, or for another domain where only one draft is kept.
        """
        merged, chain = self._merged, None if draft is None else self._opened(draft, version=version)
        if merged is not None:
            return self._switch(lambda: merged.install_chain(domain, chain))
        if domain != DEFAULT_DOMAIN:
            raise ArtifactRejected(
                f"draft version {version} is for domain {domain!r}, and this engine keeps one draft for all",
                reason="format",
            )
        return self.install_drafter(chain)

    def install_matrix(self, matrix: StoredMatrix, *, version: int) -> threading.Event:
        """Begin anew with this Token Recycling matrix; raises ArtifactRejected where none is used."""
        merged = self._merged
        if merged is None:
            raise ArtifactRejected(f"matrix version {version}: this engine drafts with chains alone", reason="format")
        return self._switch(lambda: merged.install_matrix(matrix, version=version))

    def install_drafter(self, drafter: Drafter | None) -> threading.Event:
        """Draft with this from the next step on, None: not at all; the event is set when the switch has happened."""

        def switch() -> None:
            self._drafter, self._merged = drafter, None

        return self._switch(switch)

    def _opened(self, draft: Checkpoint, *, version: int) -> ChainDrafter:
        check_draft(draft, vocab_size=self.vocab_size)
        return open_chain(
            draft,
            version=version,
            limits=self.limits,
            max_context_tokens=self.max_context_tokens,
            device=self._device,
            window=CATCH_UP_WINDOW if self._merged is not None else None,
            packs_int8=self._merged is not None,
        )

    def _drafts(self) -> Mapping[str, Drafter]:
        """The drafts by domain; a copy, since the engine's thread may switch one meanwhile."""
        merged, drafter = self._merged, self._drafter
        if merged is not None:
            return dict(merged.chains)
        return {DEFAULT_DOMAIN: drafter} if drafter else {}

    def _switch(self, action: Callable[[], None]) -> threading.Event:
        switched = threading.Event()
        with self._swap_lock:
            self._incoming.append((action, switched))
        return switched

    def step(self) -> bool:
        """Serve every running request once; False if there was nothing to do."""
        started = time.perf_counter()
        self._swap_if_waiting()
        self._drop_cancelled()
        working = self._scheduler.schedule(has_drafter=self._waking_drafter() is not None)
        self._forget_freed_slots()
        pass_s, passes = 0.0, list[Pass]()
        if working:
            trees = self._draft(working)
            plan = pack(working, trees, self._scheduler.block_tables_BC)
            before = time.perf_counter()
            output = self._target.forward(plan)
            passes = passes_of(working, trees)
            choose_and_verify(passes, output, rule=self._rule)
            pass_s = time.perf_counter() - before
            self._target.keep(accepted_moves(passes))
            self._commit(working, passes)
            self._teach(passes, plan, output, pass_s)
            note_what_was_said(passes, plan, output, top_n=self._source.top_n)
            for one in passes:
                self._hand_out(one)
        step_s = time.perf_counter() - started
        if working and self._merged is not None:
            num_tokens = sum(len(one.kept_ids) for one in passes)
            self._merged.finished(step_s=step_s, pass_s=pass_s, num_tokens=num_tokens)
        self._measure(step_s, has_worked=bool(working))
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

    def _swap_if_waiting(self) -> None:
        if self._incoming:
            with self._swap_lock:
                incoming, self._incoming = self._incoming, []
            for action, switched in incoming:
                action()
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

    def _waking_drafter(self) -> Drafter | None:
        """The drafter, unless it rests."""
        return None if self._merged is not None and self._merged.rests else self._drafter

    def _draft(self, working: Sequence[RunningSequence]) -> Sequence[DraftTree]:
        """One tree per sequence; NO_DRAFT for those that read their prompt or must not speculate."""
        drafter = self._waking_drafter()
        if drafter is None:
            return [NO_DRAFT] * len(working)
        wanting = [one for one in working if one.max_depth]
        is_worth_it = self._merged is None or self._merged.wants(load_of(working), can_draft=bool(wanting))
        if not wanting or not is_worth_it:
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
                domain=one.request.domain,
                num_passes=len(one.rounds),
            )
            for one in wanting
        ]
        trees = iter(drafter.propose(contexts))
        return [next(trees) if sequence.max_depth else NO_DRAFT for sequence in working]

    def _commit(self, working: Sequence[RunningSequence], passes: Sequence[Pass]) -> None:
        """Append what was accepted to its sequence, and let others find the blocks that are full by now."""
        for sequence in working:
            if not sequence.is_choosing:
                sequence.num_computed += sequence.num_step_tokens
        for one in passes:
            one.kept_ids = one.sequence.commit(one.token_ids, one.tree)
        for sequence in working:
            self._scheduler.publish(sequence)

    def _teach(self, passes: Sequence[Pass], plan: StepPlan, output: StepOutput, pass_s: float) -> None:
        """Tell the drafter what came of the step, if it learns."""
        merged = self._merged
        if merged is None or not passes:
            return
        if merged.listens() or any(one.sequence.finish_reason for one in passes):
            merged.learn(lesson_of(passes, plan, output, pass_s))

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
        if has_worked:
            self._num_steps += 1
            self.metrics.step_s.observe(step_s)
            if self._scheduler.running and self._num_steps % _STEPS_BETWEEN_REPORTS:
                return
        self._report()

    def _report(self) -> None:
        """Give the metrics what came since the last report."""
        scheduler, metrics = self._scheduler, self.metrics
        metrics.running.set(len(scheduler.running))
        metrics.waiting.set(scheduler.num_waiting)
        metrics.kv_blocks_free.set(scheduler.pool.num_free)
        self._counts.hand_over()
        if self._merged is not None and self._num_steps % (_STEPS_BETWEEN_REPORTS * _REPORTS_OF_DRAFTING) == 0:
            self._drafting_counts.hand_over(self._merged)
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
