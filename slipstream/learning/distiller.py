"""Observations in, draft versions out: what the distiller does between a poll of the log and a commit of its offsets.

    ingest    training observations go to the replay buffer, durably; the rest is counted and dropped
    train     steps are owed per new observation, so training runs while observations arrive and stops with them
    publish   stage artifact -> register -> settle buffer, save student -> alias challenger -> prune; then the same for
              the Token Recycling matrix of the same observations (`learning.matrices`)
    (caller)  commits `settled_ends` to the log: only now may the log forget

What makes a crash at any point harmless: the registry's lineages say which offsets versions cover; the buffer says
which observations were taken in beyond that. Both survive, so every acknowledged observation ends in exactly one
version's `lineage.json`, and no two versions cover an offset twice. One process may distil a role and domain at a time.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from slipstream.engine.artifact import load_verified, local_path
from slipstream.errors import ArtifactRejected, CheckpointError, RecordError
from slipstream.learning.distillation import Student, is_trainable, make_batch
from slipstream.learning.matrices import MatrixVersions
from slipstream.learning.replay import Kept, ReplayBuffer
from slipstream.models.checkpoint import Checkpoint, check_draft, load_checkpoint
from slipstream.models.decoder import initial_draft
from slipstream.records import Observation, decode_observation, is_held_out, observation_id
from slipstream.stores.protocols import LogEntry, ModelRegistry, PointerStore
from slipstream.telemetry import WorkerMetrics
from slipstream.versions import DEFAULT_DOMAIN, NO_VERSION, Lineage, ModelVersion, OffsetRange, Role, ServingPointer

_logger = logging.getLogger(__name__)

ROLE: Role = "draft"
LINEAGE_FILE = "lineage.json"
_PROTECTED_HISTORY = 10
_MAX_WAITING_VERSIONS = 4


class Curriculum(msgspec.Struct, frozen=True, kw_only=True):
    """What is learned from, how much of it makes a version, and what is kept.

    `initial` is the checkpoint directory of the very first student; None means fresh weights.
    """

    target_digest: str
    vocab_size: int
    observations_per_version: int
    steps_per_version: int
    batch_sequences: int
    learning_rate: float
    replay_ratio: float
    keep_versions: int
    domain: str = DEFAULT_DOMAIN
    code_commit: str = "unknown"
    initial: Path | None = None


class LineageFile(msgspec.Struct, frozen=True, kw_only=True):
    """`lineage.json` beside the weights: the ids of exactly the observations that this version added, sorted."""

    target_digest: str
    parent_version: int
    observation_ids: tuple[str, ...]


class _Outgoing(msgspec.Struct, frozen=True):
    """A staged artifact that the registry has not confirmed yet."""

    digest: str
    lineage: Lineage


class Distiller:
    """One student on one log at a time. Call `resume` first; every call may raise StoreUnavailable and be repeated."""

    def __init__(
        self,
        registry: ModelRegistry,
        pointers: PointerStore,
        buffer: ReplayBuffer,
        *,
        curriculum: Curriculum,
        state_dir: Path,
        artifact_root: Path,
        metrics: WorkerMetrics,
    ) -> None:
        self._registry = registry
        self._pointers = pointers
        self._buffer = buffer
        self._curriculum = curriculum
        self._state_dir = state_dir
        self._artifact_root = artifact_root
        self._metrics = metrics
        self._log = ""
        self._chance = random.Random(0)
        self._starts: dict[int, int] = {}
        self._positions: dict[int, int] = {}
        self._settled: dict[int, int] = {}
        self._pending: dict[str, tuple[int, int]] = {}
        self._versioned_ids: set[str] = set()
        self._steps_owed = 0.0
        self._steps_since_version = 0
        self._student: Student | None = None
        self._parent_version = NO_VERSION
        self._outgoing: _Outgoing | None = None
        self._unaliased = NO_VERSION
        self._warned_of_gap = False
        self._matrices = MatrixVersions(
            registry,
            pointers,
            target_digest=curriculum.target_digest,
            vocab_size=curriculum.vocab_size,
            keep_versions=curriculum.keep_versions,
            staging_dir=state_dir / "outgoing-matrix",
            artifact_root=artifact_root,
        )

    @property
    def settled_ends(self) -> dict[int, int]:
        """Per partition, the offset below which everything is in a registered version or was not for training."""
        return dict(self._settled)

    @property
    def wants_observations(self) -> bool:
        """Whether to read on: not while a full version waits for its training, nor far ahead of a lost registry."""
        enough = self._curriculum.observations_per_version * (_MAX_WAITING_VERSIONS if self._outgoing else 1)
        return len(self._pending) < enough

    @property
    def detail(self) -> str:
        """One line for `slipstream status`."""
        steps = self._student.num_steps if self._student else 0
        return (
            f"{len(self._pending)}/{self._curriculum.observations_per_version} observations towards the next version, "
            f"{len(self._buffer)} kept, parent {self._parent_version}, {steps} steps"
        )

    def resume(self, log: str) -> None:
        """Find out what versions cover, what was taken in beyond that, and where training stands.

        `log` is the log's identity: offsets in lineages and in the buffer that belong to another log do not count.
        """
        self._log, self._outgoing, self._unaliased, self._steps_since_version = log, None, NO_VERSION, 0
        self._buffer.adopt(log)
        lineages = self._registry.lineages(ROLE, self._curriculum.domain)
        ours = {version: one for version, one in lineages.items() if one.note == self._note()}
        self._settled = _covered(list(ours.values()))
        self._positions, self._pending = dict(self._settled), {}
        self._starts = dict(self._settled)
        for kept in self._buffer.kept():
            self._resume_from(kept)
        versions = self._registry.versions(ROLE, self._curriculum.domain)
        self._versioned_ids = {
            name for version in versions if version.lineage.offsets for name in self._ids_of(version)
        }
        self._steps_owed = len(self._pending) * self._steps_per_observation()
        newest_trained = max(ours, default=NO_VERSION)
        self._restore_student(newest_trained, versions)
        self._matrices.resume(kept.observation for kept in self._buffer.kept())
        self._buffer.settle(self._settled)
        challenger = self._registry.alias(ROLE, self._curriculum.domain, "challenger")
        if newest_trained in {version.version for version in versions} and (challenger or NO_VERSION) < newest_trained:
            self._unaliased = newest_trained

    def ingest(self, entries: Sequence[LogEntry]) -> None:
        """Take in what was polled; on return the training observations among them are durable in the buffer."""
        num_before = len(self._pending)
        for entry in entries:
            self._metrics.consumed.labels(self._take_in(entry)).inc()
        self._buffer.flush()
        self._steps_owed += (len(self._pending) - num_before) * self._steps_per_observation()

    def train(self, *, max_steps: int) -> int:
        """At most `max_steps` of the owed optimizer steps; returns how many were made."""
        num_steps = 0
        while self._student is not None and self._steps_owed >= 1 and num_steps < max_steps:
            observations = self._buffer.sample(
                self._curriculum.batch_sequences,
                num_fresh=max(self._curriculum.observations_per_version, len(self._pending)),
                replay_ratio=self._curriculum.replay_ratio,
                chance=self._chance,
            )
            self._metrics.train_loss.set(self._student.train_step(make_batch(observations)))
            self._metrics.train_steps.inc()
            self._steps_owed -= 1
            num_steps += 1
        self._steps_since_version += num_steps
        return num_steps

    def publish(self) -> ModelVersion | None:
        """Register the next draft version, if due, and its matrix; the draft's version, or None.

        Finishes what an outage interrupted.
        """
        registered = None
        if self._outgoing is None and self._is_due():
            self._outgoing = self._stage()
        if self._outgoing is not None:
            registered = self._registry.register(
                ROLE,
                self._curriculum.domain,
                self._staging_dir(),
                digest=self._outgoing.digest,
                lineage=self._outgoing.lineage,
            )
            self._settle(registered)
        if self._unaliased:
            self._registry.set_alias(ROLE, self._curriculum.domain, "challenger", self._unaliased)
            self._unaliased = NO_VERSION
            self._prune()
        self._matrices.publish()
        return registered

    def _take_in(self, entry: LogEntry) -> str:
        """What became of an entry, as the metric's label."""
        is_redelivered = entry.offset < self._positions.get(entry.partition, 0)
        if not is_redelivered:
            self._starts.setdefault(entry.partition, entry.offset)
            self._positions[entry.partition] = entry.offset + 1
        try:
            observation = decode_observation(entry.record)
        except RecordError as error:
            _logger.warning("partition %d offset %d: %s", entry.partition, entry.offset, error)
            return "skipped"
        if is_held_out(observation.request_id):
            return "held_out"
        if not self._is_wanted(observation):
            return "skipped"
        name = observation_id(observation)
        is_known = name in self._buffer or name in self._versioned_ids
        if is_redelivered or is_known:
            self._warn_of_gap(entry, is_known=is_known)
            return "duplicate"
        self._buffer.append(Kept(entry.partition, entry.offset, observation))
        self._pending[name] = (entry.partition, entry.offset)
        self._matrices.take_in(observation)
        return "train"

    def _is_wanted(self, observation: Observation) -> bool:
        return observation.target_digest == self._curriculum.target_digest and is_trainable(
            observation, vocab_size=self._curriculum.vocab_size
        )

    def _warn_of_gap(self, entry: LogEntry, *, is_known: bool) -> None:
        if is_known or self._warned_of_gap:
            return
        self._warned_of_gap = True
        _logger.warning(
            "partition %d offset %d lies below %d, which versions cover, but holds an observation never seen: it is "
            "skipped. The log lost its latest records in a crash and gave their offsets to others",
            entry.partition,
            entry.offset,
            self._positions[entry.partition],
        )

    def _resume_from(self, kept: Kept) -> None:
        """A buffered observation that no version covers is pending, and everything before it was taken in."""
        if kept.offset < self._settled.get(kept.partition, 0):
            return
        self._pending[observation_id(kept.observation)] = (kept.partition, kept.offset)
        self._starts[kept.partition] = min(kept.offset, self._starts.get(kept.partition, kept.offset))
        self._positions[kept.partition] = max(kept.offset + 1, self._positions.get(kept.partition, 0))

    def _is_due(self) -> bool:
        return len(self._pending) >= self._curriculum.observations_per_version and self._steps_owed < 1

    def _stage(self) -> _Outgoing:
        """Write the next version's files; they stay the same until the registry confirms them."""
        assert self._student is not None
        directory = self._staging_dir()
        shutil.rmtree(directory, ignore_errors=True)
        digest = self._student.snapshot(directory)
        lineage = Lineage(
            target_digest=self._curriculum.target_digest,
            parent_version=self._parent_version,
            offsets=tuple(
                OffsetRange(partition, self._starts[partition], end)
                for partition, end in sorted(self._positions.items())
                if end > self._starts.get(partition, end)
            ),
            num_observations=len(self._pending),
            num_train_steps=self._steps_since_version,
            code_commit=self._curriculum.code_commit,
            note=self._note(),
        )
        names = LineageFile(
            target_digest=lineage.target_digest,
            parent_version=lineage.parent_version,
            observation_ids=tuple(sorted(self._pending)),
        )
        (directory / LINEAGE_FILE).write_bytes(msgspec.json.encode(names))
        self._matrices.stage(lineage)
        return _Outgoing(digest, lineage)

    def _settle(self, version: ModelVersion) -> None:
        """The registry has the version: what it covers is no longer pending."""
        assert self._student is not None
        self._outgoing, self._unaliased, self._parent_version = None, version.version, version.version
        self._steps_since_version = 0
        self._settled |= {one.partition: one.end for one in version.lineage.offsets}
        self._starts |= self._settled
        self._pending = {
            name: (partition, offset)
            for name, (partition, offset) in self._pending.items()
            if offset >= self._settled.get(partition, 0)
        }
        self._metrics.versions.inc()
        self._student.save(self._student_path(), version=version.version)
        self._buffer.settle(self._settled)
        _logger.info("registered draft version %d: %s", version.version, version.lineage)

    def _restore_student(self, newest_trained: int, versions: Sequence[ModelVersion]) -> None:
        """The saved student if it stands at the newest version trained here, else the best known starting point."""
        try:
            self._student, self._parent_version = Student.restore(
                self._student_path(), learning_rate=self._curriculum.learning_rate
            )
        except CheckpointError as error:
            if self._student_path().exists():
                _logger.warning("%s", error)
        else:
            if self._parent_version == newest_trained:
                return
        pointer = self._pointers.read(ROLE, self._curriculum.domain)
        for version, checkpoint in self._starting_points(pointer, versions):
            self._parent_version = version
            self._student = Student(checkpoint.config, checkpoint.weights, learning_rate=self._curriculum.learning_rate)
            _logger.info("training starts from %s", f"draft version {version}" if version else "the initial draft")
            return
        config, weights = initial_draft(self._curriculum.vocab_size, seed=0)
        self._parent_version = NO_VERSION
        self._student = Student(config, weights, learning_rate=self._curriculum.learning_rate)
        _logger.info("training starts from fresh weights")

    def _starting_points(
        self, pointer: ServingPointer | None, versions: Sequence[ModelVersion]
    ) -> Iterator[tuple[int, Checkpoint]]:
        """What is served, then what was registered last, then the initial draft: those that load, with versions."""
        same_target = [one for one in versions if one.lineage.target_digest == self._curriculum.target_digest]
        known: list[ModelVersion | ServingPointer] = list(reversed(same_target))
        if pointer is not None and pointer.version and pointer.target_digest == self._curriculum.target_digest:
            known.insert(0, pointer)
        for one in known:
            try:
                checkpoint = load_verified(local_path(one.artifact_uri, self._artifact_root), digest=one.digest)
                check_draft(checkpoint, vocab_size=self._curriculum.vocab_size)
                yield one.version, checkpoint
            except ArtifactRejected as error:
                _logger.warning("cannot start from draft version %d: %s", one.version, error)
        if self._curriculum.initial is not None:
            yield NO_VERSION, load_checkpoint(self._curriculum.initial)

    def _ids_of(self, version: ModelVersion) -> tuple[str, ...]:
        """The observation ids of a version, or none if it has no readable `lineage.json`."""
        try:
            path = local_path(version.artifact_uri, self._artifact_root) / LINEAGE_FILE
            return msgspec.json.decode(path.read_bytes(), type=LineageFile).observation_ids
        except (ArtifactRejected, OSError, msgspec.MsgspecError) as error:
            _logger.warning("draft version %d has no readable %s: %s", version.version, LINEAGE_FILE, error)
            return ()

    def _prune(self) -> None:
        """Keep the newest versions, the aliased ones, and whatever was served lately (a rollback may need it)."""
        history = self._pointers.history(ROLE, self._curriculum.domain, limit=_PROTECTED_HISTORY)
        self._registry.prune(
            ROLE,
            self._curriculum.domain,
            keep=self._curriculum.keep_versions,
            protected=frozenset(pointer.version for pointer in history),
        )

    def _steps_per_observation(self) -> float:
        return self._curriculum.steps_per_version / self._curriculum.observations_per_version

    def _note(self) -> str:
        return f"log {self._log}"

    def _staging_dir(self) -> Path:
        return self._state_dir / "outgoing"

    def _student_path(self) -> Path:
        return self._state_dir / "student.safetensors"


def _covered(lineages: Sequence[Lineage]) -> dict[int, int]:
    """The highest covered offset of each partition, plus one."""
    ends: dict[int, int] = {}
    for one in lineages:
        for offsets in one.offsets:
            ends[offsets.partition] = max(offsets.end, ends.get(offsets.partition, 0))
    return ends
