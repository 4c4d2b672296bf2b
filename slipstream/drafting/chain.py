"""Chain drafting: a small causal LM proposes the next few tokens, one after another, with the request's own noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.drafting.drafter import DraftContext
from slipstream.drafting.tree import NO_DRAFT, DraftTree, chain_tree
from slipstream.engine.blocks import blocks_for
from slipstream.engine.decoders import open_decoder
from slipstream.engine.plan import NO_NODE, Int32, StepPlan
from slipstream.engine.sampling import draft_tokens
from slipstream.models.checkpoint import Checkpoint


class ChainDrafter:
    """Proposes chains from one draft version; keeps a K/V cache in step with what the target commits.

    Each slot owns a fixed run of blocks. Candidates are computed in place, as what they are if they are accepted: a
    wrong one is overwritten by the token that stands there instead. A new drafter knows nothing of running requests:
    it catches up with their tokens, at most `max_catch_up_tokens` a call, and proposes nothing for a request until it
    has.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        version: int,
        num_slots: int,
        max_context_tokens: int,
        max_catch_up_tokens: int,
        device: str = "cpu",
    ) -> None:
        self.version = version
        self.digest = checkpoint.digest
        self._max_positions = min(max_context_tokens, checkpoint.config.max_position_embeddings)
        self._max_catch_up_tokens = max_catch_up_tokens
        self._num_cached = [0] * num_slots
        blocks_per_slot = blocks_for(self._max_positions)
        num_blocks = num_slots * blocks_per_slot
        self._block_tables_BC = np.arange(num_blocks, dtype=np.int32).reshape(num_slots, blocks_per_slot)
        self._decoder = open_decoder(
            checkpoint,
            num_blocks=num_blocks,
            num_node_slots=0,
            max_rows=max(max_catch_up_tokens, num_slots),
            device=device,
        )

    def release(self, slot: int) -> None:
        """Forget what the slot held."""
        self._num_cached[slot] = 0

    def warm(self) -> None:
        """Run once, so that the first real step pays no first-call cost."""
        self._forward([0], [0], [0], wanted=[0])

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        """One chain per context, in order; NO_DRAFT where none is possible yet."""
        chains: list[list[int]] = [[] for _ in contexts]
        depths = [min(one.max_depth, one.max_nodes, self._max_positions - len(one.token_ids)) for one in contexts]
        growing, logits_BV = self._catch_up(contexts, depths)
        while growing:
            positions = [len(contexts[index].token_ids) + len(chains[index]) for index in growing]
            draws = [contexts[index].sampling for index in growing]
            for index, token in zip(growing, draft_tokens(logits_BV, draws, positions).tolist(), strict=True):
                chains[index].append(token)
            growing = [index for index in growing if len(chains[index]) < depths[index]]
            if growing:
                logits_BV = self._extend([contexts[index] for index in growing], [chains[index] for index in growing])
        return [chain_tree(one, drafter="chain", version=self.version) if one else NO_DRAFT for one in chains]

    def committed(self, slot: int, *, num_tokens: int) -> None:
        """The sequence now has `num_tokens` tokens, all but the last equal to what was computed: drop the rest."""
        self._num_cached[slot] = min(self._num_cached[slot], num_tokens - 1)

    def _catch_up(self, contexts: Sequence[DraftContext], depths: Sequence[int]) -> tuple[list[int], Tensor]:
        """Compute tokens not yet in the cache; returns the contexts that are level, and the logits of their next."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        level: list[int] = []
        wanted: list[int] = []
        for index, (context, depth) in enumerate(zip(contexts, depths, strict=True)):
            start = self._num_cached[context.slot]
            end = min(len(context.token_ids), start + self._max_catch_up_tokens - len(ids))
            if depth < 1 or end <= start:
                continue
            ids += context.token_ids[start:end]
            positions += range(start, end)
            slots += [context.slot] * (end - start)
            self._num_cached[context.slot] = end
            if end == len(context.token_ids):
                level.append(index)
                wanted.append(len(ids) - 1)
        if not ids:
            return [], torch.empty(0)
        return level, self._forward(ids, positions, slots, wanted=wanted)

    def _extend(self, contexts: Sequence[DraftContext], chains: Sequence[list[int]]) -> Tensor:
        """Compute each chain's newest candidate; returns the logits of the next."""
        positions = [len(context.token_ids) + len(chain) - 1 for context, chain in zip(contexts, chains, strict=True)]
        slots = [context.slot for context in contexts]
        for slot, position in zip(slots, positions, strict=True):
            self._num_cached[slot] = position + 1
        return self._forward([chain[-1] for chain in chains], positions, slots, wanted=range(len(chains)))

    def _forward(
        self, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int], *, wanted: Sequence[int]
    ) -> Tensor:
        position_T = np.array(positions, dtype=np.int32)
        plan = StepPlan(
            np.array(ids, dtype=np.int32),
            position_T,
            np.array(slots, dtype=np.int32),
            self._block_tables_BC,
            position_T + np.int32(1),
            np.full(len(ids), NO_NODE, dtype=np.int32),
            np.zeros(len(ids) + 1, dtype=np.int32),
            _NO_ANCESTORS,
            np.array(wanted, dtype=np.int32),
        )
        return self._decoder.forward(plan).logits_XV


_NO_ANCESTORS: Int32 = np.zeros(0, dtype=np.int32)
