"""The decoder of every family computes what transformers computes from the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slipstream.models.checkpoint import load_checkpoint, save_checkpoint
from slipstream.models.config import Family, ModelConfig
from slipstream.models.decoder import arrange, causal_logits, route
from tests.families import FAMILIES, MAX_POSITIONS, MOE_FAMILIES, SIZES, VOCAB_SIZE, random_checkpoint

SHARED = Path(__file__).parents[3] / "shared" / "models"
SHIPPED = Path(__file__).parents[2] / "deploy" / "models"
TOLERANCE = 1e-4


def reference_logits(directory: Path, ids_BT: Tensor) -> Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        experts_implementation="eager",  # its grouped product does not take inner sizes that are odd
    )
    with torch.inference_mode():
        logits: Tensor = model(ids_BT).logits
    return logits


def own_logits(directory: Path, ids_BT: Tensor) -> Tensor:
    checkpoint = load_checkpoint(directory)
    with torch.inference_mode():
        return causal_logits(checkpoint.config, checkpoint.weights, ids_BT)


def random_ids(vocab_size: int, *, length: int) -> Tensor:
    return torch.randint(vocab_size, (3, length), generator=torch.Generator().manual_seed(1))


def largest_difference(directory: Path, *, length: int = 40) -> float:
    ids_BT = random_ids(load_checkpoint(directory).config.vocab_size, length=length)
    expected = reference_logits(directory, ids_BT)
    assert expected.std() > 0.3  # or nearly everything would be close
    return float((own_logits(directory, ids_BT) - expected).abs().max())


@pytest.mark.parametrize("ties_embeddings", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: Family, size: str, ties_embeddings: bool, tmp_path: Path) -> None:
    directory = random_checkpoint(family, tmp_path, size=size, ties_embeddings=ties_embeddings)
    assert largest_difference(directory) < TOLERANCE


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_logits_equal_transformers_where_expert_weights_are_not_normalised(family: Family, tmp_path: Path) -> None:
    directory = random_checkpoint(family, tmp_path, normalizes=False)
    assert load_checkpoint(directory).config.normalizes_expert_weights == (family == "mixtral")
    assert largest_difference(directory) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_weights_are_kept_as_stored_and_computed_with_in_fp32(
    family: Family, dtype: torch.dtype, tmp_path: Path
) -> None:
    directory = random_checkpoint(family, tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in load_checkpoint(directory).weights.values()} == {dtype}
    assert largest_difference(directory) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_one_file_are_the_same_checkpoint(family: Family, tmp_path: Path) -> None:
    whole = random_checkpoint(family, tmp_path / "whole")
    sharded = random_checkpoint(family, tmp_path / "sharded", shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert load_checkpoint(sharded).digest == load_checkpoint(whole).digest
    assert largest_difference(sharded) < TOLERANCE


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_fused_experts_are_read_too(family: Family, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = random_checkpoint(family, tmp_path / "each")
    fused = tmp_path / "fused"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(fused, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in stored_names(fused))
    assert load_checkpoint(fused).digest == load_checkpoint(directory).digest


@pytest.mark.parametrize("ties_embeddings", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_save_checkpoint_writes(family: Family, ties_embeddings: bool, tmp_path: Path) -> None:
    made = random_checkpoint(family, tmp_path / "made", size="wide_heads", ties_embeddings=ties_embeddings)
    checkpoint = load_checkpoint(made)
    written = tmp_path / "written"
    digest = save_checkpoint(written, checkpoint.config, checkpoint.weights, dtype=torch.float32)
    assert stored_names(written) == stored_names(made)
    loaded = load_checkpoint(written)
    assert (loaded.digest, loaded.config) == (checkpoint.digest, checkpoint.config)
    assert digest == checkpoint.digest
    ids_BT = random_ids(VOCAB_SIZE, length=20)
    assert torch.equal(reference_logits(written, ids_BT), reference_logits(made, ids_BT))


@pytest.mark.parametrize("is_old", [False, True], ids=["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotary_base_is_read_from_either_place(family: Family, is_old: bool, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    directory = random_checkpoint(family, tmp_path, rope_parameters=rope)
    if is_old:
        path = directory / "config.json"
        fields = json.loads(path.read_text())
        del fields["rope_parameters"]
        path.write_text(json.dumps(fields | {"rope_theta": 500.0, "rope_scaling": None}))
    assert load_checkpoint(directory).config.rope_theta == 500.0
    assert largest_difference(directory, length=MAX_POSITIONS) < TOLERANCE


@pytest.mark.parametrize("name", ["stories260k", "tinystories-656k", "mix-moe-11m", "mix-dense-6m"])
def test_logits_of_trained_checkpoints_equal_transformers(name: str) -> None:
    directory = SHIPPED / name if (SHIPPED / name).is_dir() else SHARED / name
    if not directory.is_dir():
        pytest.skip(f"{name} is neither in {SHIPPED} nor in {SHARED}")
    assert largest_difference(directory, length=200) < TOLERANCE


def test_experts_that_tie_are_taken_in_order_of_their_ids() -> None:
    config = moe_config(num_experts=64, experts_per_token=5)
    router_logits = torch.zeros(3, 64)
    router_logits[1, 40:] = 1.0
    router_logits[2, [7, 3, 60]] = torch.tensor([1.0, 1.0, 2.0])
    weights_TK, expert_ids_TK = route(router_logits, config)
    assert expert_ids_TK.tolist() == [[0, 1, 2, 3, 4], [40, 41, 42, 43, 44], [60, 3, 7, 0, 1]]
    assert torch.allclose(weights_TK.sum(-1), torch.ones(3))


def test_causal_logits_train_every_weight(tmp_path: Path) -> None:
    for family in FAMILIES:
        checkpoint = load_checkpoint(random_checkpoint(family, tmp_path / family))
        leaves = {name: tensor.requires_grad_() for name, tensor in checkpoint.weights.items()}
        causal_logits(checkpoint.config, leaves, random_ids(VOCAB_SIZE, length=60)).logsumexp(-1).sum().backward()
        assert not [name for name, leaf in leaves.items() if leaf.grad is None or not leaf.grad.abs().sum() > 0]


def test_arrange_converts_only_what_it_is_asked_to(tmp_path: Path) -> None:
    for dtype, kept in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        checkpoint = load_checkpoint(random_checkpoint("qwen3_moe", tmp_path / str(dtype), dtype=dtype))
        assert arranged_dtypes(checkpoint.config, checkpoint.weights, None) == {kept}
        assert arranged_dtypes(checkpoint.config, checkpoint.weights, torch.float32) == {torch.float32}
    shared = arrange(checkpoint.config, {name: one.float() for name, one in checkpoint.weights.items()})
    assert shared.head is not shared.embedding
    down = checkpoint.weights["model.layers.1.mlp.experts.2.down_proj.weight"].float()
    assert torch.equal(shared.layers[1].down[2], down)


def arranged_dtypes(config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype | None) -> set[torch.dtype]:
    decoder = arrange(config, weights, dtype=dtype)
    tensors = [decoder.embedding, decoder.final_norm, decoder.head]
    for layer in decoder.layers:
        for field in layer:
            tensors += field if isinstance(field, tuple) else [] if field is None else [field]
    return {tensor.dtype for tensor in tensors}


def moe_config(*, num_experts: int, experts_per_token: int) -> ModelConfig:
    return ModelConfig(
        family="mixtral",
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_position_embeddings=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        ties_embeddings=True,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        normalizes_expert_weights=True,
    )


def stored_names(directory: Path) -> set[str]:
    safetensors = pytest.importorskip("safetensors")
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names
