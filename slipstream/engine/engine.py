"""The engine: one target, its draft, and the step that serves every running request at once.

`step` reads top to bottom: swap if a draft is waiting, admit, draft, one target pass, verify, commit, observe. Output
is a function of prompt and seed only (`sampling`), so nothing that changes between steps can change what users get.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slipstream.drafting.chain import ChainDrafter, DraftContext
from slipstream.drafting.tree import NO_DRAFT, DraftTree
from slipstream.engine.batch import OnBlock, RunningSequence
from slipstream.engine.kv_cache import CachedDecoder, Span
from slipstream.engine.observer import ObservationSource, observations_of, observe_block
from slipstream.engine.request import FinishReason, Request, TokenBlock
from slipstream.engine.sampling import target_tokens
from slipstream.engine.scheduler import EngineLimits, Scheduler
from slipstream.errors import ArtifactRejected, RequestError
from slipstream.models.checkpoint import Checkpoint, check_draft
from slipstream.models.decoder import arrange
from slipstream.records import Observation
from slipstream.telemetry import MAX_POSITIONS, ReplicaMetrics
from slipstream.verification import verify
from slipstream.versions import NO_VERSION

NO_ROUTING_VERSION = 0
_SEED_LIMIT = 2**63


class Engine:
    """Serves one target. `submit`, `cancel` and `install_draft` may be called from any thread, `step` from one.

    `observe` receives the observations of every finished request that may be learned from; it must not wait.
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
    ) -> None:
        self.limits = limits
        self.vocab_size = target.config.vocab_size
        self.max_context_tokens = min(limits.max_context_tokens, target.config.max_position_embeddings)
        self._source = ObservationSource(
            target_digest=target_digest,
            replica_id=replica_id,
            top_n=min(top_n, self.vocab_size),
            num_experts=target.config.num_experts,
        )
        self._observe = observe
        self.metrics = metrics
        self._scheduler = Scheduler(limits)
        self._target = CachedDecoder(
            arrange(target.config, target.weights),
            num_slots=limits.max_running_requests,
            max_context_tokens=self.max_context_tokens,
            is_exact=True,
        )
        self._drafter: ChainDrafter | None = None
        self._swap_lock = threading.Lock()
        self._incoming: tuple[ChainDrafter | None, threading.Event] | None = None

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._scheduler.num_waiting

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
        self._check(request)
        self._scheduler.enqueue(request, on_block)

    def cancel(self, request_id: str) -> None:
        """Drop a request at the next step; its `on_block` is not called again. What it got is still observed."""
        self._scheduler.cancel(request_id)

    def install_draft(self, draft: Checkpoint | None, *, version: int) -> threading.Event:
        """Draft with this version from the next step on; None switches speculation off.

        Checks, loads and warms the draft beside the running one before it returns. The event is set when the switch
        has happened; never, if a later call came first. Raises ArtifactRejected if the draft does not fit the target or
        cannot run.
        """
        drafter = None if draft is None else self._warmed(draft, version=version)
        with self._swap_lock:
            switched = threading.Event()
            self._incoming = (drafter, switched)
        return switched

    def _warmed(self, draft: Checkpoint, *, version: int) -> ChainDrafter:
        check_draft(draft, vocab_size=self.vocab_size)
        try:
            drafter = ChainDrafter(
                draft,
                version=version,
                num_slots=self.limits.max_running_requests,
                max_context_tokens=self.max_context_tokens,
                max_catch_up_tokens=self.limits.max_step_tokens,
            )
            drafter.warm()
        except (RuntimeError, MemoryError, IndexError) as error:
            raise ArtifactRejected(f"draft version {version} cannot run: {error}", reason="format") from error
        return drafter

    def step(self) -> bool:
        """Serve every running request once; False if there was nothing to do."""
        started = time.perf_counter()
        self._swap_if_waiting()
        for sequence in self._scheduler.admit():
            self._forget(sequence)
            self._observe_all(sequence, "cancelled")
        running = list(self._scheduler.running)
        self.metrics.running.set(len(running))
        self.metrics.waiting.set(self._scheduler.num_waiting)
        if not running:
            return False
        trees = self._draft(running)
        spans = self._spans(running, trees)
        hidden_TD, experts_TLK = self._target.forward([span for span in spans if span])
        self._commit(running, trees, spans, hidden_TD, experts_TLK)
        self.metrics.step_s.observe(time.perf_counter() - started)
        return True

    def fail_all(self, error: str) -> None:
        """End every request with an error, after a step that broke."""
        for sequence in list(self._scheduler.running):
            self._scheduler.release(sequence)
            self._forget(sequence)
            self._emit(sequence, (), NO_DRAFT, 0, "error", error)
        for request, on_block in self._scheduler.drain():
            on_block(_last_block(request.request_id, "error", error))

    def close(self, error: str) -> None:
        """Take no more requests, and end those that run or wait with an error."""
        self._scheduler.close()
        self.fail_all(error)

    def _swap_if_waiting(self) -> None:
        with self._swap_lock:
            incoming, self._incoming = self._incoming, None
        if incoming is not None:
            self._drafter, switched = incoming
            switched.set()

    def _draft(self, running: Sequence[RunningSequence]) -> list[DraftTree]:
        """One tree per sequence; NO_DRAFT for those that read their prompt or must not speculate."""
        if self._drafter is None or not self.limits.num_draft_tokens:
            return [NO_DRAFT] * len(running)
        contexts = [
            DraftContext(sequence.slot, sequence.token_ids, sequence.request.sampling, self._num_draft_tokens(sequence))
            for sequence in running
        ]
        return self._drafter.propose(contexts)

    def _num_draft_tokens(self, sequence: RunningSequence) -> int:
        # The last token of a request is always the target's own, so one less than what is left may be drafted.
        if not (sequence.request.speculate and sequence.is_decoding):
            return 0
        return min(self.limits.num_draft_tokens, sequence.num_left - 1)

    def _spans(self, running: Sequence[RunningSequence], trees: Sequence[DraftTree]) -> list[Span | None]:
        """What the target computes for each sequence: its next prompt tokens, or its last token and the draft."""
        budgets = self._scheduler.prefill_budgets()
        spans: list[Span | None] = []
        for sequence, tree in zip(running, trees, strict=True):
            start = sequence.num_computed
            take = budgets.get(sequence.slot, 1)
            ids = (*sequence.token_ids[start : start + take], *tree.token_ids)
            spans.append(Span(sequence.slot, start, ids) if ids else None)
        return spans

    def _commit(
        self,
        running: Sequence[RunningSequence],
        trees: Sequence[DraftTree],
        spans: Sequence[Span | None],
        hidden_TD: Tensor,
        experts_TLK: Tensor | None,
    ) -> None:
        """Verify the sequences whose last token was computed, and hand out what the target accepted."""
        rows: list[range] = []
        first = 0
        for sequence, tree, span in zip(running, trees, spans, strict=True):
            length = len(span.token_ids) if span else 0
            is_whole = sequence.num_computed + length - len(tree.token_ids) == len(sequence.token_ids)
            rows.append(range(first + length - len(tree.token_ids) - 1, first + length) if is_whole else range(0))
            if not is_whole:
                sequence.num_computed += length
            first += length
        logits_XV = self._target.logits(hidden_TD[[row for some in rows for row in some]])
        done = 0
        for sequence, tree, some in zip(running, trees, rows, strict=True):
            if some:
                experts = None if experts_TLK is None else experts_TLK[some.start : some.stop]
                self._commit_one(sequence, tree, logits_XV[done : done + len(some)], experts)
            done += len(some)

    def _commit_one(
        self, sequence: RunningSequence, tree: DraftTree, logits_XV: Tensor, experts_XLK: Tensor | None
    ) -> None:
        first_position = len(sequence.token_ids)
        positions = torch.arange(first_position, first_position + len(logits_XV))
        chosen = target_tokens(logits_XV, sequence.request.sampling, positions)
        kept = sequence.commit(verify(tree, chosen.tolist()).token_ids, tree)
        if sequence.request.may_train:
            observe_block(sequence, kept, logits_XV, experts_XLK, top_n=self._source.top_n)
        if self._drafter is not None:
            self._drafter.committed(sequence.slot, num_tokens=len(sequence.token_ids))
        self._count(sequence, tree, len(kept))
        num_accepted = sequence.rounds[-1].num_accepted
        if not sequence.is_finished:
            self._emit(sequence, kept, tree, num_accepted)
            return
        self._scheduler.release(sequence)
        self._forget(sequence)
        self._observe_all(sequence, sequence.finish_reason)
        self._emit(sequence, kept, tree, num_accepted, sequence.finish_reason)

    def _observe_all(self, sequence: RunningSequence, finish_reason: FinishReason) -> None:
        for observation in observations_of(sequence, self._source, finish_reason=finish_reason):
            self._observe(observation)

    def _forget(self, sequence: RunningSequence) -> None:
        if self._drafter is not None:
            self._drafter.release(sequence.slot)

    def _emit(
        self,
        sequence: RunningSequence,
        token_ids: tuple[int, ...],
        tree: DraftTree,
        num_accepted: int,
        finish_reason: FinishReason | None = None,
        error: str = "",
    ) -> None:
        sequence.on_block(
            TokenBlock(
                request_id=sequence.request.request_id,
                token_ids=token_ids,
                draft_version=tree.version,
                routing_version=NO_ROUTING_VERSION,
                num_proposed=len(tree.token_ids),
                num_accepted=num_accepted,
                finish_reason=finish_reason,
                error=error,
            )
        )

    def _count(self, sequence: RunningSequence, tree: DraftTree, num_tokens: int) -> None:
        metrics, domain = self.metrics, self.metrics.domain_label(sequence.request.domain)
        metrics.generation_tokens.labels(domain).inc(num_tokens)
        if len(sequence.rounds) == 1:
            metrics.prompt_tokens.inc(len(sequence.request.prompt_ids))
        metrics.verification_passes.labels(domain).inc()
        if tree.token_ids:
            num_accepted = sequence.rounds[-1].num_accepted
            metrics.drafts.labels(domain).inc()
            metrics.proposed_tokens.labels(domain).inc(len(tree.token_ids))
            metrics.accepted_tokens.labels(domain).inc(num_accepted)
            for position in range(min(num_accepted, MAX_POSITIONS)):
                metrics.accepted_per_position.labels(str(position)).inc()

    def _check(self, request: Request) -> None:
        sampling, num_prompt = request.sampling, len(request.prompt_ids)
        if not num_prompt:
            raise RequestError("prompt is empty; expected at least one token", param="prompt")
        if sampling.max_tokens < 1:
            raise RequestError(f"max_tokens is {sampling.max_tokens}; expected at least 1", param="max_tokens")
        if num_prompt + sampling.max_tokens > self.max_context_tokens:
            raise RequestError(
                f"prompt has {num_prompt} tokens and max_tokens is {sampling.max_tokens}, together "
                f"{num_prompt + sampling.max_tokens}; the context is {self.max_context_tokens} tokens: shorten one",
                param="max_tokens",
            )
        if not 0 <= sampling.seed < _SEED_LIMIT:
            raise RequestError(f"seed is {sampling.seed}; expected 0 <= seed < 2**63", param="seed")
        unknown = next((token for token in request.prompt_ids if not 0 <= token < self.vocab_size), None)
        if unknown is not None:
            raise RequestError(
                f"prompt has token id {unknown}; the vocabulary is 0..{self.vocab_size - 1}", param="prompt"
            )


def _last_block(request_id: str, finish_reason: FinishReason, error: str) -> TokenBlock:
    return TokenBlock(
        request_id=request_id,
        token_ids=(),
        draft_version=NO_VERSION,
        routing_version=NO_ROUTING_VERSION,
        num_proposed=0,
        num_accepted=0,
        finish_reason=finish_reason,
        error=error,
    )
