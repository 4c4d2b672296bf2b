"""The evaluator: what it keeps, when it looks, and that its reports let the gate tell better from equal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.drafting.recycling_artifact import save_matrix
from slipstream.engine.artifact import local_path
from slipstream.errors import StoreUnavailable
from slipstream.learning.distillation import Student, make_batch
from slipstream.learning.evaluator import Evaluator
from slipstream.learning.judge import Exam
from slipstream.learning.matrix_replay import rows_of
from slipstream.learning.replay import ReplayBuffer
from slipstream.models.checkpoint import save_checkpoint
from slipstream.models.decoder import initial_draft
from slipstream.promoter import advance
from slipstream.promotion import EvaluationReport, PromotionGate, decide
from slipstream.records import Observation, encode, is_held_out
from slipstream.stores.memory import MemoryLog, MemoryPointers, MemoryRegistry
from slipstream.stores.protocols import LogEntry
from slipstream.telemetry import MAX_DOMAINS, WorkerMetrics
from slipstream.versions import DRAFT, MATRIX, Lineage, ModelVersion, Place
from slipstream_kernels.adjacency import empty_adjacency, remember
from tests.observed import TARGET_DIGEST, VOCAB_SIZE, observation, of_another_target
from workers.evaluator.worker import EvaluatorWorker

SQL = Place("draft", "sql")
HELD_OUT = [name for name in (f"request-{number}" for number in range(1000)) if is_held_out(name)]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("workers.evaluator.worker._POLL_S", 0.01)


@pytest.fixture(scope="module")
def drafts() -> dict[str, dict[str, torch.Tensor]]:
    """Weights of a draft that knows nothing and of one that learned the rule."""
    student = Student(*initial_draft(VOCAB_SIZE, seed=0), learning_rate=3e-3)
    fresh = {name: tensor.clone() for name, tensor in student.weights.items()}
    for step in range(40):
        student.train_step(make_batch([observation(f"train-{step}-{row}") for row in range(4)]))
    return {"fresh": fresh, "taught": student.weights}


class Room:
    """Stores, and an evaluator on them that may be started again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = MemoryLog(num_partitions=2)
        self.registry = MemoryRegistry(root / "artifacts")
        self.pointers = MemoryPointers()
        self.metrics = WorkerMetrics()
        self.worker = self.start()

    def start(self) -> EvaluatorWorker:
        exam = Exam(
            target_digest=TARGET_DIGEST,
            vocab_size=VOCAB_SIZE,
            num_draft_tokens=3,
            num_recent=20,
            places=(DRAFT, SQL, MATRIX),
        )
        evaluator = Evaluator(
            self.registry,
            self.pointers,
            ReplayBuffer(self.root / "held-out", max_per_domain=50),
            exam=exam,
            artifact_root=self.root / "artifacts",
            metrics=self.metrics,
        )
        return EvaluatorWorker(evaluator, self.log, self.pointers, metrics=self.metrics)

    def send(self, names: list[str], *, domain: str = "count") -> None:
        self.log.append([(name, encode(observation(name, domain=domain))) for name in names])

    def add(self, weights: dict[str, torch.Tensor], *, parent: int = 0, place: Place = DRAFT) -> ModelVersion:
        """A new version, and the challenger alias at it."""
        directory = self.root / f"staged-{'-'.join(place)}-{parent}"
        config, _ = initial_draft(VOCAB_SIZE, seed=0)
        digest = save_checkpoint(directory, config, weights)
        return self.register(directory, digest, parent=parent, place=place)

    def add_matrix(self, observations: list[Observation], *, parent: int = 0) -> ModelVersion:
        """A matrix that saw these, and the challenger alias at it."""
        directory, matrix = self.root / f"matrix-{parent}", empty_adjacency(VOCAB_SIZE)
        for one in observations:
            remember(matrix, *rows_of(one))
        return self.register(directory, save_matrix(directory, matrix), parent=parent, place=MATRIX)

    def register(self, directory: Path, digest: str, *, parent: int, place: Place) -> ModelVersion:
        lineage = Lineage(target_digest=TARGET_DIGEST, parent_version=parent)
        version = self.registry.register(*place, directory, digest=digest, lineage=lineage)
        self.registry.set_alias(*place, "challenger", version.version)
        return version

    def report(self, version: ModelVersion) -> EvaluationReport | None:
        return self.registry.report(version.role, version.domain, version.version)

    def serve(self, version: ModelVersion) -> None:
        token = self.pointers.issue_fencing_token()
        current = self.pointers.read(version.role, version.domain)
        advance(self.pointers, version, after=current, fencing_token=token, reason="test")

    def run(self) -> None:
        num_idle = 0
        while num_idle < 2:
            num_idle = 0 if self.worker.turn() else num_idle + 1


