"""A step plan as tiles of padded sizes: what the torch decoder copies to its device, in one piece.

Rows of one sequence share their keys, so attention takes them in tiles of up to TILE_ROWS rows of one sequence. Every
size is padded up to a bucket: steps of many plans then have few distinct shapes, which is what a captured CUDA graph
needs. Padding rows compute nothing that a real row sees: their keys and values go to the scrap place, and what they
attend to is position 0 of block 0.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.plan import BLOCK_TOKENS, NO_NODE, Int32, StepPlan

TILE_ROWS = 32
"""Rows of a tile at most: enough to share a sequence's keys, few enough not to drown a decoding row in padding."""

CONTEXT_BLOCKS = 16
"""Blocks by which a padded context grows: 256 positions."""

LARGE = 64
"""Sizes above are padded to a multiple of it, sizes below to a power of two."""

LEAST_NODES = 16
"""Node columns of a step with trees: small trees have one shape, and a mask's rows stay aligned for the device."""


class StepShape(NamedTuple):
    """Padded sizes of one pass; a NamedTuple, as it is the key of the captured graphs.

    `num_rows` T packed rows in `num_tiles` G tiles of `tile_rows` W rows, each with `num_blocks` C blocks of context
    and `num_nodes` N node slots of its sequence; X logits.
    """

    num_rows: int
    num_tiles: int
    tile_rows: int
    num_blocks: int
    num_nodes: int
    num_logits: int


class TiledStep(NamedTuple):
    """The arrays of one pass, all of them int32 views of one buffer, on the host or on the device.

    `tile_rows_GW` are packed rows and `tile_places_T` the way back (into G * W). Row (g, w) sees the positions
    [0, num_committed_GW) of its tile's blocks and the nodes of its tile that `sees_node_GWN` (uint8) marks.
    """

    ids_T: Tensor
    positions_T: Tensor
    write_places_T: Tensor
    tile_places_T: Tensor
    logit_rows_X: Tensor
    tile_rows_GW: Tensor
    num_committed_GW: Tensor
    blocks_GC: Tensor
    node_places_GN: Tensor
    sees_node_GWN: Tensor


def views(buffer: Tensor, shape: StepShape) -> TiledStep:
    """The arrays of a step that lie in this int32 buffer of `num_ints(shape)`, one behind the other."""
    sizes = _sizes(shape)
    lengths = [prod(each) for each in sizes]
    *arrays, marks = buffer.split([*lengths, len(buffer) - sum(lengths)])
    sees_node = marks.view(torch.uint8)[: shape.num_tiles * shape.tile_rows * shape.num_nodes]
    shaped = [array.view(each) if len(each) > 1 else array for array, each in zip(arrays, sizes, strict=True)]
    return TiledStep._make([*shaped, sees_node.view(shape.num_tiles, shape.tile_rows, shape.num_nodes)])


