"""Our checkpoints as GGUF files of llama.cpp: Llama, Qwen3 and Qwen3-MoE, without a vocabulary.

`python -m benchmarks.peers.gguf_file CHECKPOINT_DIRECTORY FILE`. Token ids go in and out. Matrices stay bf16 bit by
bit, norms and the router are fp32 as llama.cpp's own converter stores them. llama.cpp rotates neighbouring pairs of a
Llama head where Hugging Face rotates its halves, so the rows of those queries and keys are reordered; the Qwen3
families rotate halves in both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import torch
from safetensors import safe_open
from torch import Tensor

from slipstream.errors import CheckpointError
from slipstream.models.config import ModelConfig, read_config

_ARCHITECTURES: Final = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}

_LAYER_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
}
_DENSE_NAMES: Final = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_EXPERT_NAMES: Final = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def write_gguf(source: Path, destination: Path) -> None:
    """Write the checkpoint in the directory `source` as one GGUF file.

    Raises CheckpointError for a family that llama.cpp does not run from these names, or a tensor that is missing.
    """
    config = read_config(source / "config.json")
    if config.family not in _ARCHITECTURES:
        raise CheckpointError(f"family is {config.family!r}; GGUF files are written for {sorted(_ARCHITECTURES)}")
    writer = gguf.GGUFWriter(str(destination), _ARCHITECTURES[config.family])
    _describe(writer, config)
    for name, tensor in _tensors(config, _reader(source)):
        _add(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: ModelConfig) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.experts_per_token)
        writer.add_expert_feed_forward_length(config.intermediate_size)


def _reader(source: Path) -> Callable[[str], Tensor]:
    """Reads one tensor by its Hugging Face name, from whichever file holds it."""
    files: list[Any] = [safe_open(path, framework="pt") for path in sorted(source.glob("*.safetensors"))]
    holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - a file is no mapping

    def read(name: str) -> Tensor:
        if name not in holders:
            raise CheckpointError(f"{source} has no tensor {name}; config.json and the weights do not belong together")
        tensor: Tensor = holders[name].get_tensor(name)
        return tensor

    return read


def _tensors(config: ModelConfig, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and tensors in order; one layer of experts is stacked at a time."""
    yield "token_embd.weight", read("model.embed_tokens.weight")
    yield "output_norm.weight", read("model.norm.weight")
    if not config.ties_embeddings:
        yield "output.weight", read("lm_head.weight")
    has_norms = config.qk_norm != "none"
    names = _LAYER_NAMES if has_norms else {k: v for k, v in _LAYER_NAMES.items() if "_norm" not in k[-6:]}
    if not config.num_experts:
        names = names | _DENSE_NAMES
    for layer in range(config.num_layers):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        for hugging_face, name in names.items():
            tensor = read(f"{prefix}{hugging_face}.weight")
            yield f"{block}{name}.weight", _rotated_pairwise(config, name, tensor)
        if config.num_experts:
            yield f"{block}ffn_gate_inp.weight", read(f"{prefix}mlp.gate.weight")
            for hugging_face, name in _EXPERT_NAMES.items():
                experts = [read(f"{prefix}mlp.experts.{e}.{hugging_face}.weight") for e in range(config.num_experts)]
                yield f"{block}{name}.weight", torch.stack(experts)


def _rotated_pairwise(config: ModelConfig, name: str, weight: Tensor) -> Tensor:
    """Rows of a Llama query or key matrix in the order that pairs neighbours; anything else as it is."""
    if config.family != "llama" or name not in ("attn_q", "attn_k"):
        return weight
    rows, columns = weight.shape
    halves = weight.view(rows // config.head_dim, 2, config.head_dim // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, tensor.float().numpy())
        return
    raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
