"""The architecture of a decoder, read from a Hugging Face `config.json`; anything unsupported is refused by name.

The families are one decoder with named differences:

| family    | query / key norm | MLP                                                     |
|-----------|------------------|---------------------------------------------------------|
| llama     | none             | dense                                                   |
| qwen3     | per head         | dense                                                   |
| mixtral   | none             | experts, the weights of the chosen ones always sum to 1 |
| qwen3_moe | per head         | experts, `norm_topk_prob` says                          |
| olmoe     | whole projection | experts, `norm_topk_prob` says                          |

Code that a checkpoint brings (`auto_map`) is never executed, whatever its config asks for: an architecture is one of
these or it is refused. Source: the configuration and modelling files of the five families in Hugging Face transformers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import msgspec

from slipstream.errors import CheckpointError

Family = Literal["llama", "qwen3", "mixtral", "qwen3_moe", "olmoe"]
QueryKeyNorm = Literal["none", "per_head", "whole"]

_ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
}

_MOE_FAMILIES: tuple[Family, ...] = ("mixtral", "qwen3_moe", "olmoe")

_QK_NORMS: dict[Family, QueryKeyNorm] = {"qwen3": "per_head", "qwen3_moe": "per_head", "olmoe": "whole"}

# Fields that change what a decoder computes (in these families, or in code written for them), with the values under
# which it computes what ours does. A field that is absent has the first of them.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (None,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "logit_scale": (1.0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}

# Where a family fills in an absent field with something other than the rule of the others.
_ABSENT: dict[Family, dict[str, Any]] = {
    "qwen3": {"head_dim": 128, "num_key_value_heads": 32},
    "mixtral": {"num_key_value_heads": 8},
    "qwen3_moe": {"num_key_value_heads": 4},
}
_ABSENT_ROPE_THETA: dict[Family, float] = {"mixtral": 1_000_000.0}
_ROPE_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


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
    def qk_norm(self) -> QueryKeyNorm:
        """What queries and keys are normalised over before rotation: nothing, each head, or the whole projection.

        No field: the digest of a checkpoint covers the fields, and the family says it already.
        """
        return _QK_NORMS.get(self.family, "none")


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
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds a {type(fields).__name__}, expected an object of fields")
    try:
        config = _from_hugging_face(fields)
        _check_sizes(config)
    except KeyError as error:
        raise CheckpointError(f"{path}: field {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config


def _from_hugging_face(fields: dict[str, Any]) -> ModelConfig:
    family = _family(fields)
    _check_neutral(fields, family)
    fields = _ABSENT.get(family, {}) | fields
    hidden_size, num_heads = _size(fields, "hidden_size"), _size(fields, "num_attention_heads")
    experts = _expert_fields(fields, family) if family in _MOE_FAMILIES else {}
    return ModelConfig(
        family=family,
        vocab_size=_size(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(fields, "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"),
        num_layers=_size(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_size({"num_key_value_heads": num_heads} | _given(fields), "num_key_value_heads"),
        head_dim=_size({"head_dim": hidden_size / num_heads} | _given(fields), "head_dim"),
        max_position_embeddings=_size(fields, "max_position_embeddings"),
        rms_norm_eps=_positive("rms_norm_eps", fields["rms_norm_eps"]),
        rope_theta=_rope_theta(fields, family),
        ties_embeddings=_claim(fields, "tie_word_embeddings"),
        eos_token_ids=_as_ids(fields.get("eos_token_id")),
        **experts,
    )


def _family(fields: dict[str, Any]) -> Family:
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in _ARCHITECTURES:
        raise ValueError(f"architectures is {architectures!r}, supported is one of {sorted(_ARCHITECTURES)}")
    family = _ARCHITECTURES[architectures[0]]
    if fields.get("model_type", family) != family:
        raise ValueError(f"model_type is {fields['model_type']!r}, {architectures[0]} has {family!r}")
    return family


def _check_neutral(fields: dict[str, Any], family: Family) -> None:
    for name, neutral in _NEUTRAL_VALUES.items():
        _check_one_of(name, fields.get(name, neutral[0]), neutral)
    if family not in ("qwen3", "qwen3_moe"):  # these two look at it only under use_sliding_window
        _check_one_of("sliding_window", fields.get("sliding_window"), (None,))
    for kind in fields.get("layer_types") or ():
        _check_one_of("layer_types", kind, ("full_attention",))


def _rope_theta(fields: dict[str, Any], family: Family) -> float:
    """The base of the rotary embedding, wherever it stands; ValueError for one that is scaled, or for two values."""
    thetas = {_positive("rope_theta", fields["rope_theta"])} if fields.get("rope_theta") is not None else set()
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name) or {}
        if not isinstance(rope, dict) or not rope.keys() <= _ROPE_FIELDS:
            raise ValueError(f"{name} is {rope!r}, only rope_theta and rope_type 'default' are supported")
        for kind in ("rope_type", "type"):
            _check_one_of(f"{name}.{kind}", rope.get(kind, "default"), ("default",))
        _check_one_of(f"{name}.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0, None))
        thetas |= {_positive(f"{name}.rope_theta", rope["rope_theta"])} if rope.get("rope_theta") is not None else set()
    if len(thetas) > 1:
        raise ValueError(f"rope_theta is given as {sorted(thetas)}, expected one value")
    return thetas.pop() if thetas else _ABSENT_ROPE_THETA.get(family, 10_000.0)


def _expert_fields(fields: dict[str, Any], family: Family) -> dict[str, Any]:
    names = [name for name in ("num_experts", "num_local_experts") if fields.get(name) is not None]
    if not names:
        raise KeyError("num_local_experts" if family == "mixtral" else "num_experts")
    if len(names) == 2 and fields[names[0]] != fields[names[1]]:
        raise ValueError(f"num_experts is {fields[names[0]]!r}, num_local_experts is {fields[names[1]]!r}; which one?")
    return {
        "num_experts": _size(fields, names[0]),
        "experts_per_token": _size(fields, "num_experts_per_tok"),
        "normalizes_expert_weights": family == "mixtral" or _claim(fields, "norm_topk_prob"),
    }


def _check_sizes(config: ModelConfig) -> None:
    """Sizes that have to fit each other; ValueError for those that do not."""
    if config.head_dim % 2:
        raise ValueError(f"head_dim is {config.head_dim}, only even ones are supported (rotation pairs up components)")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_key_value_heads is {config.num_kv_heads}, expected a divisor of num_attention_heads, "
            f"which is {config.num_heads}"
        )
    if config.experts_per_token > config.num_experts:
        raise ValueError(f"num_experts_per_tok is {config.experts_per_token}, expected 1 to {config.num_experts}")
    if config.qk_norm == "whole" and config.num_heads * config.head_dim != config.hidden_size:
        raise ValueError(f"head_dim is {config.head_dim}, expected hidden_size / num_attention_heads")


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json` that any loader of the family reads."""
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
        # In both places: loaders from before and after the field moved.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.ties_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": list(config.eos_token_ids) or None,
    } | _moe_fields(config)


def _moe_fields(config: ModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {}
    counts: dict[str, Any] = {"num_experts_per_tok": config.experts_per_token}
    if config.family == "mixtral":
        return counts | {"num_local_experts": config.num_experts}
    fields = counts | {"num_experts": config.num_experts, "norm_topk_prob": config.normalizes_expert_weights}
    if config.family == "qwen3_moe":
        fields |= {"moe_intermediate_size": config.intermediate_size, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return fields


def _check_one_of(name: str, value: Any, supported: tuple[Any, ...]) -> None:
    # 1 == True in Python: a count is no claim.
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in supported):
        raise ValueError(f"{name} is {value!r}, only {supported[0]!r} is supported")


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _size(fields: dict[str, Any], name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0 or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number above 0")
    return int(value)


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a number above 0")
    return float(value)


def _claim(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected true or false")
    return value


def _as_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise ValueError(f"eos_token_id is {value!r}, expected a token id, a list of them, or null")
    return tuple(ids)
