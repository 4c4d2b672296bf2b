"""A replica follows the pointer, proves what it runs, and refuses what it should not load."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from conftest import LIMITS, MODELS

from slipstream.drafting.merge import DraftingOptions
from slipstream.drafting.recycling_artifact import save_matrix
from slipstream.engine.engine import Engine
from slipstream.engine.runner import EngineRunner
from slipstream.engine.served import Served, ServedDraft, ServedMatrix
from slipstream.engine.swap import PointerFollower
from slipstream.errors import ConfigError, StoreUnavailable
from slipstream.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from slipstream.models.decoder import initial_draft
from slipstream.stores.memory import MemoryPointers
from slipstream.telemetry import ReplicaMetrics
from slipstream.versions import DRAFT, MATRIX, Acknowledgement, Place, ServingPointer
from slipstream_kernels.adjacency import empty_adjacency, remember

DEADLINE_S = 60.0

pytestmark = pytest.mark.usefixtures("exact_kernels")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


SQL = Place("draft", "sql")


class Replica:
    """An engine on its thread with its followers; `root` is the artifact root."""

    def __init__(self, target: Checkpoint, pointers: MemoryPointers, root: Path, cache: Path) -> None:
        self.metrics = ReplicaMetrics()
        self.runner = EngineRunner(
            Engine(
                target,
                limits=LIMITS,
                target_digest=target.digest,
                replica_id="replica-1",
                top_n=16,
                observe=lambda observation: None,
                metrics=self.metrics,
                drafting=DraftingOptions(fixed_nodes=LIMITS.num_draft_tokens),
            )
        )
        self.pointers = pointers
        self.target_digest = target.digest
        self.followers = {
            place: PointerFollower(
                pointers,
                self.served(place),
                target_digest=target.digest,
                replica_id="replica-1",
                artifact_root=root,
                cache_dir=cache / place.role / place.domain,
                poll_s=0.05,
                metrics=self.metrics,
            )
            for place in (DRAFT, SQL, MATRIX)
        }

    def served(self, place: Place) -> Served:
        return ServedMatrix(self.runner) if place == MATRIX else ServedDraft(self.runner, domain=place.domain)

    def start(self) -> None:
        self.runner.start()
        for follower in self.followers.values():
            follower.start()

    def stop(self) -> None:
        for follower in self.followers.values():
            follower.stop(10)
        self.runner.stop(10)

    def point_at(
        self, directory: Path, *, version: int, digest: str, place: Place = DRAFT, **changes: object
    ) -> ServingPointer:
        current = self.pointers.read(*place)
        generation = current.generation if current else 0
        pointer = ServingPointer(
            role=place.role,
            domain=place.domain,
            version=version,
            artifact_uri=directory.as_uri() if version else "",
            digest=digest,
            target_digest=self.target_digest,
            generation=generation + 1,
            fencing_token=self.pointers.issue_fencing_token(),
            reason="test",
            set_at=time.time(),
        )
        pointer = msgspec.structs.replace(pointer, **changes)
        self.pointers.advance(pointer, expected_generation=generation)
        return pointer

    def acknowledged(self, generation: int, *, place: Place = DRAFT) -> Acknowledgement:
        """The replica's word about a pointer of this generation, once it has come."""

        def has_come() -> bool:
            acks = self.pointers.acknowledgements(*place)
            return bool(acks) and acks[0].generation == generation

        wait_for(has_come)
        return self.pointers.acknowledgements(*place)[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An artifact root with one good draft in it."""
    shutil.copytree(MODELS / "draft-2m-general", tmp_path / "root" / "good", ignore=shutil.ignore_patterns("*.md"))
    return tmp_path / "root"


@pytest.fixture
def replica(target: Checkpoint, root: Path, tmp_path: Path) -> Iterator[Replica]:
    replica = Replica(target, MemoryPointers(), root, tmp_path / "cache")
    replica.start()
    yield replica
    replica.stop()


def test_a_move_of_the_pointer_is_acknowledged_with_the_digest_in_memory(
    replica: Replica, root: Path, general: Checkpoint
) -> None:
    replica.point_at(root / "good", version=4, digest=general.digest)
    ack = replica.acknowledged(1)
    assert (ack.state, ack.version, ack.error) == ("serving", 4, "")
    assert ack.digest == general.digest == replica.runner.engine.draft_digest
    assert replica.metrics.registry.get_sample_value("slipstream_draft_info", {"version": "4"}) == 1
    replica.point_at(root, version=0, digest="")
    assert replica.acknowledged(2).version == 0
    assert replica.runner.draft_version == 0


def with_pickle(directory: Path, _: Path) -> None:
    (directory / "extra.bin").write_bytes(b"\x80\x04N.")


def with_link(directory: Path, root: Path) -> None:
    (root / "outside.json").write_text("{}")
    (directory / "link.json").symlink_to(root / "outside.json")


def with_changed_byte(directory: Path, _: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)


def with_truncated_weights(directory: Path, _: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def with_unsupported_config(directory: Path, _: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"silu"', '"gelu"'))


def with_another_architecture(directory: Path, _: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 50000.0'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (with_pickle, "extra.bin"),
        (with_link, "link.json"),
        (with_changed_byte, "digest"),
        (with_truncated_weights, "safetensors"),
        (with_unsupported_config, "gelu"),
        (with_another_architecture, "digest"),
    ],
)
def test_a_bad_artifact_is_refused_and_the_old_version_keeps_serving(
    replica: Replica, root: Path, general: Checkpoint, damage: Callable[[Path, Path], None], words: str
) -> None:
    replica.point_at(root / "good", version=1, digest=general.digest)
    replica.acknowledged(1)
    shutil.copytree(root / "good", root / "bad")
    damage(root / "bad", root)
    # A digest the cache does not hold yet, so that the damaged files are really read.
    digest = general.digest if damage is not with_changed_byte else "0" * 64
    shutil.rmtree(replica.followers[DRAFT]._cache_dir / general.digest)
    replica.point_at(root / "bad", version=2, digest=digest)
    ack = replica.acknowledged(2)
    assert ack.state == "refused"
    assert words in ack.error
    assert (ack.version, ack.digest) == (1, general.digest)
    assert replica.runner.draft_version == 1


@pytest.mark.parametrize("weights", ["vocabulary", "nan"])
def test_weights_that_do_not_fit_are_refused(replica: Replica, root: Path, weights: str) -> None:
    config, tensors = initial_draft(512 if weights == "vocabulary" else 4096, seed=1)
    if weights == "nan":
        tensors["model.norm.weight"][3] = torch.nan
    digest = save_checkpoint(root / "odd", config, tensors)
    replica.point_at(root / "odd", version=1, digest=digest)
    ack = replica.acknowledged(1)
    assert (ack.state, ack.version) == ("refused", 0)
    assert ("512" if weights == "vocabulary" else "finite") in ack.error


def test_a_place_outside_the_root_and_another_target_are_refused(
    replica: Replica, root: Path, general: Checkpoint
) -> None:
    replica.point_at(MODELS / "draft-2m-general", version=1, digest=general.digest)
    assert "outside the root" in replica.acknowledged(1).error
    sneaky = (root / "good").as_uri().replace("/good", "/good/..%2F../cache")
    replica.point_at(root / "good", version=2, digest=general.digest, artifact_uri=sneaky)
    assert "outside the root" in replica.acknowledged(2).error
    replica.point_at(root / "good", version=3, digest=general.digest, artifact_uri="http://127.0.0.1/good")
    assert "file:///" in replica.acknowledged(3).error
    replica.point_at(root / "good", version=4, digest=general.digest, target_digest="another")
    assert "target" in replica.acknowledged(4).error
    assert replica.runner.draft_version == 0


@pytest.mark.parametrize("digest", ["../victim", "/etc", "", "A" * 64])
def test_a_digest_that_could_name_another_directory_is_refused(
    replica: Replica, root: Path, tmp_path: Path, digest: str
) -> None:
    (tmp_path / "victim").mkdir()
    replica.point_at(root / "good", version=1, digest=digest)
    ack = replica.acknowledged(1)
    assert "64 hexadecimal digits" in ack.error
    assert (tmp_path / "victim").is_dir()
    assert root.is_dir()


def test_a_pointer_store_that_began_anew_is_followed_and_one_that_lost_its_last_move_is_not(
    target: Checkpoint, root: Path, general: Checkpoint, tmp_path: Path
) -> None:
    first = Replica(target, MemoryPointers(), root, tmp_path / "cache")
    first.start()
    before = first.point_at(root / "good", version=1, digest=general.digest)
    for version in (2, 3):
        first.point_at(root / "good", version=version, digest=general.digest)
    first.acknowledged(3)
    first.stop()
    lagging, anew = MemoryPointers(), MemoryPointers()
    lagging.advance(before, expected_generation=0)
    second = Replica(target, lagging, root, tmp_path / "cache")
    second.start()
    second.followers[DRAFT].look()
    assert second.runner.draft_version == 3
    second.stop()
    third = Replica(target, anew, root, tmp_path / "cache")
    third.start()
    third.point_at(root / "good", version=4, digest=general.digest)
    wait_for(lambda: third.runner.draft_version == 4)
    third.stop()


def test_a_replica_without_a_pointer_says_that_it_serves_without_a_draft(replica: Replica) -> None:
    ack = replica.acknowledged(0)
    assert (ack.state, ack.version, ack.digest) == ("serving", 0, "")


class DownPointers(MemoryPointers):
    """A pointer store that does not answer, or not to this password."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def read(self, role: str, domain: str) -> ServingPointer | None:  # type: ignore[override]
        raise self.error


@pytest.mark.parametrize("error", [StoreUnavailable("connection refused"), ConfigError("wrong password")])
def test_a_replica_starts_from_the_last_good_version_with_the_store_down(
    target: Checkpoint, root: Path, general: Checkpoint, tmp_path: Path, error: Exception
) -> None:
    first = Replica(target, MemoryPointers(), root, tmp_path / "cache")
    first.start()
    first.point_at(root / "good", version=7, digest=general.digest)
    first.acknowledged(1)
    first.stop()
    shutil.rmtree(root)
    second = Replica(target, DownPointers(error), root, tmp_path / "cache")
    second.start()
    wait_for(lambda: second.runner.draft_version == 7)
    assert second.runner.engine.draft_digest == general.digest
    values = second.metrics.registry.get_sample_value
    wait_for(lambda: values("slipstream_store_up", {"store": "pointers"}) == 0)
    assert values("slipstream_unexpected_errors_total") == 0
    second.stop()


def test_every_domain_has_a_draft_of_its_own_or_that_of_the_default_domain(
    replica: Replica, root: Path, general: Checkpoint, sibling: Checkpoint
) -> None:
    shutil.copytree(MODELS / "draft-2m-sibling", root / "sql", ignore=shutil.ignore_patterns("*.md"))
    replica.point_at(root / "good", version=4, digest=general.digest)
    replica.acknowledged(1)
    assert replica.acknowledged(0, place=SQL).version == 0
    replica.point_at(root / "sql", version=2, digest=sibling.digest, place=SQL)
    ack = replica.acknowledged(1, place=SQL)
    assert (ack.state, ack.domain, ack.version, ack.digest) == ("serving", "sql", 2, sibling.digest)
    assert replica.runner.engine.draft_versions == {"default": 4, "sql": 2}
    assert replica.runner.draft_version == 4
    served = {"role": "draft", "domain": "sql"}
    assert replica.metrics.registry.get_sample_value("slipstream_served_version", served) == 2
    replica.point_at(root, version=0, digest="", place=SQL)
    assert replica.acknowledged(2, place=SQL).version == 0
    assert replica.runner.engine.draft_digest == general.digest


def test_last_good_versions_of_all_places_serve_with_the_store_down(
    target: Checkpoint, root: Path, general: Checkpoint, sibling: Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(MODELS / "draft-2m-sibling", root / "sql", ignore=shutil.ignore_patterns("*.md"))
    matrix = stored_matrix(root / "matrix", target.config.vocab_size)
    first = Replica(target, MemoryPointers(), root, tmp_path / "cache")
    first.start()
    first.point_at(root / "good", version=7, digest=general.digest)
    first.point_at(root / "sql", version=3, digest=sibling.digest, place=SQL)
    first.point_at(root / "matrix", version=5, digest=matrix, place=MATRIX)
    for place in (DRAFT, SQL, MATRIX):
        first.acknowledged(1, place=place)
    first.stop()
    shutil.rmtree(root)
    second = Replica(target, DownPointers(StoreUnavailable("connection refused")), root, tmp_path / "cache")
    second.start()
    served = {place: follower._served for place, follower in second.followers.items()}
    wait_for(lambda: [one.version for one in served.values()] == [7, 3, 5])
    assert [one.digest for one in served.values()] == [general.digest, sibling.digest, matrix]
    second.stop()


def stored_matrix(directory: Path, vocab_size: int, *, behind: int = 5) -> str:
    """A matrix that knows one row, as an artifact; its digest."""
    matrix = empty_adjacency(vocab_size)
    remember(matrix, np.array([behind], np.int32), np.array([[6, 7]], np.int32), np.log([[0.75, 0.25]]))
    return save_matrix(directory, matrix)


def test_a_matrix_is_installed_from_its_pointer_and_version_0_begins_with_an_empty_one(
    replica: Replica, root: Path, target: Checkpoint
) -> None:
    assert replica.acknowledged(0, place=MATRIX).version == 0
    digest = stored_matrix(root / "matrix", target.config.vocab_size)
    replica.point_at(root / "matrix", version=3, digest=digest, place=MATRIX)
    ack = replica.acknowledged(1, place=MATRIX)
    assert (ack.state, ack.role, ack.version, ack.digest) == ("serving", "recycling", 3, digest)
    assert replica.runner.draft_version == 0
    replica.point_at(root, version=0, digest="", place=MATRIX)
    ack = replica.acknowledged(2, place=MATRIX)
    assert (ack.state, ack.version, ack.digest) == ("serving", 0, "")


@pytest.mark.parametrize("fault", ["vocabulary", "digest", "truncated", "a draft", "pickle", "target"])
def test_a_matrix_that_does_not_fit_is_refused_and_the_last_one_stays(
    replica: Replica, root: Path, target: Checkpoint, general: Checkpoint, fault: str
) -> None:
    vocab_size = target.config.vocab_size
    good = stored_matrix(root / "matrix", vocab_size)
    replica.point_at(root / "matrix", version=1, digest=good, place=MATRIX)
    replica.acknowledged(1, place=MATRIX)
    bad = stored_matrix(root / "bad", 512 if fault == "vocabulary" else vocab_size, behind=9)
    changes: dict[str, object] = {}
    if fault == "digest":
        bad = "0" * 64
    elif fault == "truncated":
        path = root / "bad" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    elif fault == "a draft":
        changes, bad = {"artifact_uri": (root / "good").as_uri()}, general.digest
    elif fault == "pickle":
        (root / "bad" / "extra.bin").write_bytes(b"\x80\x04N.")
    elif fault == "target":
        changes = {"target_digest": "another"}
    replica.point_at(root / "bad", version=2, digest=bad, place=MATRIX, **changes)
    ack = replica.acknowledged(2, place=MATRIX)
    assert (ack.state, ack.version, ack.digest) == ("refused", 1, good)
    reasons = {"vocabulary": "vocabulary", "digest": "digest", "target": "target"}
    refused = replica.metrics.registry.get_sample_value(
        "slipstream_swap_refusals_total", {"reason": reasons.get(fault, "format")}
    )
    assert refused == 1


def test_the_digest_is_of_values_not_of_files(tmp_path: Path, general: Checkpoint) -> None:
    as_fp32 = save_checkpoint(tmp_path / "fp32", general.config, general.weights, dtype=torch.float32)
    assert as_fp32 == general.digest == load_checkpoint(tmp_path / "fp32").digest
