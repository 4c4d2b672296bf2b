"""Widen a checkpoint without changing what it computes: `python -m benchmarks.reference.widen SOURCE DESTINATION`.

A small target is so small that what an engine does around the model weighs more than in life. A widened copy is the
same function (logits, routing, text) at a larger size, so speeds at several sizes compare under the same prompts and
the same draft. Of the hidden size, the number of query and of key/value heads and the inner size there are K times as
many; head size, the norms of queries and keys per head, the number of experts and how many are chosen stay.

Every hidden vector is K copies of the narrow one. A product then sums each term K times, so its matrix is tiled K x K
and divided by K, exactly, because K is a power of two. Norms see the same mean square and are repeated undivided, and
so are embeddings; the head, which sums but is not tiled along its outputs, is divided by K, or, where it is the
embedding, the final norm is. The weights are K * K times as many, save embedding and head: K times.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from slipstream.errors import CheckpointError, ConfigError
from slipstream.models.checkpoint import (
    Checkpoint,
    checkpoint_digest,
    expected_shapes,
    load_checkpoint,
    save_checkpoint,
)
from slipstream.models.config import ModelConfig
from slipstream.models.layouts import EMBEDDING

_COPIED = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
)
"""Files beside the weights that are the same at every size."""


def widened(checkpoint: Checkpoint, times: int) -> Checkpoint:
    """The same function with `times` as many hidden units, heads and inner units; `checkpoint` stays as it is.

    bf16 and fp32 weights keep their dtype, fp16 becomes fp32 (its small values cannot be divided exactly). Raises
    ConfigError unless `times` is a power of two.
    """
    config = widened_config(checkpoint.config, times)
    weights = dict(_widened_weights(config, checkpoint.weights, times))
    return Checkpoint(config, weights, checkpoint_digest(config, weights))


def widened_config(config: ModelConfig, times: int) -> ModelConfig:
    """The architecture of the widened copy; raises ConfigError unless `times` is a power of two."""
    if times < 1 or times & (times - 1):
        raise ConfigError(f"times is {times}, expected a power of two: others do not divide exactly")
    return msgspec.structs.replace(
        config,
        hidden_size=config.hidden_size * times,
        intermediate_size=config.intermediate_size * times,
        num_heads=config.num_heads * times,
        num_kv_heads=config.num_kv_heads * times,
    )


def num_weights(config: ModelConfig) -> int:
    """How many numbers a checkpoint of this architecture stores."""
    return sum(torch.Size(shape).numel() for _, shape in expected_shapes(config))


def _widened_weights(config: ModelConfig, weights: Mapping[str, Tensor], times: int) -> Iterator[tuple[str, Tensor]]:
    for name, shape in expected_shapes(config):
        narrow = weights[name].float() if weights[name].dtype == torch.float16 else weights[name]
        repeats = [wide // size for wide, size in zip(shape, narrow.shape, strict=True)]
        # A matrix sums over its columns; the embedding is a table of rows, of which one is taken.
        is_divided = narrow.dim() > 1 and name != EMBEDDING
        if name == "model.norm.weight":
            is_divided = config.ties_embeddings
        tiled = narrow.repeat(repeats)
        yield name, tiled.div_(times) if is_divided else tiled


def write_widened(source: Path, destination: Path, times: int) -> Checkpoint:
    """Write the widened copy of a checkpoint directory, tokenizer files included, and return it.

    Raises ConfigError for a destination that exists, CheckpointError for a source that cannot be loaded.
    """
    if destination.exists():
        raise ConfigError(f"{destination} exists; name a directory that is to be made")
    wide = widened(load_checkpoint(source), times)
    save_checkpoint(destination, wide.config, wide.weights, dtype=None)
    for pattern in _COPIED:
        for path in source.glob(pattern):
            shutil.copyfile(path, destination / path.name)
    return wide


def main() -> int:
    """Write the copy and print its size; returns the exit code (2: what was asked for cannot be done)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Hugging Face directory with config.json and safetensors")
    parser.add_argument("destination", type=Path, help="directory to make")
    parser.add_argument("--times", type=int, required=True, metavar="K", help="how many times as wide: a power of two")
    arguments = parser.parse_args()
    try:
        wide = write_widened(arguments.source, arguments.destination, arguments.times)
    except (CheckpointError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.destination}: {num_weights(wide.config) / 1e6:.1f} M weights, hidden {wide.config.hidden_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
