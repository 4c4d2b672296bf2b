"""Products of the torch decoder: weights in their own dtype, sums in fp32, experts in shapes that no data decides.

Which experts a token uses is known on the device only. To read it back would stop the host in every layer, and a CUDA
graph cannot; so the ways of running experts here differ in shapes and cost, never in what they compute:

    grouped    rows sorted by expert, one product of ragged groups: reads only the experts used (Hopper and later, bf16)
    gathered   each row's K experts are copied together: for few rows, where the copies are less than all experts
    every      all experts over all rows, K of them picked: reads each expert once
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MOST_ROWS_OF_EVERY = 64
"""Rows that go through every expert at once; bounds the intermediate [E, rows, 2 * inner]."""

GATHER_COST = 3
"""Gathered weights are read, written and read again; weights in place are read once."""


class StackedExperts(NamedTuple):
    """A layer's experts: `gate_up` [E, 2 * inner, D] (gate rows, then up rows) and `down` [E, D, inner]."""

    gate_up: Tensor
    down: Tensor


def mixed_linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """x @ weight^T in the weight's dtype, summed and returned in fp32; leading dimensions of both are a batch."""
    if weight_OD.dtype == torch.float32:
        return x_TD @ weight_OD.mT
    if weight_OD.is_cuda and weight_OD.dim() == 2:
        return torch.mm(x_TD.to(weight_OD), weight_OD.mT, out_dtype=torch.float32)
    if weight_OD.is_cuda:
        return torch.bmm(x_TD.to(weight_OD), weight_OD.mT, out_dtype=torch.float32)
    # The CPU has no product of bf16 that hands out its fp32 sums.
    return (x_TD.to(weight_OD) @ weight_OD.mT).float()


def run_experts(experts: StackedExperts, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """Each row's K experts [T, K, D] fp32, by the cheapest of the three ways; reads nothing back from the device."""
    if has_grouped_kernel(experts):
        return grouped(experts, x_TD, expert_ids_TK)
    if expert_ids_TK.numel() * GATHER_COST <= len(experts.gate_up):
        return gathered(experts, x_TD, expert_ids_TK)
    return every(experts, x_TD, expert_ids_TK)


def has_grouped_kernel(experts: StackedExperts) -> bool:
    """Whether this device multiplies ragged groups without asking the host for their sizes."""
    weight = experts.gate_up
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return False
    # The kernel wants rows that start at multiples of 16 bytes.
    is_aligned = weight.shape[2] % 8 == 0 and experts.down.shape[2] % 8 == 0
    return is_aligned and torch.cuda.get_device_capability(weight.device)[0] in (9, 10)


def grouped(experts: StackedExperts, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """Rows sorted by expert, as one product of ragged groups."""
    num_experts, _, hidden_size = experts.gate_up.shape
    sorted_ids, order = expert_ids_TK.flatten().sort(stable=True)
    every_expert = torch.arange(num_experts, device=x_TD.device, dtype=sorted_ids.dtype)
    ends_E = torch.searchsorted(sorted_ids, every_expert, right=True).int()
    rows = x_TD[order // expert_ids_TK.shape[1]].to(experts.gate_up)
    gate, up = functional.grouped_mm(rows, experts.gate_up.mT, offs=ends_E).float().chunk(2, dim=-1)
    inner = (functional.silu(gate) * up).to(experts.down)
    out = functional.grouped_mm(inner, experts.down.mT, offs=ends_E).float()
    return torch.empty_like(out).index_copy_(0, order, out).view(*expert_ids_TK.shape, hidden_size)


def gathered(experts: StackedExperts, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """One product per row and rank, over a copy of its expert."""
    flat_ids = expert_ids_TK.flatten()
    rows = x_TD.repeat_interleave(expert_ids_TK.shape[1], dim=0).unsqueeze(1)
    gate, up = mixed_linear(rows, experts.gate_up[flat_ids]).chunk(2, dim=-1)
    out = mixed_linear(functional.silu(gate) * up, experts.down[flat_ids])
    return out.view(*expert_ids_TK.shape, -1)


def every(experts: StackedExperts, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """All experts over all rows; each row picks its own."""
    out = []
    for rows, ids in zip(x_TD.split(MOST_ROWS_OF_EVERY), expert_ids_TK.split(MOST_ROWS_OF_EVERY), strict=True):
        gate, up = mixed_linear(rows.expand(len(experts.gate_up), -1, -1), experts.gate_up).chunk(2, dim=-1)
        each_ETD = mixed_linear(functional.silu(gate) * up, experts.down)
        out.append(each_ETD[ids, torch.arange(len(rows), device=rows.device).unsqueeze(1)])
    return torch.cat(out)
