"""From the sequences and draft trees of a step to the plan of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slipstream.drafting.tree import ROOT, DraftTree
from slipstream.engine.batch import RunningSequence
from slipstream.engine.plan import BLOCK_TOKENS, NO_NODE, Int32, Move, StepPlan


def pack(sequences: Sequence[RunningSequence], trees: Sequence[DraftTree], block_tables_BC: Int32) -> StepPlan:
    """The plan that computes each sequence's next `num_step_tokens` tokens, then its tree's nodes.

    Logits are wanted of every sequence that is choosing: of its last token's row and of its nodes, in order. The nodes
    of a step take the node slots from 0 on in that order. `block_tables_BC` has a line per slot and is not copied.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    committed: list[int] = []
    node_slots: list[int] = []
    starts: list[int] = []
    ancestors: list[int] = []
    wanted: list[int] = []
    num_nodes = 0
    for sequence, tree in zip(sequences, trees, strict=True):
        first, take = sequence.num_computed, sequence.num_step_tokens
        is_choosing = first + take == len(sequence.token_ids)
        ids += sequence.token_ids[first : first + take]
        positions += range(first, first + take)
        committed += range(first + 1, first + take + 1)
        node_slots += [NO_NODE] * take
        starts += [len(ancestors)] * take
        if is_choosing:
            wanted.append(len(ids) - 1)
        if tree.token_ids:
            wanted += range(len(ids), len(ids) + len(tree.token_ids))
            ids += tree.token_ids
            for path in _paths(tree, num_nodes):
                positions.append(len(sequence.token_ids) + len(path) - 1)
                committed.append(len(sequence.token_ids))
                node_slots.append(path[-1])
                starts.append(len(ancestors))
                ancestors += path
            num_nodes += len(tree.token_ids)
        slots += [sequence.slot] * (take + len(tree.token_ids))
    starts.append(len(ancestors))
    columns = (ids, positions, slots, committed, node_slots, starts, ancestors, wanted)
    id_T, position_T, slot_T, committed_T, node_T, start_T, ancestor, wanted_X = (_int32(column) for column in columns)
    return StepPlan(id_T, position_T, slot_T, block_tables_BC, committed_T, node_T, start_T, ancestor, wanted_X)


def _paths(tree: DraftTree, first_node_slot: int) -> list[list[int]]:
    """The node slots from depth 1 down to each node, itself last."""
    paths: list[list[int]] = []
    for node, parent in enumerate(tree.parents):
        above = paths[parent] if parent != ROOT else []
        paths.append([*above, first_node_slot + node])
    return paths


def _int32(values: list[int]) -> Int32:
    return np.array(values, dtype=np.int32)


def moves_of(sequence: RunningSequence, path: Sequence[int], *, first_node_slot: int) -> list[Move]:
    """Where the accepted nodes go: to the positions behind the sequence's last token, before the block is committed."""
    first = len(sequence.token_ids)
    return [
        Move(first_node_slot + node, sequence.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS)
        for position, node in enumerate(path, start=first)
    ]
