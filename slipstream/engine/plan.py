"""The plan of one forward pass: which rows are computed, where their keys and values lie, and what comes out.

A row is a token at an absolute position. Its keys and values go into its sequence's blocks, or, for a node of a draft
tree, into a node slot, where they stay apart until the node is accepted (`PagedDecoder.keep`). A row attends to the
positions [0, num_committed) of its blocks, then to its ancestors in order of depth, itself last: exactly one key per
position 0..position, which is what lets attention sum in an order fixed by absolute position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.models.config import ModelConfig

BLOCK_TOKENS = 16
"""Positions per block of the cache."""

NO_NODE = -1
"""The node slot of a row whose keys and values go into its sequence's blocks."""

Int32 = NDArray[np.int32]


class StepPlan(msgspec.Struct, frozen=True):
    """T packed rows of B sequences; all arrays int32, C-contiguous.

    `sequences_T` is each row's line of `block_tables_BC`, whose entry c is the block that holds positions
    [c * BLOCK_TOKENS, (c + 1) * BLOCK_TOKENS). A row outside trees has `node_slots_T` NO_NODE and `num_committed_T`
    position + 1. Row t's ancestors are the node slots `ancestors[ancestor_starts[t] : ancestor_starts[t + 1]]` (T + 1
    starts), none outside trees. `logit_rows_X` names the rows whose logits are wanted, each once, in the order in which
    they come out.
    """

    ids_T: Int32
    positions_T: Int32
    sequences_T: Int32
    block_tables_BC: Int32
    num_committed_T: Int32
    node_slots_T: Int32
    ancestor_starts: Int32
    ancestors: Int32
    logit_rows_X: Int32


ExpertIds = NDArray[np.integer] | Tensor
"""Experts [T, L, K] that T rows chose in L layers, best first, where their decoder computes: on the host an array.

A decoder may spare rows whose logits are not wanted the last layer, and says -1 for its experts then.
"""


def on_host(expert_ids_TLK: ExpertIds) -> NDArray[np.integer]:
    """The same as an array; waits for another device."""
    return expert_ids_TLK.cpu().numpy() if isinstance(expert_ids_TLK, Tensor) else expert_ids_TLK


class StepOutput(msgspec.Struct, frozen=True):
    """Valid until the next pass: `logits_XV` fp32, and what experts rows chose, None for a dense model."""

    logits_XV: Tensor
    expert_ids_TLK: ExpertIds | None


class Move(msgspec.Struct, frozen=True):
    """An accepted node: its keys and values go from a node slot to a position of a block."""

    node_slot: int
    block: int
    offset: int


class PagedDecoder(Protocol):
    """A decoder with its cache in blocks; `is_exact`: every output row is a bitwise function of its own sequence."""

    config: ModelConfig
    is_exact: bool

    def forward(self, plan: StepPlan) -> StepOutput:
        """Compute the plan's rows; writes their keys and values."""

    def keep(self, moves: Sequence[Move]) -> None:
        """Copy accepted nodes into their blocks."""
