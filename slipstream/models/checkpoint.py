"""Checkpoints and their digests: safetensors only, every tensor checked by name and shape.

Two checkpoints have the same digest exactly if they compute the same function: the digest is over the architecture and
the tensors' names, shapes and fp32 values, so that bf16 on disk and fp32 in memory agree, and what a replica reports is
what it runs. Nothing in a directory is ever executed: no pickle, no code of a repository (`auto_map`,
`trust_remote_code`), only config.json and safetensors are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from slipstream.errors import ArtifactRejected, CheckpointError
from slipstream.models.config import ModelConfig, read_config, to_hugging_face
from slipstream.models.layouts import EMBEDDING, HEAD, in_memory, stored_name
from slipstream.models.shards import read_tensors, weight_files


class Checkpoint(msgspec.Struct, frozen=True):
    """A loaded decoder: `weights` under the names of `expected_shapes`, `digest` of exactly this config and these.

    The weights keep the dtypes they were stored in (bf16, fp16, fp32); `models.decoder.arrange` converts.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    digest: str


def load_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in a Hugging Face directory (config.json, *.safetensors), one file or shards with their index.

    Raises CheckpointError for a missing file, an unsupported field, or a missing, surplus or misshapen tensor.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; expected a Hugging Face checkpoint (config.json, weights)")
    config = read_config(directory / "config.json")
    mapped = in_memory(config, read_tensors(directory))
    _check_names_and_shapes(directory, dict(expected_shapes(config)), mapped)
    # Copies: what is served must not change, or end, with the file that was read.
    weights = {name: mapped[name].clone() for name in mapped}
    return Checkpoint(config, weights, checkpoint_digest(config, weights))


def save_checkpoint(
    directory: Path, config: ModelConfig, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = torch.bfloat16
) -> str:
    """Write config.json and model.safetensors in `dtype` (None: each tensor in its own); the digest of what it stored.

    Names are those of the family's Hugging Face files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().to(dtype or tensor.dtype).contiguous() for name, tensor in weights.items()}
    by_file_name = {stored_name(config, name): tensor for name, tensor in stored.items()}
    save_file(by_file_name, directory / "model.safetensors", metadata={"format": "pt"})
    fields = to_hugging_face(config) | {"dtype": str(stored[EMBEDDING].dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return checkpoint_digest(config, stored)


def checkpoint_digest(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the architecture, then names, shapes and fp32 values in order of names."""
    digest = hashlib.sha256(msgspec.json.encode(config))
    for name in sorted(weights):
        tensor = weights[name].detach().float().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def target_digest(directory: Path) -> str:
    """SHA-256 (hex) that names a target: its architecture, tokenizer and weight files, byte by byte."""
    digest = hashlib.sha256()
    for path in [directory / "config.json", directory / "tokenizer.json", *weight_files(directory)]:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror}; a target needs config.json, tokenizer.json and safetensors"
            ) from error
        digest.update(f"{path.name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def check_draft(checkpoint: Checkpoint, *, vocab_size: int) -> None:
    """Raise ArtifactRejected unless the draft speaks the target's vocabulary and all its weights are finite."""
    if checkpoint.config.vocab_size != vocab_size:
        raise ArtifactRejected(
            f"draft has a vocabulary of {checkpoint.config.vocab_size} tokens, the target {vocab_size}; "
            "train the draft on the target's tokenizer",
            reason="vocabulary",
        )
    for name, tensor in checkpoint.weights.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactRejected(
                f"tensor {name} holds values that are not finite; train this version again", reason="not_finite"
            )


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of this architecture: name (of Qwen3-MoE's Hugging Face files, whatever the family) and shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield EMBEDDING, (config.vocab_size, hidden)
    if not config.ties_embeddings:
        yield HEAD, (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (query, hidden)
        yield prefix + "self_attn.k_proj.weight", (key, hidden)
        yield prefix + "self_attn.v_proj.weight", (key, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, query)
        if config.qk_norm != "none":
            is_whole = config.qk_norm == "whole"
            yield prefix + "self_attn.q_norm.weight", (query if is_whole else config.head_dim,)
            yield prefix + "self_attn.k_norm.weight", (key if is_whole else config.head_dim,)
        if config.num_experts:
            yield prefix + "mlp.gate.weight", (config.num_experts, hidden)
        for mlp in _mlp_prefixes(config, prefix):
            yield mlp + "gate_proj.weight", (inner, hidden)
            yield mlp + "up_proj.weight", (inner, hidden)
            yield mlp + "down_proj.weight", (hidden, inner)


def _mlp_prefixes(config: ModelConfig, layer_prefix: str) -> list[str]:
    if not config.num_experts:
        return [layer_prefix + "mlp."]
    return [f"{layer_prefix}mlp.experts.{expert}." for expert in range(config.num_experts)]


def _check_names_and_shapes(directory: Path, shapes: dict[str, tuple[int, ...]], weights: dict[str, Tensor]) -> None:
    missing, surplus = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or surplus:
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors are missing {missing[:3]}, {len(surplus)} are surplus {surplus[:3]}; "
            "config.json and the weights do not belong together"
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"{directory}: tensor {name} has shape {tuple(weights[name].shape)}, config.json says {shape}"
            )
