"""A decoder in our own kernels: the exact path on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from slipstream.engine.plan import Move, StepOutput, StepPlan
from slipstream.models.config import ModelConfig
from slipstream.models.decoder import DecoderWeights, LayerWeights
from slipstream_kernels.decoder import Decoder, Part, Sizes


class NativeDecoder:
    """A `PagedDecoder` whose every output row is a bitwise function of its own sequence, for any number of threads.

    Weights are packed as they are stored, bf16 or fp32; activations and sums are fp32. With `packs_int8` products are
    of integers, matrices in int8 and rows in bytes, and keys and values are kept in bf16; all else is fp32.
    """

    is_exact = True

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        num_blocks: int,
        num_node_slots: int,
        max_rows: int,
        packs_int8: bool = False,
    ) -> None:
        """Raises ValueError for sizes the kernels do not compute, MemoryError if the cache does not fit."""
        self.config = weights.config
        self.kernel = Decoder(_sizes(weights.config, num_blocks, num_node_slots, max_rows, packs_int8=packs_int8))
        self._set_model(weights)
        for index, layer in enumerate(weights.layers):
            self._set_layer(index, layer)

    def forward(self, plan: StepPlan) -> StepOutput:
        """See `PagedDecoder.forward`; what it returns is overwritten by the next pass."""
        logits_XV, expert_ids_TLK = self.kernel.forward(plan)
        return StepOutput(logits_XV, expert_ids_TLK if self.config.num_experts else None)

    def keep(self, moves: Sequence[Move]) -> None:
        """Copy accepted nodes into their blocks."""
        if moves:
            self.kernel.keep(np.array([(move.node_slot, move.block, move.offset) for move in moves], dtype=np.int32))

    def _set_model(self, weights: DecoderWeights) -> None:
        cosines, sines = weights.rotary
        for part, tensor in (
            (Part.EMBEDDING, weights.embedding),
            (Part.FINAL_NORM, weights.final_norm),
            (Part.HEAD, weights.head),
            (Part.COSINES, cosines),
            (Part.SINES, sines),
        ):
            self.kernel.set(part, tensor)

    def _set_layer(self, index: int, layer: LayerWeights) -> None:
        parts: tuple[tuple[Part, Tensor | None], ...] = (
            (Part.ATTENTION_NORM, layer.attention_norm),
            (Part.QKV, layer.qkv),
            (Part.QUERY_NORM, layer.query_norm),
            (Part.KEY_NORM, layer.key_norm),
            (Part.ATTENTION_OUT, layer.attention_out),
            (Part.MLP_NORM, layer.mlp_norm),
            (Part.ROUTER, layer.router),
        )
        for part, tensor in parts:
            if tensor is not None:
                self.kernel.set(part, tensor, layer=index)
        for expert, (gate_up, down) in enumerate(zip(layer.gate_up, layer.down, strict=True)):
            self.kernel.set(Part.GATE_UP, gate_up, layer=index, expert=expert)
            self.kernel.set(Part.DOWN, down, layer=index, expert=expert)


def _sizes(config: ModelConfig, num_blocks: int, num_node_slots: int, max_rows: int, *, packs_int8: bool) -> Sizes:
    return Sizes(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        qk_norm=config.qk_norm,
        normalizes_expert_weights=config.normalizes_expert_weights,
        packs_int8=packs_int8,
        norm_eps=config.rms_norm_eps,
        num_positions=config.max_position_embeddings,
        num_blocks=num_blocks,
        num_node_slots=num_node_slots,
        max_rows=max_rows,
    )
