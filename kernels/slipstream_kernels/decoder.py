"""A decoder in the compiled kernels: weights packed once, then one call for every forward pass."""

from __future__ import annotations

import ctypes
import enum
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream_kernels.address import address_of
from slipstream_kernels.isa import function, instruction_set

Int32 = NDArray[np.int32]
QkNorm = Literal["none", "per_head", "whole"]

WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The types that weights are handed over in, by the number that names them in C (`abi.h`)."""

PACKED_INT8 = 2
"""The type that they may be packed in besides."""

_QK_NORMS: dict[QkNorm, int] = {"none": 0, "per_head": 1, "whole": 2}


class Sizes(NamedTuple):
    """Sizes of a decoder and its cache; `experts` 0 means dense. Blocks hold 16 positions, node slots one each.

    `packs_int8` rounds matrices to integers of at most 127 with a scale for every output, and the rows that they are
    multiplied with to integers of at most 64 with a scale for every row; keys and values are kept in bf16.
    """

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    qk_norm: QkNorm
    normalizes_expert_weights: bool
    packs_int8: bool
    norm_eps: float
    num_positions: int
    num_blocks: int
    num_node_slots: int
    max_rows: int


class Plan(Protocol):
    """The arrays of one pass over T packed rows, all C-contiguous int32; see `Decoder.forward` for what they mean.

    Row t's ancestors are `ancestors[ancestor_starts[t] : ancestor_starts[t + 1]]`, so there are T + 1 starts.
    """

    @property
    def ids_T(self) -> Int32: ...  # noqa: D102

    @property
    def positions_T(self) -> Int32: ...  # noqa: D102

    @property
    def sequences_T(self) -> Int32: ...  # noqa: D102

    @property
    def block_tables_BC(self) -> Int32: ...  # noqa: D102

    @property
    def num_committed_T(self) -> Int32: ...  # noqa: D102

    @property
    def node_slots_T(self) -> Int32: ...  # noqa: D102

    @property
    def ancestor_starts(self) -> Int32: ...  # noqa: D102

    @property
    def ancestors(self) -> Int32: ...  # noqa: D102

    @property
    def logit_rows_X(self) -> Int32: ...  # noqa: D102


class Part(enum.IntEnum):
    """A tensor of the model or of a layer; shapes as in `Decoder.set`."""

    EMBEDDING = 0
    FINAL_NORM = 1
    HEAD = 2
    COSINES = 3
    SINES = 4
    ATTENTION_NORM = 5
    QKV = 6
    QUERY_NORM = 7
    KEY_NORM = 8
    ATTENTION_OUT = 9
    MLP_NORM = 10
    ROUTER = 11
    GATE_UP = 12
    DOWN = 13


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in Sizes._fields if name != "norm_eps"] + [("norm_eps", ctypes.c_float)]


_ARRAYS = (
    "ids",
    "positions",
    "sequences",
    "block_tables",
    "num_committed",
    "node_slots",
    "ancestor_starts",
    "ancestors",
    "logit_rows",
)


class _Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("num_rows", "num_logit_rows", "table_width")] + [
        (name, ctypes.c_void_p) for name in _ARRAYS
    ]


_MOST_VIEWS = 4096

LONGEST_ROUNDED = 2**31 // (128 * 127)
"""Inputs of a product of integers, at most: so many of the largest bytes and weights add up to 32 bits."""


class Decoder:
    """A decoder and its cache in the instruction set that runs when it is made.

    Tensors are handed over with `set`, every part once; then `forward` may be called, from one thread at a time.
    Every output row is a bitwise function of its own token, position, and the keys and values it attends to.
    """

    def __init__(self, sizes: Sizes) -> None:
        """Raises ValueError for sizes the kernels do not compute, MemoryError if the cache does not fit."""
        _check(sizes)
        self.sizes = sizes
        self.instruction_set = instruction_set()
        fields = sizes._asdict() | {"qk_norm": _QK_NORMS[sizes.qk_norm]}
        self._handle = self._function("decoder_new", ctypes.c_void_p)(ctypes.byref(_Sizes(**fields)))
        if not self._handle:
            raise MemoryError(f"a cache of {sizes.num_blocks} blocks and {sizes.max_rows} rows does not fit in memory")
        weakref.finalize(self, self._function("decoder_free"), ctypes.c_void_p(self._handle))
        self._set = self._function("decoder_set", ctypes.c_int)
        self._forward = self._function("decoder_forward")
        self._keep = self._function("decoder_keep")
        self._draft_chain = self._function("draft_chain")
        self._plan = _Plan()
        self._plan_address = ctypes.addressof(self._plan)
        self._kept_alive: list[Tensor] = []
        # Untouched memory costs nothing, so there is room for the logits of every row.
        self._logits_XV = torch.empty(sizes.max_rows, sizes.vocab)
        experts = (sizes.max_rows, sizes.layers, sizes.experts_per_token) if sizes.experts else (0, 0, 0)
        self._experts_TLK = np.zeros(experts, np.int32)
        self._logits_address = self._logits_XV.data_ptr()
        self._experts_address = address_of(self._experts_TLK) if sizes.experts else 0
        self._given_out: dict[tuple[int, int], tuple[Tensor, Int32]] = {}

    def _function(self, name: str, result: Any = None) -> Callable[..., Any]:
        # A pointer type of its own per decoder: ctypes keeps argument types on the function object.
        found = function(name, self.instruction_set)
        found.restype = result
        return found  # type: ignore[no-any-return]

    def set(self, part: Part, tensor: Tensor, *, layer: int = 0, expert: int = 0) -> None:
        """Hand a tensor over, fp32 or bf16, row-major [outputs, inputs]; it may be dropped afterwards.

        QKV stacks the rows of query, key and value, GATE_UP those of gate and up. Rotary tables are fp32
        [positions, head_dim]. Raises ValueError for another type, MemoryError if packing it fails.
        """
        if tensor.dtype not in WEIGHT_TYPES:
            raise ValueError(f"{part.name} is {tensor.dtype}, expected {' or '.join(map(str, WEIGHT_TYPES))}")
        tensor = tensor.detach().contiguous()
        if part in (Part.EMBEDDING, Part.COSINES, Part.SINES):
            self._kept_alive.append(tensor)  # read in place, not packed
        address = ctypes.c_void_p(tensor.data_ptr())
        if not self._set(ctypes.c_void_p(self._handle), int(part), layer, expert, address, WEIGHT_TYPES[tensor.dtype]):
            raise MemoryError(f"no memory to pack {part.name} of layer {layer}, {tuple(tensor.shape)}")

    def forward(self, plan: Plan) -> tuple[Tensor, Int32]:
        """Logits fp32 [X, vocab] of the rows asked for and experts [T, L, K] (none, [0, 0, 0], if dense).

        Both are views of this decoder's own memory, valid until the next pass. A row reads positions
        [0, num_committed) through its sequence's line of the block table, then its ancestors' node slots in order of
        depth, itself last; it writes its own key and value into its node slot, or, where that is -1, into the block of
        its position. Places must be within the sizes, which is not checked again.
        """
        num_rows, num_logit_rows = self._take(plan)
        self._forward(
            ctypes.c_void_p(self._handle),
            ctypes.c_void_p(self._plan_address),
            ctypes.c_void_p(self._logits_address),
            ctypes.c_void_p(self._experts_address),
        )
        return self._views(num_rows, num_logit_rows)

    def _views(self, num_rows: int, num_logit_rows: int) -> tuple[Tensor, Int32]:
        """The first rows of what passes write; the same views for the same numbers, as making them takes long."""
        key = num_rows, num_logit_rows
        if key not in self._given_out:
            if len(self._given_out) == _MOST_VIEWS:
                self._given_out.clear()
            self._given_out[key] = self._logits_XV[:num_logit_rows], self._experts_TLK[:num_rows]
        return self._given_out[key]

    def draft_chain(self, first: Plan, chain_address: int) -> None:
        """Draft from this decoder; `slipstream_kernels.chain` says what lies at the address."""
        self._take(first)
        self._draft_chain(
            ctypes.c_void_p(self._handle),
            ctypes.c_void_p(self._plan_address),
            ctypes.c_int32(self.sizes.vocab),
            ctypes.c_void_p(self._logits_address),
            ctypes.c_void_p(chain_address),
        )

    def _take(self, plan: Plan) -> tuple[int, int]:
        """Where the plan's arrays lie, for the next call; how many rows it has, and of logits."""
        num_rows, num_logit_rows = len(plan.ids_T), len(plan.logit_rows_X)
        assert num_rows <= self.sizes.max_rows
        assert num_logit_rows <= self.sizes.max_rows
        fields = self._plan
        fields.num_rows, fields.num_logit_rows = num_rows, num_logit_rows
        fields.table_width = plan.block_tables_BC.shape[1]
        fields.ids = address_of(plan.ids_T)
        fields.positions = address_of(plan.positions_T)
        fields.sequences = address_of(plan.sequences_T)
        fields.block_tables = address_of(plan.block_tables_BC)
        fields.num_committed = address_of(plan.num_committed_T)
        fields.node_slots = address_of(plan.node_slots_T)
        fields.ancestor_starts = address_of(plan.ancestor_starts)
        fields.ancestors = address_of(plan.ancestors)
        fields.logit_rows = address_of(plan.logit_rows_X)
        return num_rows, num_logit_rows

    def keep(self, moves: Int32) -> None:
        """Copy keys and values from node slots into blocks: rows of (node slot, block, offset in the block)."""
        moves = np.ascontiguousarray(moves, dtype=np.int32)
        self._keep(ctypes.c_void_p(self._handle), len(moves), ctypes.c_void_p(address_of(moves)))


def _check(sizes: Sizes) -> None:
    if sizes.head_dim % 2:
        raise ValueError(f"head_dim is {sizes.head_dim}, expected an even number")
    if sizes.heads % sizes.kv_heads:
        raise ValueError(f"{sizes.heads} heads do not share {sizes.kv_heads} key/value heads evenly")
    if sizes.hidden % 2 or sizes.experts > 1024:
        raise ValueError(f"hidden is {sizes.hidden}, experts {sizes.experts}; expected even, and at most 1024")
    longest = max(sizes.hidden, sizes.inner, sizes.heads * sizes.head_dim)
    if sizes.packs_int8 and longest > LONGEST_ROUNDED:
        raise ValueError(f"a matrix has {longest} inputs, expected at most {LONGEST_ROUNDED} to round it to int8")
