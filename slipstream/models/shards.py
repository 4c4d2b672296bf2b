"""The weight files of a checkpoint directory: one safetensors file, or shards with an index.

Safetensors only: other formats can hold code (pickles), and code that lies beside the weights is never imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slipstream.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, by name: the index's shards, else model.safetensors, else every safetensors.

    What else lies in the directory is not read (some repositories keep a second copy under another name). Raises
    CheckpointError where there is none, and for an index beside a single file, one that names no plain file of this
    directory, or a shard that is missing.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; expected a Hugging Face checkpoint (config.json, weights)")
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if index.is_file():
        if single.is_file():
            raise CheckpointError(f"{directory} has both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is stale")
        return _shards(directory, sorted(set(_weight_map(index).values())))
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        other = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".py"))
        raise CheckpointError(
            f"{directory} has no *.safetensors file{f' (but {other})' if other else ''}; pickles and code are never "
            "loaded: save the weights as safetensors"
        )
    return files


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor, name and values; they are views of the mapped file, so copy what is to outlive it.

    Raises CheckpointError for a file that is no safetensors, a dtype other than bf16, fp16 and fp32, a tensor that
    stands in two files, and shards that do not hold what the index says.
    """
    home: dict[str, str] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the file is no mapping
                    if name in home:
                        raise CheckpointError(f"tensor {name} stands in {home[name]} and in {path.name}; remove one")
                    home[name] = path.name
                    tensor = file.get_tensor(name)
                    if tensor.dtype not in _FLOATS:
                        raise CheckpointError(f"{path}: tensor {name} is {tensor.dtype}, expected bf16, fp16 or fp32")
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    _check_index(directory / INDEX_FILE, home)


def _check_index(index: Path, home: dict[str, str]) -> None:
    promised = _weight_map(index) if index.is_file() else home
    wrong = sorted(name for name in promised.keys() | home.keys() if promised.get(name) != home.get(name))
    if wrong:
        raise CheckpointError(
            f"{index} puts {wrong[0]} into {promised.get(wrong[0])}, it stands in {home.get(wrong[0])}; {len(wrong)} "
            "tensors differ: fetch index and shards anew"
        )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = list(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}); expected an object weight_map") from error
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names the shard {name!r}, expected a *.safetensors file beside it")
    return {str(tensor): shard for tensor, shard in weight_map.items()}


def _shards(directory: Path, names: list[str]) -> list[Path]:
    missing = [name for name in names if not (directory / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{directory}: {len(missing)} of the {len(names)} shards of {INDEX_FILE} are missing, {missing[:3]}; "
            "fetch them"
        )
    return [directory / name for name in names]
