"""What a checkpoint directory may hold, and how everything else is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream.errors import CheckpointError
from slipstream.models.checkpoint import (
    Checkpoint,
    checkpoint_digest,
    expected_shapes,
    load_checkpoint,
    save_checkpoint,
    target_digest,
)
from slipstream.models.config import Family, ModelConfig, read_config, to_hugging_face
from slipstream.models.shards import INDEX_FILE

MODELS = Path(__file__).parents[2] / "deploy" / "models"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTER = "model.layers.1.mlp.gate.weight"


def config_of(family: Family, *, ties_embeddings: bool = False) -> ModelConfig:
    is_moe = family in ("mixtral", "qwen3_moe", "olmoe")
    return ModelConfig(
        family=family,
        vocab_size=20,
        hidden_size=16,
        intermediate_size=12,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        ties_embeddings=ties_embeddings,
        num_experts=3 if is_moe else 0,
        experts_per_token=2 if is_moe else 0,
        normalizes_expert_weights=is_moe,
        eos_token_ids=(0,),
    )


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(config)}


def written(
    directory: Path, *, family: Family = "llama", ties_embeddings: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    config = config_of(family, ties_embeddings=ties_embeddings)
    save_checkpoint(directory, config, random_weights(config), dtype=dtype)
    return directory


def change_config(directory: Path, fields: Mapping[str, Any], *, remove: tuple[str, ...] = ()) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | dict(fields)
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in remove}))


def change_tensors(directory: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Set tensors of the single file, or remove them (None)."""
    tensors = load_file(directory / "model.safetensors") | dict(changes)
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / "model.safetensors")


