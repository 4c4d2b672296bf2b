"""The draft model behind Recursive Speculative Decoding: committed text in blocks, nodes of trees in node slots.

One forward pass computes a whole level of every request's tree. Keys and values of nodes stay apart until their tokens
are committed; then they are copied to where the text lies, so that only the tokens the draft did not guess are
computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.drafting.drafter import DraftContext
from slipstream.drafting.tree import ROOT
from slipstream.engine.blocks import blocks_for
from slipstream.engine.decoders import open_decoder
from slipstream.engine.plan import BLOCK_TOKENS, NO_NODE, Int32, Move, StepPlan
from slipstream.models.checkpoint import Checkpoint


class GrowingTree:
    """A request's tree while it is drawn, level by level behind its text; `num_levels` is how deep it may get.

    The first `num_computed` nodes have their keys and values in the cache. `draft_probs` holds [*, V] rows, in order,
    of what the children of nodes were drawn from.
    """

    def __init__(self, context: DraftContext, num_levels: int) -> None:
        self.context = context
        self.num_levels = num_levels
        self.num_tokens = len(context.token_ids)
        self.token_ids: list[int] = []
        self.parents: list[int] = []
        self.num_computed = 0
        self.draft_probs: list[Tensor] = []

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child down to this one."""
        path = [node]
        while self.parents[path[-1]] != ROOT:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def followed(self, token_ids: Sequence[int]) -> list[int]:
        """The computed nodes that a sequence which began with this tree's text goes along."""
        children = {
            (parent, token): node
            for node, (parent, token) in enumerate(zip(self.parents, self.token_ids, strict=True))
            if node < self.num_computed
        }
        path: list[int] = []
        for token in token_ids[self.num_tokens :]:
            node = children.get((path[-1] if path else ROOT, token))
            if node is None:
                break
            path.append(node)
        return path


class DraftCache:
    """A draft model with a paged cache: `num_nodes` node slots and a fixed run of blocks for each slot."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        num_slots: int,
        num_nodes: int,
        max_level_nodes: int,
        max_context_tokens: int,
        max_catch_up_tokens: int,
        device: str,
    ) -> None:
        self.max_positions = min(max_context_tokens, checkpoint.config.max_position_embeddings)
        self._max_catch_up_tokens = max_catch_up_tokens
        self._num_nodes = num_nodes
        self._num_cached = [0] * num_slots
        self._trees: list[GrowingTree | None] = [None] * num_slots
        width = blocks_for(self.max_positions)
        self._block_tables_BC = np.arange(num_slots * width, dtype=np.int32).reshape(num_slots, width)
        self._decoder = open_decoder(
            checkpoint,
            num_blocks=num_slots * width,
            num_node_slots=num_slots * num_nodes,
            max_rows=max(max_catch_up_tokens, num_slots * max_level_nodes),
            device=device,
        )

    def release(self, slot: int) -> None:
        """Forget what the slot held."""
        self._num_cached[slot] = 0
        self._trees[slot] = None

    def catch_up(self, trees: Sequence[GrowingTree]) -> tuple[list[GrowingTree], Tensor]:
        """Compute the text that is not in the cache yet, `max_catch_up_tokens` at most.

        Returns the trees whose whole text is now, and the draft's logits [B, V] behind each; they may `extend`.
        """
        self._keep_followed(trees)
        rows = _Rows()
        level: list[GrowingTree] = []
        for tree in trees:
            slot = tree.context.slot
            # At least the last token: its logits are what comes next.
            start = min(self._num_cached[slot], tree.num_tokens - 1)
            end = min(tree.num_tokens, start + self._max_catch_up_tokens - len(rows.ids))
            for position in range(start, end):
                rows.add(tree.context.token_ids[position], position, slot, num_committed=position + 1)
            self._num_cached[slot] = end
            if end == tree.num_tokens:
                rows.wanted.append(len(rows.ids) - 1)
                level.append(tree)
                self._trees[slot] = tree
        return level, self._forward(rows) if rows.ids else torch.empty(0)

    def extend(self, trees: Sequence[GrowingTree]) -> Tensor:
        """Compute all nodes of these trees that are not computed yet, a level each; logits [X, V] behind them."""
        rows = _Rows()
        for tree in trees:
            slot = tree.context.slot
            for node in range(tree.num_computed, len(tree.token_ids)):
                path = [slot * self._num_nodes + each for each in tree.path(node)]
                rows.wanted.append(len(rows.ids))
                position = tree.num_tokens + len(path) - 1
                rows.add(tree.token_ids[node], position, slot, num_committed=tree.num_tokens, path=path)
            tree.num_computed = len(tree.token_ids)
            assert tree.num_computed <= self._num_nodes
        return self._forward(rows)

    def _keep_followed(self, trees: Sequence[GrowingTree]) -> None:
        """Move nodes that were committed since their tree was drawn to where the text lies."""
        moves: list[Move] = []
        for tree in trees:
            slot = tree.context.slot
            before, self._trees[slot] = self._trees[slot], None
            if before is None:
                continue
            for node in before.followed(tree.context.token_ids[:-1]):
                position = self._num_cached[slot]
                block = int(self._block_tables_BC[slot, position // BLOCK_TOKENS])
                moves.append(Move(slot * self._num_nodes + node, block, position % BLOCK_TOKENS))
                self._num_cached[slot] += 1
        self._decoder.keep(moves)

    def _forward(self, rows: _Rows) -> Tensor:
        return self._decoder.forward(rows.plan(self._block_tables_BC)).logits_XV


class _Rows:
    """Rows of a pass, one after another."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.wanted: list[int] = []
        self._positions: list[int] = []
        self._slots: list[int] = []
        self._committed: list[int] = []
        self._node_slots: list[int] = []
        self._starts = [0]
        self._ancestors: list[int] = []

    def add(self, token: int, position: int, slot: int, *, num_committed: int, path: Sequence[int] = ()) -> None:
        """A token of the text, or, with the node slots of its path, itself last, a node."""
        self.ids.append(token)
        self._positions.append(position)
        self._slots.append(slot)
        self._committed.append(num_committed)
        self._node_slots.append(path[-1] if path else NO_NODE)
        self._ancestors += path
        self._starts.append(len(self._ancestors))

    def plan(self, block_tables_BC: Int32) -> StepPlan:
        """The pass that computes them."""
        columns = (self.ids, self._positions, self._slots, self._committed, self._node_slots, self._starts)
        ids, positions, slots, committed, node_slots, starts = (np.array(column, np.int32) for column in columns)
        ancestors, wanted = np.array(self._ancestors, np.int32), np.array(self.wanted, np.int32)
        return StepPlan(ids, positions, slots, block_tables_BC, committed, node_slots, starts, ancestors, wanted)
