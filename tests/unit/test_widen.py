"""A widened checkpoint is the same function at a larger size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.reference import widen
from slipstream.errors import ConfigError
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.models.config import Family, read_config
from slipstream.models.decoder import arrange, causal_decode, causal_logits
from tests.families import FAMILIES, MOE_FAMILIES, SIZES, random_checkpoint

SHIPPED = Path(__file__).parents[2] / "deploy" / "models"
SHARED = Path(__file__).parents[3] / "shared" / "models"


def ids_of(checkpoint: Checkpoint, *, length: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(checkpoint.config.vocab_size, (2, length), generator=generator)


def largest_difference(checkpoint: Checkpoint, other: Checkpoint) -> float:
    with torch.inference_mode():
        logits, others = (causal_logits(one.config, one.weights, ids_of(checkpoint)) for one in (checkpoint, other))
    assert logits.std() > 0.3
    return float((logits - others).abs().max())


def directory_of(name: str) -> Path:
    directory = SHIPPED / name if (SHIPPED / name).is_dir() else SHARED / name
    if not directory.is_dir():
        pytest.skip(f"{name} is neither in {SHIPPED} nor in {SHARED}")
    return directory


@pytest.mark.parametrize("ties_embeddings", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_what_they_were(family: Family, size: str, ties_embeddings: bool, tmp_path: Path) -> None:
    narrow = load_checkpoint(random_checkpoint(family, tmp_path, size=size, ties_embeddings=ties_embeddings))
    wide = widen.widened(narrow, 4)
    assert wide.config.hidden_size == 4 * narrow.config.hidden_size
    assert wide.config.head_dim == narrow.config.head_dim
    assert largest_difference(narrow, wide) < 1e-4


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_tokens_go_to_the_same_experts(family: Family, tmp_path: Path) -> None:
    narrow = load_checkpoint(random_checkpoint(family, tmp_path))
    chosen = []
    for one in (narrow, widen.widened(narrow, 8)):
        chosen.append(causal_decode(arrange(one.config, one.weights), ids_of(narrow))[1])
    assert chosen[0] is not None
    assert torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
    ids=["fp32", "bf16", "fp16"],
)
def test_division_loses_no_bit(dtype: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    narrow = load_checkpoint(random_checkpoint("qwen3_moe", tmp_path, dtype=dtype))
    wide = widen.widened(narrow, 8)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert wide.weights[name].dtype == stored
    rows, columns = narrow.weights[name].shape
    assert torch.equal(wide.weights[name][-rows:, -columns:].float() * 8, narrow.weights[name].float())
    assert widen.widened(narrow, 1).digest == narrow.digest


@pytest.mark.parametrize("times", [0, -2, 3, 6])
def test_a_factor_that_does_not_divide_exactly_is_refused(times: int, tmp_path: Path) -> None:
    narrow = load_checkpoint(random_checkpoint("llama", tmp_path))
    with pytest.raises(ConfigError, match=f"times is {times}, expected a power of two"):
        widen.widened(narrow, times)


@pytest.mark.parametrize(
    ("name", "times", "millions"),
    [
        ("mix-moe-11m", 1, (10.5, 11.5)),
        ("mix-moe-11m", 4, (167.5, 168.5)),
        ("mix-moe-11m", 8, (660.0, 675.0)),
        ("mix-dense-6m", 8, (305.0, 315.0)),
    ],
)
def test_sizes_of_the_copies_that_are_measured(name: str, times: int, millions: tuple[float, float]) -> None:
    config = read_config(directory_of(name) / "config.json")
    assert millions[0] < widen.num_weights(widen.widened_config(config, times)) / 1e6 < millions[1]


@pytest.mark.parametrize(("name", "times"), [("stories260k", 8), ("tinystories-656k", 4), ("mix-moe-11m", 2)])
def test_trained_checkpoints_stay_what_they_were(name: str, times: int) -> None:
    narrow = load_checkpoint(directory_of(name))
    assert largest_difference(narrow, widen.widened(narrow, times)) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_transformers_computes_the_same_from_the_written_copy(family: Family, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = random_checkpoint(family, tmp_path / "narrow", dtype=torch.bfloat16)
    wide = widen.write_widened(source, tmp_path / "wide", 4)
    logits = []
    for directory in (source, tmp_path / "wide"):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.inference_mode():
            logits.append(model(ids_of(wide)).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_the_command_writes_a_directory_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = random_checkpoint("qwen3", tmp_path / "narrow", dtype=torch.bfloat16)
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling.py").write_text("raise SystemExit")
    destination = tmp_path / "wide"
    monkeypatch.setattr(sys, "argv", ["widen", str(source), str(destination), "--times", "2"])
    assert widen.main() == 0
    assert "hidden 64" in capsys.readouterr().out
    loaded = load_checkpoint(destination)
    assert loaded.digest == widen.widened(load_checkpoint(source), 2).digest
    assert json.loads((destination / "config.json").read_text())["dtype"] == "bfloat16"
    assert (destination / "tokenizer.json").read_text() == "{}"
    assert not list(destination.glob("*.py"))
    assert widen.main() == 2
    assert "exists" in capsys.readouterr().err
