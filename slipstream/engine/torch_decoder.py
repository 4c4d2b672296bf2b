"""The paged decoder in plain torch: the CUDA path, and the one on CPU where no C++ compiler is found.

One pass is one copy of the plan to the device (`tiling`) and one function of static shapes (`_compute`), which reads
nothing back: logits and expert ids stay on the device. Activations are fp32; products run in the weights' dtype.

It does not promise that a row's result is bitwise independent of its batch mates: matrix libraries choose the order
of their sums by the shape of the whole product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from slipstream.engine.plan import BLOCK_TOKENS, Move, StepOutput, StepPlan
from slipstream.engine.tiling import StepShape, TiledStep, fill, lay_out, views
from slipstream.models.decoder import DecoderWeights, LayerWeights, decode, logits_of


class TorchDecoder:
    """A `PagedDecoder` on any device.

    Keys and values of all layers are one tensor [2, L, places, Hk, d]: first the blocks' positions, then the node
    slots, last one scrap place that takes what padding rows write. `is_exact` is False: see the module's docstring.
    """

    is_exact = False

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        num_blocks: int,
        num_node_slots: int,
        max_rows: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        config = weights.config
        self.config = config
        self._device = torch.device(device)
        self._weights = _placed(weights, self._device, dtype)
        self._max_rows = max_rows
        self._first_node_place = num_blocks * BLOCK_TOKENS
        self._scrap_place = self._first_node_place + num_node_slots
        self._cache = torch.zeros(
            (2, config.num_layers, self._scrap_place + 1, config.num_kv_heads, config.head_dim),
            dtype=dtype,
            device=self._device,
        )
        self._offsets = torch.arange(BLOCK_TOKENS, device=self._device)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> StepOutput:
        """Compute the plan's rows; writes their keys and values. ValueError for more rows than `max_rows`."""
        num_rows, num_logits = len(plan.ids_T), len(plan.logit_rows_X)
        if num_rows > self._max_rows:
            raise ValueError(f"the plan has {num_rows} rows, this decoder was built for max_rows={self._max_rows}")
        layout = lay_out(plan)
        host = torch.empty(layout.shape.num_ints, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        fill(
            host.numpy(),
            plan,
            layout,
            first_node_place=self._first_node_place,
            scrap_place=self._scrap_place,
        )
        step = views(host.to(self._device, non_blocking=True), layout.shape)
        logits_XV, expert_ids_TLK = self._compute(step, layout.shape)
        return StepOutput(logits_XV[:num_logits], None if expert_ids_TLK is None else expert_ids_TLK[:num_rows])

    @torch.inference_mode()
    def keep(self, moves: Sequence[Move]) -> None:
        """Copy accepted nodes into their blocks."""
        if not moves:
            return
        places = [(self._first_node_place + m.node_slot, m.block * BLOCK_TOKENS + m.offset) for m in moves]
        host = torch.from_numpy(np.array(places, dtype=np.int64).T.copy())
        if self._device.type == "cuda":
            host = host.pin_memory()
        sources, destinations = host.to(self._device, non_blocking=True)
        self._cache.index_copy_(2, destinations, self._cache.index_select(2, sources))

    def _compute(self, step: TiledStep, shape: StepShape) -> tuple[Tensor, Tensor | None]:
        """Logits [X, V] fp32 and expert ids [T, L, K] of a padded step; all sizes come from `shape`."""
        in_blocks = step.blocks_GC.unsqueeze(-1) * BLOCK_TOKENS + self._offsets
        places_GC = torch.cat([in_blocks.flatten(1), step.node_places_GN], dim=1)
        context = torch.arange(shape.num_blocks * BLOCK_TOKENS, device=self._device)
        is_visible_GWC = torch.cat([context < step.num_committed_GW.unsqueeze(-1), step.sees_node_GWN.bool()], dim=-1)
        # Query heads that share a key head become further rows of one attention over it.
        is_visible = is_visible_GWC.repeat(1, self.config.num_heads // self.config.num_kv_heads, 1).unsqueeze(1)

        def attend(layer: int, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor) -> Tensor:
            keys, values = self._cache[:, layer]
            keys[step.write_places_T], values[step.write_places_T] = key_THd.to(keys), value_THd.to(keys)
            tiles = query_THd.to(keys)[step.tile_rows_GW].unflatten(2, (self.config.num_kv_heads, -1))
            out = functional.scaled_dot_product_attention(
                tiles.permute(0, 2, 3, 1, 4).flatten(2, 3),
                keys[places_GC].transpose(1, 2),
                values[places_GC].transpose(1, 2),
                attn_mask=is_visible,
            )
            out = out.unflatten(2, (-1, shape.tile_rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)
            return out.flatten(0, 1)[step.tile_places_T].to(query_THd)

        hidden_TD, expert_ids_TLK = decode(
            self._weights, step.ids_T, step.positions_T, attend=attend, linear=mixed_linear
        )
        return logits_of(self._weights, hidden_TD[step.logit_rows_X], mixed_linear), expert_ids_TLK


def mixed_linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """x @ weight^T in the weight's dtype, summed and returned in fp32."""
    if weight_OD.dtype == torch.float32:
        return functional.linear(x_TD, weight_OD)
    if weight_OD.is_cuda:
        return torch.mm(x_TD.to(weight_OD), weight_OD.t(), out_dtype=torch.float32)
    # The CPU has no product of bf16 that keeps its fp32 sums; there this serves tests only.
    return functional.linear(x_TD.to(weight_OD), weight_OD).float()


def _placed(weights: DecoderWeights, device: torch.device, dtype: torch.dtype) -> DecoderWeights:
    """The weights on their device: matrices in `dtype`, norms and rotary tables in fp32."""
    embedding = weights.embedding.to(device, dtype)
    return DecoderWeights(
        weights.config,
        embedding,
        tuple(_placed_layer(layer, device, dtype) for layer in weights.layers),
        weights.final_norm.to(device, torch.float32),
        embedding if weights.head is weights.embedding else weights.head.to(device, dtype),
        (weights.rotary[0].to(device), weights.rotary[1].to(device)),
    )


def _placed_layer(layer: LayerWeights, device: torch.device, dtype: torch.dtype) -> LayerWeights:
    return LayerWeights._make(
        tuple(_placed_one(each, device, dtype) for each in field)
        if isinstance(field, tuple)
        else field
        if field is None
        else _placed_one(field, device, dtype)
        for field in layer
    )


def _placed_one(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return weight.to(device, dtype if weight.dim() > 1 else torch.float32)
