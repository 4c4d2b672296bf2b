"""Chain drafting: a small causal LM proposes the next few tokens, one after another, with the request's own noise."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from slipstream.drafting.tree import NO_DRAFT, DraftTree, chain_tree
from slipstream.engine.kv_cache import CachedDecoder, Span
from slipstream.engine.request import SamplingParams
from slipstream.engine.sampling import draft_tokens
from slipstream.models.checkpoint import Checkpoint
from slipstream.models.decoder import arrange


class DraftContext(msgspec.Struct, frozen=True):
    """A request that wants a draft: its slot, all its tokens so far, and how many to propose at most."""

    slot: int
    token_ids: Sequence[int]
    sampling: SamplingParams
    num_tokens: int


class ChainDrafter:
    """Proposes chains from one draft version; keeps a KV cache in step with what the target commits.

    A new drafter knows nothing of running requests: it catches up with their tokens, at most `max_catch_up_tokens`
    a call, and proposes nothing for a request until it has.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        version: int,
        num_slots: int,
        max_context_tokens: int,
        max_catch_up_tokens: int,
    ) -> None:
        self.version = version
        self.digest = checkpoint.digest
        self._model = CachedDecoder(
            arrange(checkpoint.config, checkpoint.weights),
            num_slots=num_slots,
            max_context_tokens=max_context_tokens,
            is_exact=False,
        )
        self._max_positions = min(max_context_tokens, checkpoint.config.max_position_embeddings)
        self._max_catch_up_tokens = max_catch_up_tokens
        self._num_cached = [0] * num_slots

    def release(self, slot: int) -> None:
        """Forget what the slot held."""
        self._num_cached[slot] = 0

    def warm(self) -> None:
        """Run once at the sizes of a step, so that the first real step pays no first-call cost."""
        self._model.logits(self._model.forward([Span(0, 0, (0,) * 8)])[0])

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        """One chain per context, in order; NO_DRAFT where none is possible yet."""
        ready, hidden = self._catch_up(contexts)
        chains: dict[int, list[int]] = {index: [] for index in ready}
        while ready:
            ids = self._candidates([contexts[index] for index in ready], [chains[index] for index in ready], hidden)
            for index, token in zip(ready, ids.tolist(), strict=True):
                chains[index].append(token)
            ready = [index for index in ready if len(chains[index]) < self._room(contexts[index])]
            if ready:
                hidden = self._extend([contexts[index] for index in ready], [chains[index] for index in ready])
        return [
            chain_tree(chains[index], drafter="chain", version=self.version) if chains.get(index) else NO_DRAFT
            for index in range(len(contexts))
        ]

    def committed(self, slot: int, *, num_tokens: int) -> None:
        """The sequence now has `num_tokens` tokens, all but the last equal to what was computed: drop the rest."""
        self._num_cached[slot] = min(self._num_cached[slot], num_tokens - 1)

    def _room(self, context: DraftContext) -> int:
        return min(context.num_tokens, self._max_positions - len(context.token_ids))

    def _catch_up(self, contexts: Sequence[DraftContext]) -> tuple[list[int], Tensor]:
        """Compute tokens not yet in the cache; returns the contexts that are level, and their last hidden rows."""
        budget = self._max_catch_up_tokens
        spans: list[Span] = []
        ready: list[int] = []
        last_rows: list[int] = []
        num_rows = 0
        for index, context in enumerate(contexts):
            start = self._num_cached[context.slot]
            take = min(len(context.token_ids) - start, budget)
            if take < 1 or self._room(context) < 1:
                continue
            budget -= take
            num_rows += take
            spans.append(Span(context.slot, start, tuple(context.token_ids[start : start + take])))
            self._num_cached[context.slot] = start + take
            if start + take == len(context.token_ids):
                ready.append(index)
                last_rows.append(num_rows - 1)
        if not ready:
            if spans:
                self._model.forward(spans)
            return [], torch.empty(0)
        return ready, self._model.forward(spans)[0][last_rows]

    def _extend(self, contexts: Sequence[DraftContext], chains: Sequence[list[int]]) -> Tensor:
        """Compute each chain's newest candidate; returns its hidden row."""
        spans = []
        for context, chain in zip(contexts, chains, strict=True):
            position = len(context.token_ids) + len(chain) - 1
            spans.append(Span(context.slot, position, (chain[-1],)))
            self._num_cached[context.slot] = position + 1
        return self._model.forward(spans)[0]

    def _candidates(self, contexts: Sequence[DraftContext], chains: Sequence[list[int]], hidden_BD: Tensor) -> Tensor:
        logits_BV = self._model.logits(hidden_BD)
        positions = [len(context.token_ids) + len(chain) for context, chain in zip(contexts, chains, strict=True)]
        return draft_tokens(logits_BV, [context.sampling for context in contexts], positions)
