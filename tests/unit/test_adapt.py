"""What drafts are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.adapt import with_layers
from slipstream.models.checkpoint import load_checkpoint
from slipstream.models.config import Family
from slipstream.models.decoder import causal_logits
from tests.families import random_checkpoint


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_checkpoint_without_a_layer_that_adds_nothing_says_the_same(family: Family, tmp_path: Path) -> None:
    whole = load_checkpoint(random_checkpoint(family, tmp_path, num_hidden_layers=3))
    for name, tensor in whole.weights.items():
        if name.startswith("model.layers.1.") and ("o_proj" in name or "down_proj" in name):
            tensor.zero_()
    pruned = with_layers(whole, (0, 2))
    ids = torch.arange(20).unsqueeze(0)
    assert pruned.config.num_layers == 2
    assert len(pruned.weights) < len(whole.weights)
    logits, expected = (causal_logits(one.config, one.weights, ids) for one in (pruned, whole))
    assert torch.equal(logits, expected)
    assert not torch.equal(causal_logits(pruned.config, with_layers(whole, (0, 1)).weights, ids), expected)


def test_all_layers_are_kept_if_none_are_named(tmp_path: Path) -> None:
    whole = load_checkpoint(random_checkpoint("qwen3", tmp_path))
    assert with_layers(whole, ()) is whole
    assert with_layers(whole, (0, 1)).digest == whole.digest