def into_shards(directory: Path, *, num_shards: int = 3) -> Path:
    """Replace the single file by shards and their index; returns the index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::num_shards]}
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    index = directory / INDEX_FILE
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        (
            "llama",
            {"architectures": ["GemmaForCausalLM"]},
            "architectures is ['GemmaForCausalLM'], supported is one",
        ),
        ("llama", {"architectures": []}, "architectures is []"),
        ("llama", {"architectures": None}, "architectures is None"),
        ("llama", {"model_type": "mistral"}, "model_type is 'mistral', LlamaForCausalLM has 'llama'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is supported"),
        ("llama", {"attention_bias": True}, "attention_bias is True, only False"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"mlp_bias": 0}, "mlp_bias is 0"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is {'rope_type': 'llama3'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.type is 'linear', only 'default'"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_parameters is {'full_attention'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ("llama", {"rope_theta": 5.0}, "rope_theta is given as [5.0, 10000.0], expected one value"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096, only None"),
        ("llama", {"sliding_window": 8}, "sliding_window is 8"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is 'sliding_attention'"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, only None"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, only 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0], only []"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("llama", {"head_dim": 5}, "head_dim is 5, only even"),
        ("llama", {"head_dim": None, "hidden_size": 18}, "head_dim is 4.5, expected a whole number above 0"),
        ("olmoe", {"head_dim": 8}, "head_dim is 8, expected hidden_size / num_attention_heads"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of num_attention_heads"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads is 0, expected a whole number above 0"),
        ("llama", {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("llama", {"hidden_size": "16"}, "hidden_size is '16', expected a whole number"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
        ("llama", {"eos_token_id": ["a"]}, "eos_token_id is ['a']"),
        ("mixtral", {"num_experts_per_tok": 4}, "num_experts_per_tok is 4, expected 1 to 3"),
        ("olmoe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0, expected a whole number above 0"),
        ("qwen3_moe", {"num_local_experts": 4}, "num_experts is 3, num_local_experts is 4"),
    ],
)
def test_an_unsupported_field_is_refused_with_its_value(
    family: Family, fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    directory = written(tmp_path, family=family)
    load_checkpoint(directory)
    change_config(directory, fields)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(directory)
    assert words in str(refused.value)
    assert str(directory / "config.json") in str(refused.value)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_scaling": None, "attention_dropout": 0.1, "pretraining_tp": 2, "use_cache": False}),
        ("llama", {"rope_scaling": {"rope_type": "default"}}),
        ("qwen3", {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1}),
        ("qwen3", {"layer_types": ["full_attention", "full_attention"]}),
        ("mixtral", {"sliding_window": None, "router_jitter_noise": 0.1, "head_dim": None}),
        ("qwen3_moe", {"num_local_experts": 3, "mlp_only_layers": None, "intermediate_size": 77}),
        ("olmoe", {"clip_qkv": None}),
        ("llama", {"torch_dtype": "float16", "dtype": "bfloat16"}),
    ],
)
def test_fields_that_change_nothing_change_nothing(family: Family, fields: dict[str, Any], tmp_path: Path) -> None:
    directory = written(tmp_path, family=family)
    before = load_checkpoint(directory).digest
    change_config(directory, fields)
    assert load_checkpoint(directory).digest == before


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "rms_norm_eps", "num_experts", "num_experts_per_tok"])
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    directory = written(tmp_path, family="qwen3_moe")
    change_config(directory, {}, remove=(name,))
    with pytest.raises(CheckpointError, match=f"field '{name}' is missing"):
        load_checkpoint(directory)


@pytest.mark.parametrize("content", ["no json", "[1]", ""])
def test_a_config_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path / "config.json")


def test_absent_fields_have_the_family_s_own_values(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = to_hugging_face(config_of("llama"))
    for name in ("num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "tie_word_embeddings"):
        del fields[name]
    path.write_text(json.dumps(fields))
    llama = read_config(path)
    assert (llama.num_kv_heads, llama.head_dim, llama.rope_theta, llama.ties_embeddings) == (4, 4, 10000.0, False)
    path.write_text(json.dumps(fields | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"} | HEADS_32))
    assert read_config(path).head_dim == 128
    mixtral = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 2}
    path.write_text(json.dumps(fields | mixtral | HEADS_32 | {"hidden_size": 64, "num_experts_per_tok": 1}))
    assert (read_config(path).num_kv_heads, read_config(path).rope_theta) == (8, 1_000_000.0)


HEADS_32 = {"num_attention_heads": 32}


@pytest.mark.parametrize("family", ["llama", "mixtral", "olmoe"])
def test_tensors_are_checked_by_name_and_shape(family: Family, tmp_path: Path) -> None:
    directory = written(tmp_path, family=family)
    name = "model.layers.1.self_attn.k_proj.weight"
    right = load_file(directory / "model.safetensors")[name]
    for wrong, words in (
        ({name: None}, rf"1 tensors are missing \['{name}'\]"),
        ({name.replace("weight", "bias"): torch.zeros(8)}, "1 are surplus"),
        ({"model.layers.2.input_layernorm.weight": torch.zeros(16)}, "1 are surplus"),
        ({name: right.t().contiguous()}, rf"{name} has shape \(16, 8\), config.json says \(8, 16\)"),
        ({name: right.to(torch.float64)}, "float64, expected bf16, fp16 or fp32"),
        ({name: right.to(torch.int8)}, "int8, expected bf16, fp16 or fp32"),
    ):
        change_tensors(directory, wrong)
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(directory)
        change_tensors(directory, dict.fromkeys(wrong) | {name: right})
    load_checkpoint(directory)


def test_names_of_another_family_are_refused(tmp_path: Path) -> None:
    directory = written(tmp_path, family="qwen3_moe")
    router = load_file(directory / "model.safetensors")[ROUTER]
    change_tensors(directory, {ROUTER: None, ROUTER.replace("mlp", "block_sparse_moe"): router})
    with pytest.raises(CheckpointError, match=r"missing .*mlp\.gate.*surplus .*block_sparse_moe"):
        load_checkpoint(directory)


def test_an_expert_stored_alone_and_fused_is_refused(tmp_path: Path) -> None:
    directory = written(tmp_path, family="qwen3_moe")
    change_tensors(directory, {"model.layers.0.mlp.experts.down_proj": torch.zeros(3, 16, 12)})
    with pytest.raises(CheckpointError, match="stored twice"):
        load_checkpoint(directory)
    change_tensors(directory, {"model.layers.0.mlp.experts.down_proj": torch.zeros(3, 12, 16)})
    with pytest.raises(CheckpointError, match=r"shape \(3, 12, 16\), config.json says \(3, 16, 12\)"):
        load_checkpoint(directory)


def test_tied_weights_stand_under_either_name_or_both(tmp_path: Path) -> None:
    directory = written(tmp_path, ties_embeddings=True)
    before = load_checkpoint(directory)
    embedding = before.weights[EMBEDDING]
    for stored in ({HEAD: embedding}, {EMBEDDING: None}):
        change_tensors(directory, stored)
        loaded = load_checkpoint(directory)
        assert loaded.digest == before.digest
        assert HEAD not in loaded.weights
    other = embedding.clone()
    other[3, 3] += 1
    change_tensors(directory, {EMBEDDING: other})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        load_checkpoint(directory)
    change_config(directory, {"tie_word_embeddings": False})
    assert not torch.equal(load_checkpoint(directory).weights[EMBEDDING], embedding)


def test_an_untied_head_that_is_missing_is_an_error(tmp_path: Path) -> None:
    directory = written(tmp_path)
    change_tensors(directory, {HEAD: None})
    with pytest.raises(CheckpointError, match=r"missing \['lm_head\.weight'\]"):
        load_checkpoint(directory)


def test_rotary_buffers_of_old_files_are_ignored_by_their_exact_name(tmp_path: Path) -> None:
    directory = written(tmp_path)
    before = load_checkpoint(directory).digest
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    change_tensors(directory, {name: torch.ones(2), "model.rotary_emb.inv_freq": torch.ones(2)})
    assert load_checkpoint(directory).digest == before
    change_tensors(directory, {"model.layers.1.rotary_emb.inv_freq": torch.ones(2)})
    with pytest.raises(CheckpointError, match="1 are surplus"):
        load_checkpoint(directory)


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    directory = written(tmp_path, family="mixtral")
    before = load_checkpoint(directory).digest
    (directory / "tokenizer.json").write_text("{}")
    into_shards(directory)
    save_file({"tok_embeddings.weight": torch.ones(3)}, directory / "consolidated.safetensors")
    assert load_checkpoint(directory).digest == before
    whole = target_digest(directory)
    change_shard(directory / "model-00002-of-00003.safetensors")
    assert load_checkpoint(directory).digest != before
    assert target_digest(directory) != whole


def change_shard(path: Path) -> None:
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] + 1}, path)


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    directory = written(tmp_path)
    index = into_shards(directory)
    right = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(right.values()))[:2]
    moved = next(name for name, shard in right.items() if shard == first)
    for weight_map, words in (
        (right | {"extra": "gone.safetensors"}, r"1 of the 4 shards .* are missing, \['gone\.safetensors'\]"),
        (right | {"extra": first}, f"puts extra into {first}, it stands in None"),
        (right | {moved: second}, f"puts {moved} into {second}, it stands in {first}"),
        ({name: shard for name, shard in right.items() if name != moved}, f"puts {moved} into None"),
        (right | {"extra": "../elsewhere.safetensors"}, "names the shard"),
        (right | {"extra": "model.bin"}, "names the shard 'model.bin'"),
        ([], "is no index of shards"),
        ({}, "0 shards"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(directory)
    index.write_text("not json")
    with pytest.raises(CheckpointError, match="is no index of shards"):
        load_checkpoint(directory)


@pytest.mark.parametrize("has_index", [True, False])
def test_a_tensor_in_two_shards_is_an_error(has_index: bool, tmp_path: Path) -> None:
    directory = written(tmp_path)
    index = into_shards(directory)
    if not has_index:
        index.unlink()
    load_checkpoint(directory)
    second = directory / "model-00002-of-00003.safetensors"
    again = load_file(directory / "model-00001-of-00003.safetensors")
    save_file(load_file(second) | again, second)
    with pytest.raises(CheckpointError, match=r"stands in model-00001-of-00003\.safetensors and in"):
        load_checkpoint(directory)


def test_a_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    directory = written(tmp_path)
    weights = (directory / "model.safetensors").read_bytes()
    into_shards(directory)
    (directory / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="has both"):
        load_checkpoint(directory)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    directory = written(tmp_path)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "modeling_own.py").write_text("")
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file \(but \['modeling_own\.py', 'pytorch"):
        load_checkpoint(directory)


def test_code_that_a_checkpoint_brings_is_never_executed(tmp_path: Path) -> None:
    directory = written(tmp_path)
    before = load_checkpoint(directory).digest
    marker = tmp_path / "executed"
    (directory / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Model: ...\n")
    change_config(directory, {"auto_map": {"AutoModelForCausalLM": "modeling_own.Model"}, "trust_remote_code": True})
    assert load_checkpoint(directory).digest == before
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04junk", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    directory = written(tmp_path)
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_checkpoint(directory)


def test_a_loaded_checkpoint_does_not_change_with_its_file(tmp_path: Path) -> None:
    directory = written(tmp_path)
    loaded = load_checkpoint(directory)
    path = directory / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\0" * 4096)
    assert load_checkpoint(directory).digest != loaded.digest
    assert checkpoint_digest(loaded.config, loaded.weights) == loaded.digest


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_is_what_is_loaded(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    config = config_of(family, ties_embeddings=True)
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(config).items()}
    digest = save_checkpoint(tmp_path, config, weights, dtype=None)
    loaded = load_checkpoint(tmp_path)
    assert (loaded.config, loaded.digest) == (config, digest)
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in weights.items())
    as_fp32 = {name: tensor.float() for name, tensor in weights.items()}
    assert checkpoint_digest(config, as_fp32) == digest


def test_digests_stay_what_they_were_when_versions_were_registered_under_them() -> None:
    assert {path.name: loaded(path.name).digest for path in MODELS.iterdir() if path.is_dir()} == {
        "draft-2m-general": "be19a3cdb33e3d1e563751f19129057d4ccb18f6886730f63cda38e15a46db8c",
        "draft-2m-sibling": "5bfddf8e9835923e472ea6174a004d24d7890ded574418d18800b4c3ba96fa6f",
        "mix-moe-11m": "cf47e0d665f49c0f23f6a049782a4a308a9a2e32e78de6eebb0fb6cd92e12a68",
    }


def loaded(name: str) -> Checkpoint:
    return load_checkpoint(MODELS / name)
