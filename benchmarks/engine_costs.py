"""What a pass must read and compute, whoever computes it: the floors that measured times are put beside.

Counted are the matrices a pass reads once (attention, router, head, and per layer every expert that one of its tokens
goes to), the embedding's rows, and the keys and values of the context. Norms, activations and what is written are left
out: together below one per cent at the sizes measured.
"""

from __future__ import annotations

from slipstream.models.config import ModelConfig

BYTES_PER_WEIGHT = 2
BYTES_PER_CACHED = 4
"""Weights are bf16, keys and values in the cache fp32."""


def bytes_read(config: ModelConfig, *, num_tokens: int, experts_touched: float, context: int) -> float:
    """Bytes that a pass over `num_tokens` tokens reads after `context` positions.

    `experts_touched` is the mean number of distinct experts in a layer; without meaning for a dense model.
    """
    mlps = experts_touched if config.num_experts else 1
    weights = config.num_layers * (_attention(config) + _router(config) + mlps * _mlp(config))
    weights += config.vocab_size * config.hidden_size + num_tokens * config.hidden_size
    cached = config.num_layers * context * 2 * config.num_kv_heads * config.head_dim
    return weights * BYTES_PER_WEIGHT + cached * BYTES_PER_CACHED


def multiply_adds(config: ModelConfig, *, num_tokens: int, context: int) -> float:
    """Multiply-adds of a pass over `num_tokens` tokens after `context` positions, logits of every token included."""
    mlps = config.experts_per_token if config.num_experts else 1
    per_token: float = config.num_layers * (_attention(config) + _router(config) + mlps * _mlp(config))
    per_token += config.vocab_size * config.hidden_size
    per_token += config.num_layers * 2 * config.num_heads * config.head_dim * (context + num_tokens / 2)
    return num_tokens * per_token


def _attention(config: ModelConfig) -> int:
    return 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)


def _router(config: ModelConfig) -> int:
    return config.num_experts * config.hidden_size


def _mlp(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.intermediate_size
