"""The names tensors have in files, and the one naming they have in memory: that of Qwen3-MoE.

| stored                                                   | in memory                                       |
|----------------------------------------------------------|-------------------------------------------------|
| `block_sparse_moe.gate`, `.experts.N.w1 / w3 / w2`       | `mlp.gate`, `mlp.experts.N.gate / up / down_proj` |
| `mlp.experts.gate_up_proj` [E, 2I, D], gate rows first   | `mlp.experts.N.gate_proj`, `.up_proj`           |
| `mlp.experts.down_proj` [E, D, I]                        | `mlp.experts.N.down_proj`                       |
| `lm_head.weight`, where the embedding is tied            | `model.embed_tokens.weight`                     |
| `rotary_emb.inv_freq` (old writers stored this buffer)   | nothing: it follows from config.json            |

The first line is Mixtral's; the fused ones are what transformers 5 keeps in memory and some writers store as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from slipstream.errors import CheckpointError
from slipstream.models.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_MIXTRAL_EXPERT = re.compile(r"(model\.layers\.\d+\.)block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_MIXTRAL_ROUTER = re.compile(r"(model\.layers\.\d+\.)block_sparse_moe\.gate\.weight")
_OWN_EXPERT = re.compile(r"(model\.layers\.\d+\.)mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_OWN_ROUTER = re.compile(r"(model\.layers\.\d+\.)mlp\.gate\.weight")
_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up|down)_proj")
_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_TO_OWN = {"w1": "gate", "w2": "down", "w3": "up"}
_TO_MIXTRAL = {own: stored for stored, own in _TO_OWN.items()}


def in_memory(config: ModelConfig, stored: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Stored tensors under their names in memory; values untouched (slices of fused ones are views).

    Names of no known layout stay as they are, for the caller to refuse. Raises CheckpointError for a tensor given
    twice, a fused one of the wrong shape, or a tied head that differs from the embedding.
    """
    tensors: dict[str, Tensor] = {}
    for stored_name, tensor in stored:
        for name, part in _parts(config, stored_name, tensor):
            if name in tensors:
                raise CheckpointError(f"tensor {name} is stored twice, the second time as {stored_name}; remove one")
            tensors[name] = part
    if config.ties_embeddings and HEAD in tensors:
        head = tensors.pop(HEAD)
        embedding = tensors.setdefault(EMBEDDING, head)
        if not torch.equal(head, embedding):
            raise CheckpointError(
                f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; set it to false, or store one"
            )
    return tensors


def stored_name(config: ModelConfig, name: str) -> str:
    """The name under which every loader of the family looks for this tensor."""
    if config.family != "mixtral":
        return name
    if expert := _OWN_EXPERT.fullmatch(name):
        return f"{expert[1]}block_sparse_moe.experts.{expert[2]}.{_TO_MIXTRAL[expert[3]]}.weight"
    router = _OWN_ROUTER.fullmatch(name)
    return f"{router[1]}block_sparse_moe.gate.weight" if router else name


def _parts(config: ModelConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if fused := _FUSED.fullmatch(name):
        yield from _experts(config, name, tensor, prefix=fused[1], kind=fused[2])
    elif not _BUFFER.fullmatch(name):
        yield _own_name(config, name), tensor


def _own_name(config: ModelConfig, name: str) -> str:
    if config.family != "mixtral":
        return name
    if expert := _MIXTRAL_EXPERT.fullmatch(name):
        return f"{expert[1]}mlp.experts.{expert[2]}.{_TO_OWN[expert[3]]}_proj.weight"
    router = _MIXTRAL_ROUTER.fullmatch(name)
    return f"{router[1]}mlp.gate.weight" if router else name


def _experts(config: ModelConfig, name: str, tensor: Tensor, *, prefix: str, kind: str) -> Iterator[tuple[str, Tensor]]:
    inner = config.intermediate_size
    rows, columns = (2 * inner, config.hidden_size) if kind == "gate_up" else (config.hidden_size, inner)
    if tuple(tensor.shape) != (config.num_experts, rows, columns):
        raise CheckpointError(
            f"tensor {name} has shape {tuple(tensor.shape)}, config.json says {(config.num_experts, rows, columns)}"
        )
    for expert, weight in enumerate(tensor.unbind(0)):
        if kind == "down":
            yield f"{prefix}{expert}.down_proj.weight", weight
        else:
            yield f"{prefix}{expert}.gate_proj.weight", weight[:inner]
            yield f"{prefix}{expert}.up_proj.weight", weight[inner:]
