"""Held-out losses of a checkpoint on the sets of the mix: `python -m benchmarks.reference.evaluate DIRECTORY`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.reference.corpus import QUERIES, TokenSequence, load_tokenizer, read_corpus
from benchmarks.reference.objective import HeldOutLoss, held_out_loss
from benchmarks.report import Table
from slipstream.errors import CheckpointError, ConfigError
from slipstream.models.checkpoint import load_checkpoint
from slipstream.models.config import ModelConfig


def evaluate(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    held_out: Mapping[str, Sequence[TokenSequence]],
    *,
    device: torch.device,
) -> dict[str, HeldOutLoss]:
    """Held-out losses per set."""
    return {name: held_out_loss(config, weights, sequences, device=device) for name, sequences in held_out.items()}


def loss_table(columns: Mapping[str, Mapping[str, HeldOutLoss]]) -> Table:
    """One row a set and kind of loss, one column a model; nats a token."""
    rows = []
    for kind in HeldOutLoss.__struct_fields__:
        for name in next(iter(columns.values())):
            values = (f"{getattr(losses[name], kind):.2f}" for losses in columns.values())
            rows.append((name, kind.replace("_", " "), *values))
    return Table(columns=("held-out records", "loss on", *columns), rows=tuple(rows))


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> int:
    """Print the table of a checkpoint directory; returns the exit code (2: something cannot be read)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="Hugging Face directory with config.json, weights, tokenizer.json")
    parser.add_argument("--data", type=Path, default=QUERIES, metavar="DIRECTORY", help="query sets, NAME.jsonl.gz")
    arguments = parser.parse_args()
    try:
        checkpoint = load_checkpoint(arguments.directory)
        tokenizer = load_tokenizer(arguments.directory / "tokenizer.json")
        corpus = read_corpus(arguments.data, tokenizer, most_records=1)
    except (CheckpointError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    device = pick_device()
    weights = {name: tensor.to(device, torch.float32) for name, tensor in checkpoint.weights.items()}
    losses = evaluate(checkpoint.config, weights, corpus.held_out, device=device)
    print(loss_table({arguments.directory.resolve().name: losses}).as_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
