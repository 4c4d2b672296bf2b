"""The ops of a forward pass, one by one: for tests against `reference`, and for measurements.

Every function has a twin of the same name and signature in `slipstream_kernels.reference`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream_kernels.decoder import PACKED_INT8, WEIGHT_TYPES
from slipstream_kernels.isa import function, instruction_set
from slipstream_kernels.reference import HeadCache, Places


def _address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _int32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()


class PackedMatrix:
    """A weight matrix [O, D], fp32 or bf16, laid out for products with few rows; D is even for bf16.

    `packs_int8`: as integers of at most 127 with a scale for every output; products round their rows as well.
    """

    def __init__(self, weight_OD: Tensor, *, packs_int8: bool = False) -> None:
        if weight_OD.dtype not in WEIGHT_TYPES:
            raise ValueError(f"weight is {weight_OD.dtype}, expected fp32 or bf16")
        if weight_OD.dtype == torch.bfloat16 and weight_OD.shape[1] % 2:
            raise ValueError(f"weight has {weight_OD.shape[1]} columns, expected an even number for bf16")
        self.shape = weight_OD.shape
        self.instruction_set = instruction_set()
        new = function("matrix_new", self.instruction_set)
        new.restype = ctypes.c_void_p
        weight_OD = weight_OD.contiguous()
        weight_type = WEIGHT_TYPES[weight_OD.dtype]
        packed_type = PACKED_INT8 if packs_int8 else weight_type
        self.handle = ctypes.c_void_p(new(_address(weight_OD), weight_type, packed_type, *self.shape))
        weakref.finalize(self, function("matrix_free", self.instruction_set), self.handle)


def matrix_product(x_TD: Tensor, weight: PackedMatrix) -> Tensor:
    """x @ weight^T, fp32 [T, O]: every output one chain of fused multiply-adds over D from first to last.

    With matrix tiles (`amx`) and bf16 weights every output is such a chain for each of the three bf16 that a value of a
    row is the sum of, and then their sum.

    With an int8 matrix every output is a sum of integers, times two scales, of rows rounded to 64ths of their largest
    magnitude; NaN for rows that are not finite.
    """
    num_outputs, inner = weight.shape
    if x_TD.shape[1] != inner:
        raise ValueError(f"x has {x_TD.shape[1]} columns, the matrix {inner}")
    x_TD = x_TD.float().contiguous()
    out_TO = torch.empty(len(x_TD), num_outputs)
    run = function("matrix_product", weight.instruction_set)
    run(weight.handle, _address(x_TD), len(x_TD), inner, _address(out_TO))
    return out_TO


class PackedExperts:
    """The experts of a layer: `gate_up` E times [2 * I, D] (gate rows first), `down` E times [D, I]; one dtype.

    `packs_int8` as in `PackedMatrix`.
    """

    def __init__(self, gate_up: Sequence[Tensor], down: Sequence[Tensor], *, packs_int8: bool = False) -> None:
        self.hidden, inner = down[0].shape
        self.instruction_set = instruction_set()
        new = function("experts_new", self.instruction_set)
        new.restype = ctypes.c_void_p
        self.handle = ctypes.c_void_p(new(len(down), self.hidden, inner, int(packs_int8)))
        weakref.finalize(self, function("experts_free", self.instruction_set), self.handle)
        set_expert = function("experts_set", self.instruction_set)
        for expert, (both, last) in enumerate(zip(gate_up, down, strict=True)):
            both, last = both.contiguous(), last.contiguous()
            set_expert(self.handle, expert, _address(both), _address(last), WEIGHT_TYPES[both.dtype])


def expert_mlp(x_TD: Tensor, experts: PackedExperts, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum [T, D] of down(silu(gate(x)) * up(x)) over each row's K different experts, in their order."""
    x_TD, weights_TK = x_TD.float().contiguous(), weights_TK.float().contiguous()
    ids = _int32(expert_ids_TK)
    out_TD = torch.empty(len(x_TD), experts.hidden)
    run = function("experts_run", experts.instruction_set)
    run(experts.handle, _address(x_TD), *ids.shape, _address(ids), _address(weights_TK), _address(out_TD))
    return out_TD


def tree_attention(query_THd: Tensor, cache: HeadCache, places: Places) -> Tensor:
    """Attention [T, H, d] of the query heads that share a key head: committed positions, then ancestors in order.

    A row's bits are the same whichever other rows of its sequence are its neighbours.
    """
    out_THd = torch.empty_like(query_THd)
    starts = np.cumsum([0, *map(len, places.ancestors)], dtype=np.int32)
    flat = np.array([slot for slots in places.ancestors for slot in slots] or [0], dtype=np.int32)
    sequences, tables, committed = map(_int32, places[:3])
    function("tree_attention")(
        *map(_address, (query_THd, cache.keys_NdB, cache.values_NBd)),
        cache.first_node_block,
        len(cache.keys_NdB),
        *map(_address, (sequences, tables)),
        tables.shape[1],
        _address(committed),
        ctypes.c_void_p(starts.ctypes.data),
        ctypes.c_void_p(flat.ctypes.data),
        *query_THd.shape,
        _address(out_THd),
    )
    return out_THd


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, fp32 [T, D]."""
    out_TD = torch.empty_like(x_TD)
    function("rms_norm")(*map(_address, (x_TD, weight_D)), *x_TD.shape, ctypes.c_float(epsilon), _address(out_TD))
    return out_TD


def rotate(heads_Hd: Tensor, cosines_d: Tensor, sines_d: Tensor) -> Tensor:
    """Rotary embedding [H, d]: (first half, second half) of every head turned by the angles of one position."""
    out_Hd = heads_Hd.clone()
    function("rotate")(*map(_address, (out_Hd, cosines_d, sines_d)), *out_Hd.shape)
    return out_Hd


def route(x_TD: Tensor, router_ED: Tensor, num_chosen: int, *, normalizes: bool) -> tuple[Tensor, Tensor]:
    """Expert ids int32 [T, K], best first, equals by lowest id, and their softmax weights fp32 [T, K]."""
    ids_TK = torch.empty(len(x_TD), num_chosen, dtype=torch.int32)
    weights_TK = torch.empty(len(x_TD), num_chosen)
    num_experts, hidden = router_ED.shape
    function("route")(
        _address(x_TD),
        _address(router_ED),
        len(x_TD),
        hidden,
        num_experts,
        num_chosen,
        int(normalizes),
        _address(ids_TK),
        _address(weights_TK),
    )
    return ids_TK, weights_TK


def exp(x: Tensor) -> Tensor:
    """e^x, fp32, elementwise: relative error below 2e-7, 0 below -87.3."""
    out = torch.empty_like(x)
    function("exp")(_address(x), x.numel(), _address(out))
    return out
