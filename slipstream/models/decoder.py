"""The decoder of every supported family, in plain torch: one definition for serving and for training.

    x = embed(ids)
    for each layer:  x += out(attend(rotate(norm(qkv(norm(x))))));  x += mlp(norm(x))   # mlp: dense, or top-k experts
    logits = head(norm(x))

Serving and training differ in what the caller passes in: `attend` (against a cache, or causal over the batch) and,
where something watches or replaces the products, `linear` and `run_experts`. Activations are fp32 whatever the weights.
Rows share a library's matrix products here, so a row's last bits may depend on its neighbours; the kernels of
`slipstream_kernels`, which are checked against this definition, do not have that freedom.
Source of the families: Hugging Face's modelling files of Llama, Qwen3, Mixtral, Qwen3-MoE and OLMoE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.models.checkpoint import expected_shapes
from slipstream.models.config import ModelConfig

Linear = Callable[[Tensor, Tensor], Tensor]
"""(x_TD, weight_OD) -> x_TD @ weight_OD^T."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query [T, heads, head_dim], key [T, kv heads, head_dim], value likewise) -> [T, heads, head_dim]."""

RunExperts = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, x_TD, expert_ids_TK) -> each row's K experts, unweighted [T, K, D]."""


class LayerWeights(NamedTuple):
    """One layer, with the products that share an input stacked; a dense MLP is one expert without a router.

    `qkv` is [(heads + 2 kv heads) * head_dim, D]; `query_norm` and `key_norm` are as long as a head or as the whole
    projection (`ModelConfig.qk_norm`); `router` is [E, D]; `gate_up` holds E times [2 * inner, D], gate rows first;
    `down` E times [D, inner].
    """

    attention_norm: Tensor
    qkv: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_out: Tensor
    mlp_norm: Tensor
    router: Tensor | None
    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]


class DecoderWeights(NamedTuple):
    """A decoder ready to run: `rotary` is (cos, sin), each [max positions, head_dim] fp32."""

    config: ModelConfig
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Tensor
    rotary: tuple[Tensor, Tensor]


def arrange(
    config: ModelConfig, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = torch.float32
) -> DecoderWeights:
    """Stack named tensors for `decode`, converted to `dtype`; differentiable: training arranges its leaves every step.

    None keeps bf16 and fp32 as stored (what is stacked from both becomes fp32) and makes fp16, which is a format of
    files only, fp32. What need not be converted or stacked is shared with `weights`.
    """
    weights = {name: tensor.to(dtype or _kept_dtype(tensor)) for name, tensor in weights.items()}
    embedding = weights["model.embed_tokens.weight"]
    return DecoderWeights(
        config,
        embedding,
        tuple(_arrange_layer(config, weights, f"model.layers.{layer}.") for layer in range(config.num_layers)),
        weights["model.norm.weight"],
        embedding if config.ties_embeddings else weights["lm_head.weight"],
        rotary_tables(config),
    )


