"""Step plans written out by hand, and random trees: what tests of decoders run."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from slipstream.engine.plan import BLOCK_TOKENS, NO_NODE, StepPlan


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one sequence: `token_ids[start:]` go into `blocks`, then come the nodes of a tree over them.

    Node i has token `nodes[i]`, the parent `parents[i]` (an earlier node, or -1 for the last token), and the node slot
    `first_node_slot + i`.
    """

    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    start: int = 0
    nodes: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    first_node_slot: int = 0


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """A node's ancestors from depth 1 on, itself last."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def plan_of(sequences: Sequence[Rows]) -> StepPlan:
    """The plan that computes these rows, with the logits of all of them."""
    rows: list[tuple[int, int, int, int, int]] = []
    ancestors: list[list[int]] = []
    for index, sequence in enumerate(sequences):
        committed = len(sequence.token_ids)
        for position in range(sequence.start, committed):
            rows.append((sequence.token_ids[position], position, index, position + 1, NO_NODE))
            ancestors.append([])
        for node, token_id in enumerate(sequence.nodes):
            path = path_to(sequence.parents, node)
            position = committed + len(path) - 1
            rows.append((token_id, position, index, committed, sequence.first_node_slot + node))
            ancestors.append([sequence.first_node_slot + each for each in path])
    columns = np.array(rows, dtype=np.int32).T.copy()
    tables = np.zeros((len(sequences), max(len(sequence.blocks) for sequence in sequences)), dtype=np.int32)
    for index, sequence in enumerate(sequences):
        tables[index, : len(sequence.blocks)] = sequence.blocks
    starts = np.cumsum([0, *map(len, ancestors)]).astype(np.int32)
    flat = np.array([slot for path in ancestors for slot in path], dtype=np.int32)
    every_row = np.arange(len(rows), dtype=np.int32)
    ids, positions, lines, num_committed, node_slots = columns
    return StepPlan(ids, positions, lines, tables, num_committed, node_slots, starts, flat, every_row)


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold this many positions."""
    return -(-num_tokens // BLOCK_TOKENS)


def random_tree(rng: np.random.Generator, *, num_nodes: int, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Tokens and parents of a random tree; siblings may share a token."""
    parents = tuple(int(rng.integers(-1, node)) for node in range(num_nodes))
    return tuple(int(token) for token in rng.integers(0, vocab_size, num_nodes)), parents
