"""A Token Recycling matrix as a version: config.json and model.safetensors in a directory, named by a digest.

A new replica that starts from one drafts as well as the replica that wrote it. What is read is checked whole before it
is used: an id outside the vocabulary would be read from outside the matrix.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from slipstream.errors import ArtifactRejected
from slipstream_kernels.adjacency import WIDTH, Adjacency, empty_adjacency, remember, vocab_size_of

_CONFIG, _TENSORS = "config.json", "model.safetensors"


class MatrixConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What config.json holds; `width` is the number of candidates per token."""

    model_type: Literal["token_recycling"] = "token_recycling"
    vocab_size: int
    width: int


class StoredMatrix(msgspec.Struct, frozen=True):
    """A matrix that was read, and the digest of it as read."""

    matrix: Adjacency
    digest: str


def save_matrix(directory: Path, matrix: Adjacency) -> str:
    """Write the matrix; its digest."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(matrix._asdict(), directory / _TENSORS)
    config = MatrixConfig(vocab_size=vocab_size_of(matrix), width=WIDTH)
    (directory / _CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config)) + b"\n")
    return matrix_digest(matrix)


def load_matrix(directory: Path, *, vocab_size: int, digest: str) -> StoredMatrix:
    """The matrix in a directory.

    Raises ArtifactRejected if it is of another vocabulary or width, has another digest, or holds anything that a matrix
    cannot hold.
    """
    config = _read_config(directory / _CONFIG)
    if config.vocab_size != vocab_size:
        raise ArtifactRejected(
            f"matrix has a vocabulary of {config.vocab_size} tokens, the target {vocab_size}; take a snapshot from a "
            "replica of this target",
            reason="vocabulary",
        )
    if config.width != WIDTH:
        raise ArtifactRejected(f"matrix has {config.width} candidates per token, expected {WIDTH}", reason="format")
    matrix = _read_tensors(directory / _TENSORS, like=empty_adjacency(vocab_size))
    seen = matrix_digest(matrix)
    if seen != digest:
        raise ArtifactRejected(
            f"matrix has digest {seen}, promised was {digest}; the files were changed or damaged after registration",
            reason="digest",
        )
    _check_entries(matrix)
    return StoredMatrix(matrix, seen)


def matrix_digest(matrix: Adjacency) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and little-endian values."""
    digest = hashlib.sha256()
    for name, array in matrix._asdict().items():
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(f"{name}{array.shape}{array.dtype.name}".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()


def _read_config(path: Path) -> MatrixConfig:
    try:
        return msgspec.json.decode(path.read_bytes(), type=MatrixConfig)
    except OSError as error:
        raise ArtifactRejected(f"cannot read {path}: {error.strerror}", reason="format") from error
    except msgspec.MsgspecError as error:
        raise ArtifactRejected(f"{path} describes no matrix: {error}", reason="format") from error


def _read_tensors(path: Path, *, like: Adjacency) -> Adjacency:
    try:
        tensors: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy has not
        raise ArtifactRejected(f"{path} is no safetensors file of a matrix: {error}", reason="format") from error
    expected = like._asdict()
    seen = {name: f"{array.dtype}{array.shape}" for name, array in tensors.items()}
    wanted = {name: f"{array.dtype}{array.shape}" for name, array in expected.items()}
    if seen != wanted:
        raise ArtifactRejected(f"{path} holds {seen}, expected {wanted}", reason="format")
    return Adjacency(**{name: np.array(tensors[name]) for name in expected})  # copies: the file may end before us


def _check_entries(matrix: Adjacency) -> None:
    """Raise ArtifactRejected unless these are entries as `remember` writes them."""
    num_rows, vocab_size = len(matrix.ids_VN), vocab_size_of(matrix)
    if matrix.ids_VN.min() < 0 or matrix.ids_VN.max() >= vocab_size:
        raise ArtifactRejected(f"matrix names what is no token; the vocabulary is 0..{vocab_size - 1}", reason="format")
    rewritten = empty_adjacency(num_rows)  # the stand-in is a row like any other here
    remember(rewritten, np.arange(num_rows, dtype=np.int32), matrix.ids_VN.astype(np.int32), matrix.logprobs_VN)
    written = Adjacency(*(array[:num_rows] for array in rewritten))
    differs_V = (written.ids_VN != matrix.ids_VN) | (written.logprobs_VN != matrix.logprobs_VN)
    if differs_V.any():
        token = int(differs_V.any(axis=1).argmax())
        raise ArtifactRejected(
            f"row {token} is {matrix.ids_VN[token].tolist()} with log-probabilities "
            f"{matrix.logprobs_VN[token].tolist()}; expected different tokens, and numbers up to 0 or -inf",
            reason="not_finite" if np.isnan(matrix.logprobs_VN).any() else "format",
        )