def test_only_held_out_observations_of_this_target_are_kept_and_everything_is_committed(tmp_path: Path) -> None:
    room = Room(tmp_path)
    room.send([f"request-{number}" for number in range(100)])
    room.log.append([("poison", b"?"), (HELD_OUT[0], encode(of_another_target(observation(HELD_OUT[0]))))])
    room.run()
    num_held_out = sum(is_held_out(f"request-{number}") for number in range(100))
    assert room.metrics.consumed.labels("held_out")._value.get() == num_held_out
    assert room.metrics.consumed.labels("skipped")._value.get() == 102 - num_held_out
    subscription = room.log.subscribe("evaluator")
    assert subscription.lag() == 0


def test_held_out_observations_survive_a_restart(tmp_path: Path, drafts: dict[str, dict[str, torch.Tensor]]) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:15])
    room.run()
    room.worker.close()
    room.worker = room.start()
    version = room.add(drafts["taught"])
    room.run()
    report = room.registry.report(*DRAFT, version.version)
    assert report is not None
    assert len(report.recent) == 15


def test_a_first_draft_is_judged_against_plain_decoding(
    tmp_path: Path, drafts: dict[str, dict[str, torch.Tensor]]
) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:12], domain="math")
    room.send(HELD_OUT[12:26], domain="sql")
    version = room.add(drafts["taught"])
    room.run()
    report = room.registry.report(*DRAFT, version.version)
    assert report is not None
    assert (report.champion_version, report.look, len(report.recent)) == (0, 1, 20)
    assert [(one.domain, len(one.differences)) for one in report.domains] == [("math", 12), ("sql", 14)]
    assert all(one.champion_acceptance_length == 1.0 for one in report.domains)
    assert decide(PromotionGate(), report, at=0.0).verdict == "promote"


def test_a_further_look_waits_for_four_further_held_out_requests(
    tmp_path: Path, drafts: dict[str, dict[str, torch.Tensor]]
) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:10])
    version = room.add(drafts["taught"])
    looks = []
    for sent in range(10, 16):
        room.run()
        report = room.registry.report(*DRAFT, version.version)
        assert report is not None
        looks.append((report.look, len(report.recent)))
        room.send(HELD_OUT[sent : sent + 1])
    assert looks == [(1, 10), (1, 10), (1, 10), (1, 10), (2, 14), (2, 14)]


def test_what_is_served_is_not_judged_and_a_new_champion_asks_for_a_new_report(
    tmp_path: Path, drafts: dict[str, dict[str, torch.Tensor]]
) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:12])
    fresh = room.add(drafts["fresh"])
    room.serve(fresh)
    room.run()
    assert room.registry.report(*DRAFT, fresh.version) is None
    taught = room.add(drafts["taught"], parent=1)
    room.run()
    report = room.registry.report(*DRAFT, taught.version)
    assert report is not None
    assert report.champion_version == fresh.version
    assert report.challenger_overlap > report.champion_overlap
    other = room.add(drafts["fresh"], parent=2)
    room.registry.set_alias(*DRAFT, "challenger", taught.version)
    room.serve(other)
    room.run()
    report = room.registry.report(*DRAFT, taught.version)
    assert report is not None
    assert (report.champion_version, report.look) == (other.version, 2)


def test_a_challenger_with_weights_that_are_not_finite_is_refused_once_and_never_reported(
    tmp_path: Path, drafts: dict[str, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:12])
    broken = {name: torch.full_like(tensor, math.nan) for name, tensor in drafts["fresh"].items()}
    version = room.add(broken)
    room.run()
    room.run()
    assert room.registry.report(*DRAFT, version.version) is None
    assert sum("is not judged" in record.message for record in caplog.records) == 1


def test_an_outage_between_reading_and_committing_keeps_what_was_read(tmp_path: Path) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:5])
    room.worker.turn()
    subscription = room.worker._subscription
    assert subscription is not None
    commit = subscription.commit

    def fail(ends: object) -> None:
        raise StoreUnavailable("injected outage; wait")

    room.send(HELD_OUT[5:9])
    subscription.commit = fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable):
        room.run()
    subscription.commit = commit  # type: ignore[method-assign]
    room.run()
    assert room.log.subscribe("evaluator").lag() == 0
    assert len(ReplayBuffer(tmp_path / "held-out", max_per_domain=50)) == 9


def test_a_lost_membership_is_joined_again_instead_of_refused_for_ever(tmp_path: Path) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:3])
    room.worker.turn()
    subscription = room.worker._subscription
    assert subscription is not None

    commit, poll, is_member = subscription.commit, subscription.poll, False

    def commit_as_member(ends: Mapping[int, int]) -> None:
        if not is_member:
            raise StoreUnavailable("the group went on without this member")
        commit(ends)

    def poll_and_join(**limits: Any) -> list[LogEntry]:
        nonlocal is_member
        entries = poll(**limits)
        # Joining takes longer than the first poll.
        is_member = not entries
        return entries

    subscription.commit = commit_as_member  # type: ignore[method-assign]
    subscription.poll = poll_and_join  # type: ignore[method-assign]
    room.send(HELD_OUT[3:8])
    with pytest.raises(StoreUnavailable):
        room.run()
    room.run()
    assert subscription.lag() == 0
    assert len(ReplayBuffer(tmp_path / "held-out", max_per_domain=50)) == 8


