"""Random tiny checkpoints of every served family, made and written by transformers: the same files people serve.

`random_checkpoint` needs transformers and skips the test that asks for one where it is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from slipstream.models.config import Family

FAMILIES: tuple[Family, ...] = get_args(Family)
MOE_FAMILIES: tuple[Family, ...] = ("mixtral", "qwen3_moe", "olmoe")
VOCAB_SIZE = 96
MAX_POSITIONS = 128

SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
    "odd": {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 37},
    "single_head": {"hidden_size": 24, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 64},
    "wide_heads": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 20},
}
"""Named sizes: hidden, heads, key/value heads, inner (of the MLP, or of one expert)."""

_CONFIG_CLASSES: dict[Family, str] = {
    "llama": "LlamaConfig",
    "qwen3": "Qwen3Config",
    "mixtral": "MixtralConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "olmoe": "OlmoeConfig",
}


def random_checkpoint(
    family: Family,
    directory: Path,
    *,
    size: str = "small",
    ties_embeddings: bool = False,
    normalizes: bool = True,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Write a random checkpoint of two layers and return its directory.

    Every weight is random, norm weights too, at a scale that makes logits differ by several units. `size` names an
    entry of SIZES; the head size is 32 for "wide_heads" (twice the usual, where the family allows it), else hidden /
    heads. `normalizes` is `norm_topk_prob` where the family has it; Mixtral always normalises. `shard_size` ("20KB")
    makes transformers write shards and an index. `fields` overwrite fields of the config.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = getattr(transformers, _CONFIG_CLASSES[family])(
        **_fields(family, size, normalizes) | {"tie_word_embeddings": ties_embeddings} | fields
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.normal_(1.0, 0.3)
            else:
                weight.normal_(0.0, weight.shape[-1] ** -0.5)
    options = {} if shard_size is None else {"max_shard_size": shard_size}
    model.to(dtype).save_pretrained(directory, **options)
    return directory


def _fields(family: Family, size: str, normalizes: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 0,
        **SIZES[size],
    }
    if family != "olmoe":  # its query norm is as wide as the hidden size
        fields["head_dim"] = 32 if size == "wide_heads" else fields["hidden_size"] // fields["num_attention_heads"]
    if family == "qwen3_moe":
        # The size of dense layers, of which there is none: another number, so that reading it would be noticed.
        fields |= {"moe_intermediate_size": fields["intermediate_size"], "intermediate_size": 56}
    if family in MOE_FAMILIES:
        fields |= {"num_local_experts" if family == "mixtral" else "num_experts": 6, "num_experts_per_tok": 3}
        fields |= {} if family == "mixtral" else {"norm_topk_prob": normalizes}
    return fields
