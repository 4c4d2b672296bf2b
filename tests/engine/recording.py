"""A decoder that remembers what it computed: the logits behind every prefix of tokens, whoever asked.

It also keeps, beside the cache of the decoder inside, the token that each place of it should hold. So a row's prefix is
read through the plan itself: blocks, node slots, moves and ancestors have to lead to the right tokens in the right
order, or nothing of what it records makes sense.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from slipstream.engine.decoders import OpenDecoder, open_decoder
from slipstream.engine.plan import BLOCK_TOKENS, NO_NODE, Int32, Move, PagedDecoder, StepOutput, StepPlan
from slipstream.models.checkpoint import Checkpoint

Logits = dict[tuple[int, ...], Tensor]


class RecordingDecoder:
    """Adds to `logits`, prefix -> row [V]; what was there before under the same prefix must be bitwise equal."""

    def __init__(self, inside: PagedDecoder, *, num_blocks: int, num_node_slots: int, logits: Logits) -> None:
        self.config = inside.config
        self.is_exact = inside.is_exact
        self._inside = inside
        self._logits = logits
        self._block_tokens = np.full(num_blocks * BLOCK_TOKENS, -1, dtype=np.int32)
        self._node_tokens = np.full(num_node_slots, -1, dtype=np.int32)

    def forward(self, plan: StepPlan) -> StepOutput:
        places = [self._place(plan, row) for row in range(len(plan.ids_T))]
        assert len(set(places)) == len(places), "two rows of one pass write to the same place"
        for (is_node, place), token in zip(places, plan.ids_T, strict=True):
            (self._node_tokens if is_node else self._block_tokens)[place] = token
        output = self._inside.forward(plan)
        for index, row in enumerate(plan.logit_rows_X):
            prefix = self._prefix(plan, int(row))
            logits_V = output.logits_XV[index].clone()
            known_V = self._logits.setdefault(prefix, logits_V)
            assert known_V.equal(logits_V), f"two rows behind the same {len(prefix)} tokens differ"
        return output

    def keep(self, moves: Sequence[Move]) -> None:
        for move in moves:
            self._block_tokens[move.block * BLOCK_TOKENS + move.offset] = self._node_tokens[move.node_slot]
        self._inside.keep(moves)

    def _place(self, plan: StepPlan, row: int) -> tuple[bool, int]:
        if plan.node_slots_T[row] != NO_NODE:
            return True, int(plan.node_slots_T[row])
        position = int(plan.positions_T[row])
        assert plan.num_committed_T[row] == position + 1
        return False, int(self._block_places(plan, row, position + 1)[-1])

    def _block_places(self, plan: StepPlan, row: int, num_positions: int) -> Int32:
        positions = np.arange(num_positions, dtype=np.int32)
        blocks = plan.block_tables_BC[plan.sequences_T[row]][positions // BLOCK_TOKENS]
        places: Int32 = blocks * np.int32(BLOCK_TOKENS) + positions % BLOCK_TOKENS
        return places

    def _prefix(self, plan: StepPlan, row: int) -> tuple[int, ...]:
        committed = self._block_tokens[self._block_places(plan, row, int(plan.num_committed_T[row]))]
        ancestors = plan.ancestors[plan.ancestor_starts[row] : plan.ancestor_starts[row + 1]]
        prefix = (*committed.tolist(), *self._node_tokens[ancestors].tolist())
        assert len(prefix) == plan.positions_T[row] + 1, "a row must see exactly one key per position up to its own"
        assert min(prefix) >= 0, "a row sees a place that nobody wrote"
        return prefix


def recording(logits: Logits, opening: OpenDecoder = open_decoder) -> OpenDecoder:
    """Decoders that record into `logits`; only for a target, since a draft is opened on its own."""

    def opened(
        checkpoint: Checkpoint, *, num_blocks: int, num_node_slots: int, max_rows: int, device: str = "cpu"
    ) -> PagedDecoder:
        inside = opening(
            checkpoint, num_blocks=num_blocks, num_node_slots=num_node_slots, max_rows=max_rows, device=device
        )
        return RecordingDecoder(inside, num_blocks=num_blocks, num_node_slots=num_node_slots, logits=logits)

    return opened
