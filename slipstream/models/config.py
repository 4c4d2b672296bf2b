"""The architecture of a decoder, read from a Hugging Face `config.json`; anything unsupported is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from slipstream.errors import CheckpointError

Family = Literal["llama", "qwen3", "qwen3_moe"]

_ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}

# Fields that change what the decoder computes, with the only value this decoder computes.
_REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_scaling": None,
    "use_sliding_window": False,
}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and switches of a decoder.

    `intermediate_size` is the inner size of the dense MLP, or of one expert. `num_experts` 0 means dense.
    `eos_token_ids` end a generation.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    ties_embeddings: bool
    num_experts: int = 0
    experts_per_token: int = 0
    normalizes_expert_weights: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head before rotation."""
        return self.family != "llama"


def read_config(path: Path) -> ModelConfig:
    """The architecture in this `config.json`.

    Raises CheckpointError naming the field, the value seen and the value supported.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; expected a Hugging Face checkpoint directory"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    try:
        return _from_hugging_face(fields)
    except KeyError as error:
        raise CheckpointError(f"{path}: field {error} is missing") from error
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _from_hugging_face(fields: dict[str, Any]) -> ModelConfig:
    architectures = fields.get("architectures") or [None]
    family = _ARCHITECTURES.get(architectures[0])
    if family is None:
        raise ValueError(f"architectures is {architectures}, supported are {sorted(_ARCHITECTURES)}")
    for name, value in _REQUIRED_VALUES.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} is {fields[name]!r}, only {value!r} is supported")
    rope = fields.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']!r}, only 'default' is supported")
    is_moe = family == "qwen3_moe"
    num_heads = fields["num_attention_heads"]
    return msgspec.convert(
        {
            "family": family,
            "vocab_size": fields["vocab_size"],
            "hidden_size": fields["hidden_size"],
            "intermediate_size": fields["moe_intermediate_size" if is_moe else "intermediate_size"],
            "num_layers": fields["num_hidden_layers"],
            "num_heads": num_heads,
            "num_kv_heads": fields.get("num_key_value_heads") or num_heads,
            "head_dim": fields.get("head_dim") or fields["hidden_size"] // num_heads,
            "max_position_embeddings": fields["max_position_embeddings"],
            "rms_norm_eps": float(fields["rms_norm_eps"]),
            "rope_theta": float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0),
            "ties_embeddings": bool(fields.get("tie_word_embeddings", False)),
            "num_experts": fields["num_experts"] if is_moe else 0,
            "experts_per_token": fields["num_experts_per_tok"] if is_moe else 0,
            "normalizes_expert_weights": bool(fields.get("norm_topk_prob", False)),
            "eos_token_ids": _as_ids(fields.get("eos_token_id")),
        },
        ModelConfig,
    )


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json` that any loader of the family reads.

    Written are drafts (`llama`) and reference targets (`qwen3_moe`); ValueError for another family.
    """
    if config.family not in ("llama", "qwen3_moe"):
        raise ValueError(f"family is {config.family!r}; only 'llama' and 'qwen3_moe' are written")
    architecture = next(name for name, family in _ARCHITECTURES.items() if family == config.family)
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.ties_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": list(config.eos_token_ids) or None,
    } | (_moe_fields(config) if config.family == "qwen3_moe" else {})


def _moe_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalizes_expert_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
