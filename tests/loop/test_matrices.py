"""The matrix that the distiller fills: a version beside every draft's, and nothing lost for long."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from house import CURRICULUM, House, Killed, send, trained

from slipstream.drafting.recycling_artifact import load_matrix
from slipstream.engine.artifact import local_path
from slipstream.errors import StoreUnavailable
from slipstream.learning.matrix_replay import rows_of
from slipstream.records import is_held_out
from slipstream.versions import DRAFT, MATRIX, ModelVersion
from slipstream_kernels.adjacency import Adjacency, empty_adjacency, remember
from tests.observed import TARGET_DIGEST, VOCAB_SIZE, observation


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("workers.distiller.worker._POLL_S", 0.01)


NAMES = [f"request-{number}" for number in range(32)]


def loaded(house: House, version: ModelVersion) -> Adjacency:
    directory = local_path(version.artifact_uri, house.artifact_root)
    return load_matrix(directory, vocab_size=VOCAB_SIZE, digest=version.digest).matrix


def known_tokens(matrix: Adjacency) -> set[int]:
    """The tokens that have a row."""
    return set(np.flatnonzero(np.isfinite(matrix.logprobs_VN[:-1]).any(axis=1)).tolist())


def said_behind(names: list[str]) -> set[int]:
    """The tokens behind which the target said something in these requests' observations."""
    return {token for name in names for token in rows_of(observation(name))[0].tolist()}


def test_every_draft_version_has_a_matrix_of_the_same_observations_beside_it(tmp_path: Path) -> None:
    house = House(tmp_path)
    send(house.log, NAMES)
    house.start()
    house.run()
    drafts, matrices = house.registry.versions(*DRAFT), house.registry.versions(*MATRIX)
    assert len(matrices) == len(drafts) > 2
    for draft, matrix in zip(drafts, matrices, strict=True):
        assert matrix.lineage.offsets == draft.lineage.offsets
        assert matrix.lineage.num_observations == draft.lineage.num_observations
        assert (matrix.lineage.target_digest, matrix.lineage.num_train_steps) == (TARGET_DIGEST, 0)
    assert [one.lineage.parent_version for one in matrices] == list(range(len(matrices)))
    assert house.registry.alias(*MATRIX, "challenger") == matrices[-1].version


def test_a_matrix_holds_what_the_target_said_in_training_observations_and_no_other(tmp_path: Path) -> None:
    house = House(tmp_path)
    held_out = [name for name in NAMES if is_held_out(name)]
    learned = [name for name in NAMES if not is_held_out(name)][:5]
    assert said_behind(held_out) - said_behind(learned)
    send(house.log, held_out + learned)
    house.start()
    house.run()
    matrix = loaded(house, house.registry.versions(*MATRIX)[-1])
    assert known_tokens(matrix) == said_behind(learned)
    expected = empty_adjacency(VOCAB_SIZE)
    for name in learned:
        remember(expected, *rows_of(observation(name)))
    assert (matrix.ids_VN[:-1] == expected.ids_VN[:-1]).all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["register", "set_alias", "prune"])
def test_kill_9_around_a_matrix_loses_nothing_that_was_learned(tmp_path: Path, step: str, when: str) -> None:
    house = House(tmp_path)
    send(house.log, NAMES)
    num_calls = 0

    def kill(name: str, moment: str) -> None:
        nonlocal num_calls
        num_calls += (name, moment) == (step, when)
        # The first call is for the draft, the second for its matrix.
        if num_calls == 2:
            raise Killed

    house.start(kill)
    with pytest.raises(Killed):
        house.run()
    house.start()
    house.run()
    newest = house.registry.versions(*MATRIX)[-1]
    assert house.registry.alias(*MATRIX, "challenger") == newest.version
    in_versions = [name for _, file in house.lineage_files() for name in file.observation_ids]
    assert set(in_versions) <= trained(NAMES)
    assert said_behind([name.removesuffix("/0") for name in in_versions]) <= known_tokens(loaded(house, newest))


def test_an_outage_between_draft_and_matrix_registers_the_matrix_once_when_it_is_over(tmp_path: Path) -> None:
    house = House(tmp_path)
    send(house.log, NAMES[:9])
    is_down, num_registered = True, 0

    def outage(name: str, moment: str) -> None:
        nonlocal num_registered
        if (name, moment) == ("register", "before"):
            if is_down and num_registered:
                raise StoreUnavailable("injected outage; wait")
            num_registered += 1

    house.start(outage)
    assert house.worker is not None
    with pytest.raises(StoreUnavailable):
        house.run()
    assert (len(house.registry.versions(*DRAFT)), len(house.registry.versions(*MATRIX))) == (1, 0)
    is_down = False
    house.run()
    assert (len(house.registry.versions(*DRAFT)), len(house.registry.versions(*MATRIX))) == (1, 1)
    assert house.registry.alias(*MATRIX, "challenger") == 1


def test_a_registered_matrix_that_is_damaged_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    house = House(tmp_path)
    send(house.log, NAMES)
    house.start()
    house.run()
    versions = house.registry.versions(*MATRIX)
    path = local_path(versions[-1].artifact_uri, house.artifact_root) / "model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-8])
    with caplog.at_level(logging.WARNING):
        house.start()
        house.run()
    assert sum("cannot begin with matrix version" in record.message for record in caplog.records) == 1
    assert house.worker is not None
    matrices = house.worker._distiller._matrices
    assert matrices._parent_version == versions[-2].version
    assert known_tokens(loaded(house, versions[-2])) <= known_tokens(matrices._matrix)


def test_old_matrices_are_pruned(tmp_path: Path) -> None:
    house = House(tmp_path)
    send(house.log, NAMES)
    house.start(curriculum=msgspec.structs.replace(CURRICULUM, keep_versions=2))
    house.run()
    kept = [one.version for one in house.registry.versions(*MATRIX)]
    newest = max(house.registry.lineages(*MATRIX))
    assert kept == [newest - 1, newest]
