"""The paged decoder in plain torch: the CUDA path, and the one on CPU where no C++ compiler is found.

One pass is one copy of the plan to the device (`tiling`) and one function of it (`_compute`). With static shapes, that
function reads nothing back and its sizes come from the padded plan alone, so that CUDA graphs can hold it: logits and
expert ids stay on the device, and the one read of a step is the engine's, of the tokens chosen. Activations are fp32;
products and the cache have the weights' dtype.

It does not promise that a row's result is bitwise independent of its batch mates: matrix libraries choose the order
of their sums by the shape of the whole product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from slipstream.engine.captured import CapturedSteps
from slipstream.engine.plan import BLOCK_TOKENS, Move, StepOutput, StepPlan
from slipstream.engine.products import StackedExperts, mixed_linear, run_experts
from slipstream.engine.tiling import StepShape, TiledStep, fill, lay_out, num_ints, views
from slipstream.models.decoder import DecoderWeights, LayerWeights, decode, logits_of

StepKind = Literal["exact", "static", "captured"]
"""How a step runs: in its exact sizes; padded and without a look at data; or that, from CUDA graphs."""


class _View(NamedTuple):
    """What attention of one pass reads and writes: int64 places of the cache, and who sees what.

    `is_visible` is [G, 1, heads per key head * W, C]: query heads that share a key head are rows of one attention.
    """

    write_places_T: Tensor
    tile_rows_GW: Tensor
    tile_places_T: Tensor
    places_GC: Tensor
    is_visible: Tensor


class TorchDecoder:
    """A `PagedDecoder` on any device.

    Keys and values of all layers are one tensor [2, L, places, Hk, d]: first the blocks' positions, then the node
    slots, last one scrap place that takes what padding rows write. `steps` is "captured" on CUDA and "exact" elsewhere
    unless said otherwise. `is_exact` is False: see the module's docstring.
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
        steps: StepKind | None = None,
    ) -> None:
        config = weights.config
        self.config = config
        self._device = torch.device(device)
        steps = steps or ("captured" if self._device.type == "cuda" else "exact")
        self._is_padded = steps != "exact"
        stacks = self._is_padded and config.num_experts > 0
        self._weights = _placed(weights, self._device, dtype, without_experts=stacks)
        self._experts = [_stacked(layer, self._device, dtype) for layer in weights.layers] if stacks else []
        self._max_rows = max_rows
        self._first_node_place = num_blocks * BLOCK_TOKENS
        self._scrap_place = self._first_node_place + num_node_slots
        self._cache = torch.zeros(
            (2, config.num_layers, self._scrap_place + 1, config.num_kv_heads, config.head_dim),
            dtype=dtype,
            device=self._device,
        )
        self._captured = CapturedSteps(self._compute, self._device) if steps == "captured" else None

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> StepOutput:
        """Compute the plan's rows; writes their keys and values. ValueError for more rows than `max_rows`."""
        num_rows, num_logits = len(plan.ids_T), len(plan.logit_rows_X)
        if num_rows > self._max_rows:
            raise ValueError(f"the plan has {num_rows} rows, this decoder was built for max_rows={self._max_rows}")
        layout = lay_out(plan, is_padded=self._is_padded)
        # Pinned memory comes from torch's cache of it, which gives none back before its copies have run.
        host = torch.empty(num_ints(layout.shape), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        places = (self._first_node_place, self._scrap_place)
        fill(host, plan, layout, first_node_place=places[0], scrap_place=places[1])
        if self._captured is None:
            logits_XV, expert_ids_TLK = self._compute(host.to(self._device, non_blocking=True), layout.shape)
        else:
            logits_XV, expert_ids_TLK = self._captured.run(host, layout.shape)
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

    @property
    def num_graphs(self) -> int:
        """CUDA graphs captured so far."""
        return len(self._captured) if self._captured else 0

    def _compute(self, buffer: Tensor, shape: StepShape) -> tuple[Tensor, Tensor | None]:
        """Logits [X, V] fp32 and expert ids [T, L, K] of the step in this buffer; all sizes come from `shape`."""
        step = views(buffer, shape)
        view = self._view_of(step, shape)
        hidden_TD, expert_ids_TLK = decode(
            self._weights,
            step.ids_T,
            step.positions_T,
            attend=partial(self._attend, view),
            linear=mixed_linear,
            run_experts=self._run_experts if self._experts else None,
        )
        return logits_of(self._weights, hidden_TD[step.logit_rows_X], mixed_linear), expert_ids_TLK

    def _run_experts(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
        return run_experts(self._experts[layer], x_TD, expert_ids_TK)

    def _view_of(self, step: TiledStep, shape: StepShape) -> _View:
        device = step.blocks_GC.device
        in_blocks = step.blocks_GC.unsqueeze(-1) * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=device)
        context = torch.arange(shape.num_blocks * BLOCK_TOKENS, device=device)
        is_committed_GWC = context < step.num_committed_GW.unsqueeze(-1)
        is_visible = torch.cat([is_committed_GWC, step.sees_node_GWN.bool()], dim=-1)
        return _View(
            step.write_places_T.long(),
            step.tile_rows_GW.long(),
            step.tile_places_T.long(),
            torch.cat([in_blocks.flatten(1), step.node_places_GN], dim=1).long(),
            is_visible.repeat(1, self.config.num_heads // self.config.num_kv_heads, 1).unsqueeze(1),
        )

    def _attend(self, view: _View, layer: int, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor) -> Tensor:
        keys, values = self._cache[:, layer]
        keys[view.write_places_T], values[view.write_places_T] = key_THd.to(keys), value_THd.to(keys)
        tiles = query_THd.to(keys)[view.tile_rows_GW].unflatten(2, (self.config.num_kv_heads, -1))
        out: Tensor = functional.scaled_dot_product_attention(
            tiles.permute(0, 2, 3, 1, 4).flatten(2, 3),
            keys[view.places_GC].transpose(1, 2),
            values[view.places_GC].transpose(1, 2),
            attn_mask=view.is_visible,
        )
        out = out.unflatten(2, (-1, tiles.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)
        rows_THd: Tensor = out.flatten(0, 1)[view.tile_places_T]
        return rows_THd.to(query_THd)


def _placed(
    weights: DecoderWeights, device: torch.device, dtype: torch.dtype, *, without_experts: bool
) -> DecoderWeights:
    """The weights on their device: matrices in `dtype`, norms and rotary tables in fp32."""
    place = partial(_placed_tensor, device=device, dtype=dtype)
    embedding = place(weights.embedding)
    return DecoderWeights(
        weights.config,
        embedding,
        tuple(_placed_layer(layer, place, without_experts) for layer in weights.layers),
        place(weights.final_norm),
        embedding if weights.head is weights.embedding else place(weights.head),
        (weights.rotary[0].to(device), weights.rotary[1].to(device)),
    )


def _placed_layer(layer: LayerWeights, place: Callable[[Tensor], Tensor], without_experts: bool) -> LayerWeights:
    return LayerWeights(
        attention_norm=place(layer.attention_norm),
        qkv=place(layer.qkv),
        query_norm=None if layer.query_norm is None else place(layer.query_norm),
        key_norm=None if layer.key_norm is None else place(layer.key_norm),
        attention_out=place(layer.attention_out),
        mlp_norm=place(layer.mlp_norm),
        router=None if layer.router is None else place(layer.router),
        gate_up=() if without_experts else tuple(map(place, layer.gate_up)),
        down=() if without_experts else tuple(map(place, layer.down)),
    )


def _stacked(layer: LayerWeights, device: torch.device, dtype: torch.dtype) -> StackedExperts:
    gate_up, down = (torch.stack(matrices).to(device, dtype) for matrices in (layer.gate_up, layer.down))
    return StackedExperts(gate_up, down)


def _placed_tensor(weight: Tensor, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    return weight.to(device, dtype if weight.dim() > 1 else torch.float32)
