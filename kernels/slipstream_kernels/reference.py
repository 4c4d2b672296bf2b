"""The ops of `slipstream_kernels.ops` in plain torch: what they mean, without the order of sums they promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 16


def matrix_product(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """x @ weight^T, fp32 [T, O]."""
    return functional.linear(x_TD.float(), weight_OD.float())


def expert_mlp(
    x_TD: Tensor, experts: tuple[Sequence[Tensor], Sequence[Tensor]], expert_ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Weighted sum [T, D] of down(silu(gate(x)) * up(x)) over each row's K experts; `experts` is (gate_up, down)."""
    gate_up, down = experts
    out_TD = torch.zeros(len(x_TD), len(down[0]))
    for row, (ids, weights) in enumerate(zip(expert_ids_TK.tolist(), weights_TK.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = matrix_product(x_TD[row], gate_up[expert]).chunk(2)
            out_TD[row] += weight * matrix_product(functional.silu(gate) * up, down[expert])
    return out_TD


class HeadCache(NamedTuple):
    """One key head's keys and values, fp32: `keys_NdB` [N, d, 16] (positions last), `values_NBd` [N, 16, d].

    Node slots are numbered through the blocks from `first_node_block` on.
    """

    keys_NdB: Tensor
    values_NBd: Tensor
    first_node_block: int


class Places(NamedTuple):
    """Where the keys of T rows lie: each one's sequence, that one's blocks, committed positions, ancestors' node slots.

    Integers: `sequences_T` [T], `block_tables_BC` [B, C], `num_committed_T` [T].
    """

    sequences_T: Tensor
    block_tables_BC: Tensor
    num_committed_T: Tensor
    ancestors: Sequence[Sequence[int]]


def tree_attention(query_THd: Tensor, cache: HeadCache, places: Places) -> Tensor:
    """Attention [T, H, d] of the query heads that share a key head: committed positions, then ancestors in order."""
    keys_Pd, values_Pd = cache.keys_NdB.transpose(1, 2).flatten(0, 1), cache.values_NBd.flatten(0, 1)
    rows = []
    for query_Hd, sequence, committed, slots in zip(
        query_THd, places.sequences_T.tolist(), places.num_committed_T.tolist(), places.ancestors, strict=True
    ):
        at = torch.arange(committed)
        in_blocks = places.block_tables_BC[sequence, at // _BLOCK].long() * _BLOCK + at % _BLOCK
        in_nodes = torch.tensor(slots, dtype=torch.long) + cache.first_node_block * _BLOCK
        position = torch.cat([in_blocks, in_nodes])
        scores_HP = query_Hd @ keys_Pd[position].T * query_Hd.shape[1] ** -0.5
        rows.append(scores_HP.softmax(-1) @ values_Pd[position])
    return torch.stack(rows)


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, fp32 [T, D]."""
    return x_TD * torch.rsqrt(x_TD.pow(2).mean(-1, keepdim=True) + epsilon) * weight_D


def rotate(heads_Hd: Tensor, cosines_d: Tensor, sines_d: Tensor) -> Tensor:
    """Rotary embedding [H, d]: (first half, second half) of every head turned by the angles of one position."""
    first, second = heads_Hd.chunk(2, dim=-1)
    return heads_Hd * cosines_d + torch.cat([-second, first], dim=-1) * sines_d


def route(x_TD: Tensor, router_ED: Tensor, num_chosen: int, *, normalizes: bool) -> tuple[Tensor, Tensor]:
    """Expert ids int32 [T, K], best first, equals by lowest id, and their softmax weights fp32 [T, K]."""
    probs_TE = matrix_product(x_TD, router_ED).softmax(-1)
    ordered, ids = probs_TE.sort(dim=-1, descending=True, stable=True)
    weights_TK = ordered[:, :num_chosen]
    if normalizes:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return ids[:, :num_chosen].int(), weights_TK


def exp(x: Tensor) -> Tensor:
    """e^x, fp32, elementwise."""
    return x.exp()