def _kept_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _arrange_layer(config: ModelConfig, weights: Mapping[str, Tensor], prefix: str) -> LayerWeights:
    mlps = [f"mlp.experts.{expert}." for expert in range(config.num_experts)] or ["mlp."]
    return LayerWeights(
        weights[prefix + "input_layernorm.weight"],
        torch.cat([weights[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]),
        weights.get(prefix + "self_attn.q_norm.weight"),
        weights.get(prefix + "self_attn.k_norm.weight"),
        weights[prefix + "self_attn.o_proj.weight"],
        weights[prefix + "post_attention_layernorm.weight"],
        weights.get(prefix + "mlp.gate.weight"),
        tuple(torch.cat([weights[f"{prefix}{mlp}{name}_proj.weight"] for name in ("gate", "up")]) for mlp in mlps),
        tuple(weights[f"{prefix}{mlp}down_proj.weight"] for mlp in mlps),
    )


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, [max positions, head_dim] each, fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(
        torch.arange(config.max_position_embeddings, dtype=torch.float64), config.rope_theta**-exponents
    )
    both_halves = torch.cat([angles, angles], dim=-1)
    return both_halves.cos().float(), both_halves.sin().float()


def decode(
    decoder: DecoderWeights,
    ids_T: Tensor,
    positions_T: Tensor,
    *,
    attend: Attend,
    linear: Linear = functional.linear,
    run_experts: RunExperts | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Final normalised hidden states [T, D], and the experts used, [T, L, K] int64 (None for a dense model).

    `ids_T` and `positions_T` are integers. Experts stand best first, ties in order of their ids. `run_experts` may
    compute the chosen experts in another way (with static shapes, say); routing and the order of the weighted sum stay
    here. The default `linear` is for fp32 weights.
    """
    config = decoder.config
    cos_Td, sin_Td = (table[positions_T].unsqueeze(1) for table in decoder.rotary)
    x_TD = decoder.embedding[ids_T].to(torch.promote_types(decoder.embedding.dtype, torch.float32))
    experts: list[Tensor] = []
    for index, layer in enumerate(decoder.layers):
        query, key, value = _project(_norm(x_TD, layer.attention_norm, config), layer, config, linear)
        attended = attend(index, _rotate(query, cos_Td, sin_Td), _rotate(key, cos_Td, sin_Td), value)
        x_TD = x_TD + linear(attended.flatten(1), layer.attention_out)
        mlp_in = _norm(x_TD, layer.mlp_norm, config)
        if layer.router is None:
            x_TD = x_TD + _mlp(mlp_in, layer.gate_up[0], layer.down[0], linear)
        else:
            run = partial(run_experts, index) if run_experts else partial(_run_each, layer, linear)
            weights_TK, expert_ids_TK = route(linear(mlp_in, layer.router), config)
            x_TD = x_TD + _weighted_sum(weights_TK, run(mlp_in, expert_ids_TK))
            experts.append(expert_ids_TK)
    return _norm(x_TD, decoder.final_norm, config), torch.stack(experts, dim=1) if experts else None


def logits_of(decoder: DecoderWeights, hidden_TD: Tensor, linear: Linear = functional.linear) -> Tensor:
    """Logits [T, V], fp32, of final hidden states."""
    return linear(hidden_TD, decoder.head)


def causal_decode(
    decoder: DecoderWeights, ids_BT: Tensor, *, linear: Linear = functional.linear
) -> tuple[Tensor, Tensor | None]:
    """What `decode` returns, for whole sequences laid end to end (B * T rows); differentiable in the decoder's weights.

    `ids_BT` is int64; what is padded on the right does not reach what stands before it.
    """
    num_sequences, length = ids_BT.shape

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(0, (num_sequences, length)).transpose(1, 2) for x in (query, key, value))
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    positions = torch.arange(length, device=ids_BT.device).repeat(num_sequences)
    return decode(decoder, ids_BT.flatten(), positions, attend=attend, linear=linear)


def causal_logits(config: ModelConfig, weights: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of whole sequences (`causal_decode`); index i predicts token i + 1."""
    decoder = arrange(config, weights)
    return logits_of(decoder, causal_decode(decoder, ids_BT)[0]).view(*ids_BT.shape, -1)


def initial_draft(vocab_size: int, *, seed: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A fresh draft: a Llama of 2 layers and hidden size 192 (1.67 M parameters at a vocabulary of 4,096)."""
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_layers=2,
        num_heads=3,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        ties_embeddings=True,
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        for name, shape in expected_shapes(config)
    }
    return config, weights


def route(router_logits_TE: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Weights [T, K] fp32 and ids [T, K] int64 of each token's experts, best first, ties in order of their ids."""
    # A stable sort: which of equals topk takes is not defined.
    probs_TE, ids_TE = router_logits_TE.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    weights_TK = probs_TE[:, : config.experts_per_token]
    if config.normalizes_expert_weights:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK, ids_TE[:, : config.experts_per_token]


def _norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * weight


def _project(x_TD: Tensor, layer: LayerWeights, config: ModelConfig, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [T, heads, head_dim] before rotation, normalised as the family has it."""
    query_size, key_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    query, key, value = linear(x_TD, layer.qkv).split([query_size, key_size, key_size], dim=-1)
    if config.qk_norm == "whole":
        query, key = _norm_both(query, key, layer, config)
    query, key, value = (x.unflatten(-1, (-1, config.head_dim)) for x in (query, key, value))
    if config.qk_norm == "per_head":
        query, key = _norm_both(query, key, layer, config)
    return query, key, value


def _norm_both(query: Tensor, key: Tensor, layer: LayerWeights, config: ModelConfig) -> tuple[Tensor, Tensor]:
    assert layer.query_norm is not None
    assert layer.key_norm is not None
    return _norm(query, layer.query_norm, config), _norm(key, layer.key_norm, config)


def _rotate(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    first, second = x_THd.chunk(2, dim=-1)
    return x_THd * cos_Td + torch.cat([-second, first], dim=-1) * sin_Td


def _mlp(x_TD: Tensor, gate_up: Tensor, down: Tensor, linear: Linear) -> Tensor:
    gate, up = linear(x_TD, gate_up).chunk(2, dim=-1)
    return linear(functional.silu(gate) * up, down)


def _run_each(layer: LayerWeights, linear: Linear, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """The routed experts' outputs [T, K, D], expert by expert over the rows that chose it."""
    out_TKD = x_TD.new_zeros(*expert_ids_TK.shape, x_TD.shape[1])
    for expert in expert_ids_TK.unique().tolist():
        rows, ranks = (expert_ids_TK == expert).nonzero(as_tuple=True)
        out_TKD[rows, ranks] = _mlp(x_TD[rows], layer.gate_up[expert], layer.down[expert], linear)
    return out_TKD


def _weighted_sum(weights_TK: Tensor, out_TKD: Tensor) -> Tensor:
    """[T, D], best expert first: the order of the sum belongs to the row, not to the batch."""
    mixed_TD = weights_TK[:, :1] * out_TKD[:, 0]
    for rank in range(1, out_TKD.shape[1]):
        mixed_TD = mixed_TD + weights_TK[:, rank : rank + 1] * out_TKD[:, rank]
    return mixed_TD