def test_an_outage_of_the_registry_silences_neither_the_reading_nor_the_reports(tmp_path: Path) -> None:
    room = Room(tmp_path)

    def fail(*place: object) -> int:
        raise StoreUnavailable("injected outage; wait")

    room.registry.alias = fail  # type: ignore[method-assign, assignment]
    room.send(HELD_OUT[:5])
    with pytest.raises(StoreUnavailable):
        room.worker.turn()
    assert [one.worker for one in room.pointers.workers()] == ["evaluator"]
    assert room.log.subscribe("evaluator").lag() == 0


def test_a_log_that_came_back_empty_is_read_from_its_first_record_and_its_latest_count(tmp_path: Path) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:60])
    room.run()
    room.log = MemoryLog(num_partitions=2)
    room.worker._log = room.log
    room.send(HELD_OUT[60:80])
    room.run()
    assert room.log.subscribe("evaluator").lag() == 0
    newest = room.worker._evaluator._held_out.newest(20)
    assert {one.request_id for one in newest} == set(HELD_OUT[60:80])
    assert len(room.worker._evaluator._held_out) == 50


def test_a_report_has_a_bounded_number_of_domains_whatever_callers_name(
    tmp_path: Path, drafts: dict[str, dict[str, torch.Tensor]]
) -> None:
    room = Room(tmp_path)
    for number, name in enumerate(HELD_OUT[:30]):
        room.send([name], domain=f"named-{number}")
    version = room.add(drafts["fresh"])
    room.run()
    report = room.registry.report(*DRAFT, version.version)
    assert report is not None
    assert len(report.domains) == MAX_DOMAINS
    assert "other" in {one.domain for one in report.domains}
    assert sum(len(one.differences) for one in report.domains) == 30


def test_a_draft_of_a_domain_is_judged_on_its_traffic_against_what_serves_it_now(
    tmp_path: Path, drafts: dict[str, dict[str, torch.Tensor]]
) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:15], domain="math")
    room.send(HELD_OUT[15:27], domain="sql")
    plain = room.add(drafts["taught"], place=SQL)
    room.run()
    against_nothing = room.report(plain)
    assert against_nothing is not None
    assert [(one.domain, len(one.differences)) for one in against_nothing.domains] == [("sql", 12)]
    assert [one.champion_acceptance_length for one in against_nothing.domains] == [1.0]
    room.serve(room.add(drafts["taught"]))
    fresh = room.add(drafts["fresh"], parent=1, place=SQL)
    room.run()
    against_default = room.report(fresh)
    assert against_default is not None
    assert against_default.champion_version == 0
    assert against_default.champion_overlap > against_default.challenger_overlap
    assert all(difference < 0 for difference in against_default.recent)


def test_a_further_look_at_a_domains_draft_waits_for_requests_of_that_domain(
    tmp_path: Path, drafts: dict[str, dict[str, torch.Tensor]]
) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:8], domain="sql")
    version = room.add(drafts["fresh"], place=SQL)
    room.run()
    room.send(HELD_OUT[8:20], domain="math")
    room.run()
    report = room.report(version)
    assert report is not None
    assert report.look == 1
    room.send(HELD_OUT[20:24], domain="sql")
    room.run()
    report = room.report(version)
    assert report is not None
    assert (report.look, len(report.recent)) == (2, 12)


def test_a_matrix_is_judged_by_what_it_would_have_drafted(tmp_path: Path) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:14])
    seen = [observation(f"train-{number}", num_tokens=VOCAB_SIZE) for number in range(2)]
    knowing = room.add_matrix(seen)
    room.run()
    report = room.report(knowing)
    assert report is not None
    assert (report.role, report.champion_version, len(report.recent)) == ("recycling", 0, 14)
    assert decide(PromotionGate(), report, at=0.0).verdict == "promote"
    room.serve(knowing)
    same = room.add_matrix([*seen, observation("one more")], parent=1)
    room.run()
    report = room.report(same)
    assert report is not None
    assert report.champion_version == knowing.version
    assert decide(PromotionGate(), report, at=0.0).verdict == "hold"


def test_a_damaged_matrix_is_refused_once_and_never_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    room = Room(tmp_path)
    room.send(HELD_OUT[:12])
    version = room.add_matrix([observation("train")])
    path = local_path(version.artifact_uri, tmp_path / "artifacts") / "model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-8])
    room.run()
    room.run()
    assert room.report(version) is None
    assert sum("recycling version 1 is not judged" in record.message for record in caplog.records) == 1