def num_ints(shape: StepShape) -> int:
    """Length of a step's int32 buffer: its int32 arrays, then the bytes of `sees_node_GWN`, rounded up."""
    num_bytes = shape.num_tiles * shape.tile_rows * shape.num_nodes
    return sum(map(prod, _sizes(shape))) - (-num_bytes // 4)


def _sizes(shape: StepShape) -> tuple[tuple[int, ...], ...]:
    """Sizes of a `TiledStep`'s int32 arrays, in its order."""
    rows, tiles = (shape.num_rows,), (shape.num_tiles, shape.tile_rows)
    blocks, nodes = (shape.num_tiles, shape.num_blocks), (shape.num_tiles, shape.num_nodes)
    return rows, rows, rows, rows, (shape.num_logits,), tiles, tiles, blocks, nodes


class SequenceNodes(NamedTuple):
    """The nodes that rows of each sequence see.

    Sequence b's distinct node slots are `slots[starts[b] : starts[b + 1]]`. Entry i of `rows` and `columns` says that
    this packed row sees this node, counted among its sequence's.
    """

    slots: Int32
    starts: Int32
    rows: Int32
    columns: Int32


class Layout(NamedTuple):
    """Where a plan's rows go: tile and lane of each row, the sequence of each tile, and its nodes."""

    shape: StepShape
    tiles_T: Int32
    lanes_T: Int32
    sequences_G: Int32
    nodes: SequenceNodes


def lay_out(plan: StepPlan, *, is_padded: bool) -> Layout:
    """Group the plan's rows into tiles and its nodes by sequence; sizes are padded to buckets, or exact."""
    num_sequences = len(plan.block_tables_BC)
    rows_of_B = np.bincount(plan.sequences_T, minlength=num_sequences)
    most_rows = min(int(rows_of_B.max()), TILE_ROWS)
    tile_rows = bucket(most_rows) if is_padded else most_rows
    tiles_of_B = -(-rows_of_B // tile_rows)
    ranks = _ranks_within(plan.sequences_T, rows_of_B)
    tiles_T = (np.cumsum(tiles_of_B) - tiles_of_B)[plan.sequences_T] + ranks // tile_rows
    nodes = _nodes_of_sequences(plan, num_sequences)
    exact = StepShape(
        num_rows=len(plan.ids_T),
        num_tiles=int(tiles_of_B.sum()),
        tile_rows=tile_rows,
        num_blocks=-(-int(plan.num_committed_T.max()) // BLOCK_TOKENS),
        num_nodes=int(np.diff(nodes.starts).max()),
        num_logits=len(plan.logit_rows_X),
    )
    shape = padded(exact) if is_padded else exact
    sequences_G = np.repeat(np.arange(num_sequences, dtype=np.int32), tiles_of_B)
    return Layout(shape, tiles_T.astype(np.int32), (ranks % tile_rows).astype(np.int32), sequences_G, nodes)


def fill(buffer: Tensor, plan: StepPlan, layout: Layout, *, first_node_place: int, scrap_place: int) -> None:
    """Write a plan into a host buffer of `num_ints(layout.shape)` int32; places are rows of the cache."""
    buffer.zero_()
    shape, step = layout.shape, views(buffer, layout.shape)
    num_rows, lanes = len(plan.ids_T), (layout.tiles_T, layout.lanes_T)
    step.ids_T.numpy()[:num_rows] = plan.ids_T
    step.positions_T.numpy()[:num_rows] = plan.positions_T
    write_places_T = step.write_places_T.numpy()
    write_places_T[:num_rows], write_places_T[num_rows:] = _write_places(plan, first_node_place), scrap_place
    step.tile_places_T.numpy()[:num_rows] = layout.tiles_T * shape.tile_rows + layout.lanes_T
    step.logit_rows_X.numpy()[: len(plan.logit_rows_X)] = plan.logit_rows_X
    step.tile_rows_GW.numpy()[lanes] = np.arange(num_rows)
    # Lanes without a row see position 0, so that no softmax is over nothing.
    step.num_committed_GW.fill_(1).numpy()[lanes] = plan.num_committed_T
    width = min(plan.block_tables_BC.shape[1], shape.num_blocks)
    tables_GC = plan.block_tables_BC[layout.sequences_G, :width]
    # Entries of a table behind the sequence's blocks may hold anything; they are masked, but must be places.
    most = first_node_place // BLOCK_TOKENS - 1
    step.blocks_GC.numpy()[: len(tables_GC), :width] = tables_GC.clip(0, most)
    if shape.num_nodes:
        _fill_nodes(step, layout, first_node_place)


def padded(exact: StepShape) -> StepShape:
    """The bucket that this shape falls into."""
    return StepShape(
        num_rows=bucket(exact.num_rows),
        num_tiles=bucket(exact.num_tiles),
        tile_rows=exact.tile_rows,
        num_blocks=max(-(-exact.num_blocks // CONTEXT_BLOCKS), 1) * CONTEXT_BLOCKS,
        num_nodes=bucket(max(exact.num_nodes, LEAST_NODES)) if exact.num_nodes else 0,
        num_logits=bucket(exact.num_logits),
    )


def bucket(size: int) -> int:
    """The padded size: 1, 2, 4, ... 64, 128, 192, ..."""
    return 1 << max(size - 1, 0).bit_length() if size <= LARGE else -(-size // LARGE) * LARGE


def _ranks_within(sequences_T: Int32, rows_of_B: NDArray[np.intp]) -> NDArray[np.intp]:
    """How many earlier rows of the plan belong to each row's sequence."""
    order = np.argsort(sequences_T, kind="stable")
    ranks = np.empty(len(order), dtype=np.intp)
    ranks[order] = np.arange(len(order)) - np.repeat(np.cumsum(rows_of_B) - rows_of_B, rows_of_B)
    return ranks


def _write_places(plan: StepPlan, first_node_place: int) -> Int32:
    is_node = plan.node_slots_T != NO_NODE
    # A node may stand past its sequence's last block; its column of the table is not read.
    columns = np.where(is_node, 0, plan.positions_T // BLOCK_TOKENS)
    in_blocks = plan.block_tables_BC[plan.sequences_T, columns] * BLOCK_TOKENS + plan.positions_T % BLOCK_TOKENS
    return np.where(is_node, first_node_place + plan.node_slots_T, in_blocks).astype(np.int32)


def _nodes_of_sequences(plan: StepPlan, num_sequences: int) -> SequenceNodes:
    """Each row sees its ancestors; a node is the last of its own."""
    if not len(plan.ancestors):
        none = np.zeros(0, np.int32)
        return SequenceNodes(none, np.zeros(num_sequences + 1, np.int32), none, none)
    rows = np.repeat(np.arange(len(plan.ids_T)), np.diff(plan.ancestor_starts))
    slots = plan.ancestors.astype(np.int64)
    sequences = plan.sequences_T[rows].astype(np.int64)
    keys, inverse = np.unique((sequences << 32) + slots, return_inverse=True)
    starts = np.searchsorted(keys >> 32, np.arange(num_sequences + 1))
    columns = inverse - starts[sequences]
    return SequenceNodes(
        (keys & 0xFFFFFFFF).astype(np.int32), starts.astype(np.int32), rows.astype(np.int32), columns.astype(np.int32)
    )


def _fill_nodes(step: TiledStep, layout: Layout, first_node_place: int) -> None:
    slots, starts, rows, columns = layout.nodes
    step.sees_node_GWN.numpy()[layout.tiles_T[rows], layout.lanes_T[rows], columns] = 1
    node_places_GN = step.node_places_GN.numpy()
    for tile, sequence in enumerate(layout.sequences_G):
        of_sequence = slots[starts[sequence] : starts[sequence + 1]]
        node_places_GN[tile, : len(of_sequence)] = of_sequence + first_node_place
