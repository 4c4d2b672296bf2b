"""A step plan as tiles of padded sizes: what the torch decoder copies to its device, in one piece.

Rows of one sequence share their keys, so attention takes them in tiles of up to TILE_ROWS rows of one sequence. Every
size is padded up to a bucket: steps of many plans then have few distinct shapes, which is what a captured CUDA graph
needs. Padding rows compute nothing that a real row sees: their keys and values go to the scrap place, and what they
attend to is position 0 of block 0.
"""

from __future__ import annotations

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

    @property
    def fields(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the int32 arrays of a `TiledStep`, in the order in which they lie in its buffer."""
        rows, tiles = (self.num_rows,), (self.num_tiles, self.tile_rows)
        return (
            ("ids_T", rows),
            ("positions_T", rows),
            ("write_places_T", rows),
            ("tile_places_T", rows),
            ("logit_rows_X", (self.num_logits,)),
            ("tile_rows_GW", tiles),
            ("num_committed_GW", tiles),
            ("blocks_GC", (self.num_tiles, self.num_blocks)),
            ("node_places_GN", (self.num_tiles, self.num_nodes)),
        )

    @property
    def num_ints(self) -> int:
        """Length of a step's int32 buffer: the arrays, then one byte for each (tile, row, node), rounded up."""
        num_bytes = self.num_tiles * self.tile_rows * self.num_nodes
        return sum(_size(shape) for _, shape in self.fields) - (-num_bytes // 4)


class TiledStep(NamedTuple):
    """The arrays of one pass, all of them views of one int32 buffer on the device.

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
    """The arrays of a step that lie in this int32 buffer of `shape.num_ints`."""
    arrays, start = [], 0
    for _, sizes in shape.fields:
        arrays.append(buffer[start : start + _size(sizes)].view(sizes))
        start += _size(sizes)
    sees_node = buffer[start:].view(torch.uint8)
    sizes = (shape.num_tiles, shape.tile_rows, shape.num_nodes)
    return TiledStep(*arrays, sees_node[: _size(sizes)].view(sizes))


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


def fill(buffer: Int32, plan: StepPlan, layout: Layout, *, first_node_place: int, scrap_place: int) -> None:
    """Write a plan into a step's buffer of `layout.shape.num_ints`; places are rows of the cache."""
    shape = layout.shape
    buffer.fill(0)
    arrays: dict[str, NDArray[np.int32]] = {}
    start = 0
    for name, sizes in shape.fields:
        arrays[name] = buffer[start : start + _size(sizes)].reshape(sizes)
        start += _size(sizes)
    sees_node = buffer[start:].view(np.uint8)[: shape.num_tiles * shape.tile_rows * shape.num_nodes]
    num_rows, num_tiles = len(plan.ids_T), len(layout.sequences_G)
    arrays["ids_T"][:num_rows] = plan.ids_T
    arrays["positions_T"][:num_rows] = plan.positions_T
    arrays["write_places_T"][:num_rows] = _write_places(plan, first_node_place)
    arrays["write_places_T"][num_rows:] = scrap_place
    arrays["tile_places_T"][:num_rows] = layout.tiles_T * shape.tile_rows + layout.lanes_T
    arrays["logit_rows_X"][: len(plan.logit_rows_X)] = plan.logit_rows_X
    arrays["tile_rows_GW"][layout.tiles_T, layout.lanes_T] = np.arange(num_rows)
    # Lanes without a row see position 0, so that no softmax is over nothing.
    arrays["num_committed_GW"].fill(1)
    arrays["num_committed_GW"][layout.tiles_T, layout.lanes_T] = plan.num_committed_T
    width = min(plan.block_tables_BC.shape[1], shape.num_blocks)
    arrays["blocks_GC"][:num_tiles, :width] = plan.block_tables_BC[layout.sequences_G, :width]
    # Entries of a table past the sequence's blocks may hold anything; they are masked, but must be places.
    np.maximum(arrays["blocks_GC"], 0, out=arrays["blocks_GC"])
    if shape.num_nodes:
        _fill_nodes(arrays["node_places_GN"], layout, first_node_place)
        tiles, lanes = layout.tiles_T[layout.nodes.rows], layout.lanes_T[layout.nodes.rows]
        sees_node.reshape(shape.num_tiles, shape.tile_rows, -1)[tiles, lanes, layout.nodes.columns] = 1


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


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


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
    """Each row sees its ancestors, and a node sees itself, whether or not the plan lists it among its ancestors."""
    own = np.flatnonzero(plan.node_slots_T != NO_NODE)
    rows = np.concatenate([np.repeat(np.arange(len(plan.ids_T)), np.diff(plan.ancestor_starts)), own])
    slots = np.concatenate([plan.ancestors, plan.node_slots_T[own]]).astype(np.int64)
    sequences = plan.sequences_T[rows].astype(np.int64)
    keys, inverse = np.unique((sequences << 32) + slots, return_inverse=True)
    starts = np.searchsorted(keys >> 32, np.arange(num_sequences + 1))
    columns = inverse - starts[sequences]
    return SequenceNodes(
        (keys & 0xFFFFFFFF).astype(np.int32), starts.astype(np.int32), rows.astype(np.int32), columns.astype(np.int32)
    )


def _fill_nodes(node_places_GN: Int32, layout: Layout, first_node_place: int) -> None:
    slots, starts = layout.nodes.slots, layout.nodes.starts
    for tile, sequence in enumerate(layout.sequences_G):
        of_sequence = slots[starts[sequence] : starts[sequence + 1]]
        node_places_GN[tile, : len(of_sequence)] = of_sequence + first_node_place
