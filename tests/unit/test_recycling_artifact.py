"""A Token Recycling matrix as a version: what a replica starts from, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from slipstream.drafting.drafter import DraftContext
from slipstream.drafting.recycling import RecyclingDrafter
from slipstream.drafting.recycling_artifact import load_matrix, matrix_digest, save_matrix
from slipstream.engine.artifact import fetch
from slipstream.engine.request import SamplingParams
from slipstream.errors import ArtifactRejected
from slipstream.versions import ServingPointer
from slipstream_kernels.adjacency import Adjacency, empty_adjacency, remember

VOCAB_SIZE = 50


def context(token: int, *, tenant: str = "", temperature: float = 0.0) -> DraftContext:
    """A request whose last token this is."""
    return DraftContext(0, (token,), SamplingParams(seed=0, max_tokens=100, temperature=temperature), 16, 16, tenant)


def learn(drafter: RecyclingDrafter, *, tenant: str = "") -> None:
    """Behind token 5 comes 6."""
    drafter.observe(np.array([5], np.int32), np.array([[6]], np.int32), np.zeros((1, 1)), tenant=tenant)


def random_rows(vocab_size: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]:
    """Rows of half the vocabulary."""
    rng = np.random.default_rng(0)
    tokens = rng.permutation(vocab_size)[: vocab_size // 2].astype(np.int32)
    ids = rng.integers(0, vocab_size, (len(tokens), 8)).astype(np.int32)
    return tokens, ids, -rng.exponential(3, ids.shape)


def filled_matrix() -> Adjacency:
    matrix = empty_adjacency(VOCAB_SIZE)
    remember(matrix, *random_rows(VOCAB_SIZE))
    return matrix


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 70_000])
def test_a_replica_that_starts_from_a_snapshot_drafts_as_the_one_that_took_it(tmp_path: Path, vocab_size: int) -> None:
    drafter = RecyclingDrafter(vocab_size)
    drafter.observe(*random_rows(vocab_size))
    digest = drafter.snapshot(tmp_path / "snapshot")
    stored = load_matrix(tmp_path / "snapshot", vocab_size=vocab_size, digest=digest)
    fresh = RecyclingDrafter(vocab_size, start=stored, version=12)
    contexts = [context(token, temperature=0.7) for token in range(50)]
    assert [tree.token_ids for tree in fresh.propose(contexts)] == [
        tree.token_ids for tree in drafter.propose(contexts)
    ]
    assert {tree.version for tree in fresh.propose(contexts)} == {fresh.version} == {12}
    assert fresh.digest == digest != ""
    assert fresh.snapshot(tmp_path / "again") == digest


def test_learning_on_leaves_the_version_it_began_with_alone(tmp_path: Path) -> None:
    digest = save_matrix(tmp_path, filled_matrix())
    stored = load_matrix(tmp_path, vocab_size=VOCAB_SIZE, digest=digest)
    for max_tenants in (None, 1):
        drafter = RecyclingDrafter(VOCAB_SIZE, start=stored, max_tenants=max_tenants)
        before = drafter.propose([context(5)])
        learn(drafter)
        assert drafter.propose([context(5)]) != before
        assert matrix_digest(stored.matrix) == digest == drafter.digest


def test_tenants_begin_with_the_version_and_are_never_published(tmp_path: Path) -> None:
    digest = save_matrix(tmp_path, filled_matrix())
    stored = load_matrix(tmp_path, vocab_size=VOCAB_SIZE, digest=digest)
    drafter = RecyclingDrafter(VOCAB_SIZE, start=stored, max_tenants=3)
    shared = RecyclingDrafter(VOCAB_SIZE, start=stored)
    contexts = [context(token, tenant="a") for token in range(VOCAB_SIZE)]
    assert drafter.propose(contexts) == shared.propose(contexts)
    learn(drafter, tenant="a")
    others = [context(token, tenant="b") for token in range(VOCAB_SIZE)]
    assert drafter.propose(others) == shared.propose(others)
    with pytest.raises(ValueError, match="not published"):
        drafter.snapshot(tmp_path / "snapshot")


def test_a_snapshot_is_an_artifact_that_replicas_fetch(tmp_path: Path) -> None:
    digest = save_matrix(tmp_path / "artifacts" / "7", filled_matrix())
    pointer = ServingPointer(
        role="draft",
        domain="default",
        version=7,
        artifact_uri=(tmp_path / "artifacts" / "7").as_uri(),
        digest=digest,
        target_digest="0" * 64,
        generation=1,
        fencing_token=0,
        set_at=0.0,
        reason="",
    )
    directory = fetch(pointer, artifact_root=tmp_path / "artifacts", into=tmp_path / "cache")
    assert load_matrix(directory, vocab_size=VOCAB_SIZE, digest=digest).digest == digest


def set_entry(name: str, value: float, *, row: int = 3, rank: int = 1) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name][row, rank] = value

    return change


def repeat_id(tensors: dict[str, Any]) -> None:
    tensors["ids_VN"][3, :2], tensors["logprobs_VN"][3, :2] = 9, -1.0


def as_floats(tensors: dict[str, Any]) -> None:
    tensors["ids_VN"] = tensors["ids_VN"].astype(np.float32)


def narrower(tensors: dict[str, Any]) -> None:
    tensors.update({name: array[:, :4].copy() for name, array in tensors.items()})


def without_stand_in(tensors: dict[str, Any]) -> None:
    tensors.update({name: array[:-1].copy() for name, array in tensors.items()})


def surplus(tensors: dict[str, Any]) -> None:
    tensors["more"] = np.zeros(1, np.float32)


BROKEN_TENSORS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an id outside the vocabulary": (set_entry("ids_VN", 50), "format"),
    "one in the stand-in": (set_entry("ids_VN", 50, row=-1), "format"),
    "not a number": (set_entry("logprobs_VN", math.nan), "not_finite"),
    "a probability above 1": (set_entry("logprobs_VN", 0.5), "format"),
    "a token twice in a row": (repeat_id, "format"),
    "ids that are no integers": (as_floats, "format"),
    "rows of another length": (narrower, "format"),
    "one row too few": (without_stand_in, "format"),
    "a tensor too many": (surplus, "format"),
}


@pytest.mark.parametrize("name", BROKEN_TENSORS)
def test_tensors_that_are_no_matrix_are_refused(tmp_path: Path, name: str) -> None:
    change, reason = BROKEN_TENSORS[name]
    matrix = filled_matrix()
    save_matrix(tmp_path, matrix)
    tensors: dict[str, Any] = {key: array.copy() for key, array in matrix._asdict().items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    promised = matrix_digest(Adjacency(tensors["ids_VN"], tensors["logprobs_VN"]))
    with pytest.raises(ArtifactRejected) as rejected:
        load_matrix(tmp_path, vocab_size=VOCAB_SIZE, digest=promised)
    assert rejected.value.reason == reason


def test_files_that_are_not_what_was_promised_are_refused(tmp_path: Path) -> None:
    digest = save_matrix(tmp_path, filled_matrix())
    config = json.loads((tmp_path / "config.json").read_text())

    def reason(*, vocab_size: int = VOCAB_SIZE, digest: str = digest) -> str:
        with pytest.raises(ArtifactRejected) as rejected:
            load_matrix(tmp_path, vocab_size=vocab_size, digest=digest)
        return rejected.value.reason

    assert reason(vocab_size=51) == "vocabulary"
    assert reason(digest="0" * 64) == "digest"
    for broken in (config | {"width": 4}, config | {"model_type": "llama"}, config | {"auto_map": {}}, {}):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        assert reason() == "format"
    (tmp_path / "config.json").write_text("{")
    assert reason() == "format"
    (tmp_path / "config.json").unlink()
    assert reason() == "format"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04.")
    assert reason() == "format"
    (tmp_path / "model.safetensors").unlink()
    assert reason() == "format"
