"""Keys and values of running sequences, and attention over them.

One slot per running sequence, each as long as the context limit. Rows of a step are packed; attention regroups them
into tiles of ROW_TILE rows of one sequence, and sums over the context in blocks of CONTEXT_BLOCK, in order. So an
output row depends on its own query, keys and values only: not on tile mates, batch mates, or how far the longest
context of the batch reaches (what lies beyond a row's own context adds exact zeros).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from slipstream.models.config import ModelConfig
from slipstream.models.decoder import DecoderWeights, Linear, decode, logits_of

CONTEXT_BLOCK = 64
ROW_TILE = 8
"""Rows per matrix product in serving; one request's verified chain usually fits one tile."""


class Span(msgspec.Struct, frozen=True):
    """Consecutive tokens of one sequence to compute: they land at positions `start`, `start + 1`, ... of `slot`."""

    slot: int
    start: int
    token_ids: tuple[int, ...]


class StepPlan(msgspec.Struct, frozen=True):
    """Index tensors of one forward pass over T packed rows in G attention tiles.

    `num_rows` of the T rows are real. `tile_rows_GW` maps tiles to packed rows; `row_places_T` maps packed rows back
    to flat tile places. `is_visible_GWC` says which context positions a tile's row may attend to.
    """

    num_rows: int
    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    tile_slots_G: Tensor
    tile_rows_GW: Tensor
    row_places_T: Tensor
    is_visible_GWC: Tensor


def plan_step(spans: Sequence[Span], *, row_multiple: int) -> StepPlan:
    """Lay out these spans; their tokens keep their order in the packed rows, padded to a multiple."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    tile_slots: list[int] = []
    tile_rows: list[list[int]] = []
    places: list[int] = []
    for span in spans:
        for offset in range(0, len(span.token_ids), ROW_TILE):
            rows = range(len(ids) + offset, len(ids) + min(offset + ROW_TILE, len(span.token_ids)))
            places.extend(len(tile_rows) * ROW_TILE + index for index in range(len(rows)))
            tile_slots.append(span.slot)
            tile_rows.append([*rows, *[rows[0]] * (ROW_TILE - len(rows))])
        ids.extend(span.token_ids)
        positions.extend(range(span.start, span.start + len(span.token_ids)))
        slots.extend([span.slot] * len(span.token_ids))
    num_rows = len(ids)
    padding = [0] * (-num_rows % row_multiple)
    positions_T = torch.tensor(positions + padding)
    tile_rows_GW = torch.tensor(tile_rows)
    longest = -(-(max(positions) + 1) // CONTEXT_BLOCK) * CONTEXT_BLOCK
    return StepPlan(
        num_rows,
        torch.tensor(ids + padding),
        positions_T,
        torch.tensor(slots),
        torch.tensor(tile_slots),
        tile_rows_GW,
        torch.tensor(places + padding),
        torch.arange(longest) <= positions_T[tile_rows_GW].unsqueeze(-1),
    )


class CachedDecoder:
    """A decoder with its cache: computes spans of running sequences.

    `is_exact` makes every output row a bitwise function of its own sequence (`tiled_linear`), as a target needs. A
    draft may differ in the last bit from step to step: whatever it proposes is verified, and 1 row costs a third.
    """

    def __init__(self, decoder: DecoderWeights, *, num_slots: int, max_context_tokens: int, is_exact: bool) -> None:
        config = decoder.config
        length = -(-max_context_tokens // CONTEXT_BLOCK) * CONTEXT_BLOCK
        shape = (config.num_layers, num_slots, config.num_kv_heads, length, config.head_dim)
        self.decoder = decoder
        self._linear: Linear = tiled_linear if is_exact else functional.linear
        self._row_multiple = ROW_TILE if is_exact else 1
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)

    @property
    def config(self) -> ModelConfig:
        """The decoder's architecture."""
        return self.decoder.config

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor | None]:
        """Hidden states [rows, D] of the spans' tokens in order, and experts used [rows, L, K] or None.

        Writes the tokens' keys and values; what stood at or after `start` in a slot is overwritten or ignored, which
        is how rejected draft tokens are rolled back.
        """
        plan = plan_step(spans, row_multiple=self._row_multiple)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            place = (plan.slots_T, slice(None), plan.positions_T[: plan.num_rows])
            self._keys[layer][place], self._values[layer][place] = key[: plan.num_rows], value[: plan.num_rows]
            return attend_tiles(query, self._keys[layer], self._values[layer], plan)

        hidden, experts = decode(self.decoder, plan.ids_T, plan.positions_T, attend=attend, linear=self._linear)
        return hidden[: plan.num_rows], None if experts is None else experts[: plan.num_rows]

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V] of hidden states that `forward` returned."""
        return logits_of(self.decoder, hidden_TD, self._linear)


def tiled_linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """x @ weight^T with every row's sums in an order fixed by its own tile."""
    tiles = functional.pad(x_TD, (0, 0, 0, -len(x_TD) % ROW_TILE)).view(-1, ROW_TILE, x_TD.shape[1])
    return torch.bmm(tiles, weight_OD.t().expand(len(tiles), -1, -1)).flatten(0, 1)[: len(x_TD)]


def attend_tiles(query_THd: Tensor, keys_MHCd: Tensor, values_MHCd: Tensor, plan: StepPlan) -> Tensor:
    """Attention [T, H, d] of packed query rows over their slots' context (keys and values [slots, heads, C, d])."""
    num_heads, head_dim = query_THd.shape[1:]
    num_tiles, _, context = plan.is_visible_GWC.shape
    num_kv_heads = keys_MHCd.shape[1]
    num_blocks = context // CONTEXT_BLOCK
    keys = keys_MHCd[plan.tile_slots_G, :, :context].flatten(0, 1)
    values = values_MHCd[plan.tile_slots_G, :, :context].flatten(0, 1)
    # Heads that share a key head stand together as rows of one product: [G * kv heads, shared heads * W, d].
    tiles = query_THd[plan.tile_rows_GW].unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
    tiles = tiles.reshape(num_tiles * num_kv_heads, -1, head_dim)
    scores = torch.bmm(tiles, keys.transpose(1, 2)) * head_dim**-0.5
    is_hidden = ~plan.is_visible_GWC[:, None, None]
    scores = scores.view(num_tiles, num_kv_heads, -1, ROW_TILE, context).masked_fill(is_hidden, -torch.inf)
    probs = scores.softmax(dim=-1).view(num_tiles * num_kv_heads, -1, num_blocks, CONTEXT_BLOCK)
    blocks = torch.bmm(
        probs.transpose(1, 2).reshape(-1, probs.shape[1], CONTEXT_BLOCK), values.view(-1, CONTEXT_BLOCK, head_dim)
    ).view(num_tiles * num_kv_heads, num_blocks, -1, head_dim)
    out = blocks[:, 0]
    for block in range(1, num_blocks):
        out = out + blocks[:, block]
    out = out.view(num_tiles, num_heads, ROW_TILE, head_dim).transpose(1, 2).reshape(-1, num_heads, head_dim)
    return out[plan.row_places_T]
