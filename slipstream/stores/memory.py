"""The in-memory twins of the stores: the reference for what every implementation must do, and what tests stand on.

They live and die with the process and are safe to use from several threads.
"""

from __future__ import annotations

import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from slipstream.errors import StoreError
from slipstream.promotion import EvaluationReport, PromotionDecision
from slipstream.stores.artifacts import checked_name, delete_artifact, lineage_key, store_artifact
from slipstream.stores.protocols import ACKNOWLEDGEMENT_TTL_S, HISTORY_LIMIT, Alias, LogEntry, WorkerStatus
from slipstream.stores.rules import (
    check_generation,
    check_record_sizes,
    promotion_frozen,
    prunable,
    stale_fence,
    stale_pointer,
    unknown_version,
)
from slipstream.versions import Acknowledgement, Lineage, ModelVersion, Place, Role, ServingPointer


class _Group:
    """One consumer group: committed ends by partition, members in the order they joined."""

    def __init__(self) -> None:
        self.committed: dict[int, int] = {}
        self.members: list[MemorySubscription] = []
        self.generation = 0


class MemoryLog:
    """An `ObservationLog` in memory that keeps the latest `max_records`, spread evenly over the partitions."""

    def __init__(self, *, num_partitions: int = 4, max_records: int = 20_000) -> None:
        per_partition = max(1, max_records // num_partitions)
        self._kept: list[deque[bytes]] = [deque(maxlen=per_partition) for _ in range(num_partitions)]
        self._ends = [0] * num_partitions
        self._groups: dict[str, _Group] = {}
        self._identity = f"memory {uuid.uuid4().hex}"
        self._changed = threading.Condition()

    def append(self, records: Sequence[tuple[str, bytes]]) -> None:
        """See `ObservationLog.append`."""
        check_record_sizes(records)
        with self._changed:
            for key, record in records:
                partition = zlib.crc32(key.encode()) % len(self._kept)
                self._kept[partition].append(record)
                self._ends[partition] += 1
            self._changed.notify_all()

    def subscribe(self, group: str) -> MemorySubscription:
        """See `ObservationLog.subscribe`."""
        with self._changed:
            return MemorySubscription(self, self._groups.setdefault(group, _Group()))

    def identity(self) -> str:
        """See `ObservationLog.identity`."""
        return self._identity

    def close(self) -> None:
        """Nothing to release."""


class MemorySubscription:
    """A `Subscription` of `MemoryLog`; the members of a group divide the partitions among themselves."""

    def __init__(self, log: MemoryLog, group: _Group) -> None:
        self._log = log
        self._group = group
        self._generation = -1
        self._positions: dict[int, int] = {}
        group.members.append(self)
        group.generation += 1

    def poll(self, *, max_records: int, timeout_s: float) -> list[LogEntry]:
        """See `Subscription.poll`."""
        deadline = time.monotonic() + timeout_s
        with self._log._changed:
            while not (entries := self._take(max_records)):
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    return []
                self._log._changed.wait(remaining_s)
            return entries

    def commit(self, ends: Mapping[int, int]) -> None:
        """See `Subscription.commit`."""
        with self._log._changed:
            for partition, end in ends.items():
                self._group.committed[partition] = max(end, self._group.committed.get(partition, 0))

    def lag(self) -> int:
        """See `Subscription.lag`."""
        with self._log._changed:
            return sum(
                end - max(self._group.committed.get(partition, 0), self._first_kept(partition))
                for partition, end in enumerate(self._log._ends)
            )

    def close(self) -> None:
        """See `Subscription.close`; closing again does nothing."""
        with self._log._changed:
            if self in self._group.members:
                self._group.members.remove(self)
                self._group.generation += 1
                self._log._changed.notify_all()

    def _take(self, max_records: int) -> list[LogEntry]:
        self._follow_rebalance()
        entries: list[LogEntry] = []
        for partition, position in self._positions.items():
            first, kept = self._first_kept(partition), self._log._kept[partition]
            start = max(position, first)
            end = min(self._log._ends[partition], start + max_records - len(entries))
            entries.extend(LogEntry(partition, offset, kept[offset - first]) for offset in range(start, end))
            self._positions[partition] = end
        return entries

    def _follow_rebalance(self) -> None:
        if self not in self._group.members:
            raise StoreError("this subscription is closed; subscribe again")
        if self._generation != self._group.generation:
            self._generation = self._group.generation
            rank, num_members = self._group.members.index(self), len(self._group.members)
            mine = range(rank, len(self._log._kept), num_members)
            self._positions = {partition: self._group.committed.get(partition, 0) for partition in mine}

    def _first_kept(self, partition: int) -> int:
        return self._log._ends[partition] - len(self._log._kept[partition])


class MemoryRegistry:
    """A `ModelRegistry` in memory; only the copies of the artifacts lie on disk, under `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._versions: dict[tuple[Role, str], dict[int, ModelVersion]] = {}
        self._lineages: dict[tuple[Role, str], dict[int, Lineage]] = {}
        self._aliases: dict[tuple[Role, str, Alias], int] = {}
        self._reports: dict[tuple[Role, str, int], EvaluationReport] = {}
        self._lock = threading.Lock()

    def register(self, role: Role, domain: str, artifact_dir: Path, *, digest: str, lineage: Lineage) -> ModelVersion:
        """See `ModelRegistry.register`."""
        key = lineage_key(digest, lineage)
        with self._lock:
            kept = self._versions.setdefault((role, domain), {})
            for version in kept.values():
                if lineage_key(version.digest, version.lineage) == key:
                    return version
            uri = store_artifact(artifact_dir, self._root / role / checked_name("domain", domain) / key)
            lineages = self._lineages.setdefault((role, domain), {})
            number = len(lineages) + 1
            lineages[number] = lineage
            kept[number] = ModelVersion(
                role=role,
                domain=domain,
                version=number,
                artifact_uri=uri,
                digest=digest,
                lineage=lineage,
                created_at=time.time(),
            )
            return kept[number]

    def get(self, role: Role, domain: str, version: int) -> ModelVersion:
        """See `ModelRegistry.get`."""
        with self._lock:
            return self._get(role, domain, version)

    def versions(self, role: Role, domain: str) -> list[ModelVersion]:
        """See `ModelRegistry.versions`."""
        with self._lock:
            return list(self._versions.get((role, domain), {}).values())

    def set_alias(self, role: Role, domain: str, alias: Alias, version: int) -> None:
        """See `ModelRegistry.set_alias`."""
        with self._lock:
            self._get(role, domain, version)
            self._aliases[role, domain, alias] = version

    def alias(self, role: Role, domain: str, alias: Alias) -> int | None:
        """See `ModelRegistry.alias`."""
        with self._lock:
            return self._aliases.get((role, domain, alias))

    def record_report(self, report: EvaluationReport) -> None:
        """See `ModelRegistry.record_report`."""
        with self._lock:
            self._get(report.role, report.domain, report.challenger_version)
            self._reports[report.role, report.domain, report.challenger_version] = report

    def report(self, role: Role, domain: str, version: int) -> EvaluationReport | None:
        """See `ModelRegistry.report`."""
        with self._lock:
            self._get(role, domain, version)
            return self._reports.get((role, domain, version))

    def prune(self, role: Role, domain: str, *, keep: int, protected: frozenset[int] = frozenset()) -> list[int]:
        """See `ModelRegistry.prune`."""
        with self._lock:
            kept = self._versions.get((role, domain), {})
            aliased = {version for (*place, _), version in self._aliases.items() if place == [role, domain]}
            gone = prunable(list(kept), keep=keep, spared=protected | aliased)
            for version in gone:
                delete_artifact(kept.pop(version).artifact_uri, root=self._root)
                self._reports.pop((role, domain, version), None)
            return gone

    def lineages(self, role: Role, domain: str) -> dict[int, Lineage]:
        """See `ModelRegistry.lineages`."""
        with self._lock:
            return dict(self._lineages.get((role, domain), {}))

    def close(self) -> None:
        """Nothing to release."""

    def _get(self, role: Role, domain: str, version: int) -> ModelVersion:
        kept = self._versions.get((role, domain), {})
        if version not in kept:
            raise unknown_version(role, domain, version, list(kept))
        return kept[version]


class MemoryPointers:
    """A `PointerStore` in memory."""

    def __init__(self, *, acknowledgement_ttl_s: float = ACKNOWLEDGEMENT_TTL_S) -> None:
        self._ttl_s = acknowledgement_ttl_s
        self._fence = 0
        self._frozen: str | None = None
        self._history: dict[tuple[Role, str], deque[ServingPointer]] = {}
        self._acknowledgements: dict[tuple[Role, str], dict[str, tuple[float, Acknowledgement]]] = {}
        self._decisions: deque[PromotionDecision] = deque(maxlen=HISTORY_LIMIT)
        self._workers: dict[str, WorkerStatus] = {}
        self._num_moves = 0
        # By thread: several followers may share this object, and none may take another's announcement.
        self._seen = threading.local()
        self._moved = threading.Condition()

    def issue_fencing_token(self) -> int:
        """See `PointerStore.issue_fencing_token`."""
        with self._moved:
            self._fence += 1
            return self._fence

    def read(self, role: Role, domain: str) -> ServingPointer | None:
        """See `PointerStore.read`."""
        with self._moved:
            history = self._history.get((role, domain))
            return history[0] if history else None

    def advance(self, pointer: ServingPointer, *, expected_generation: int, is_operator: bool = False) -> None:
        """See `PointerStore.advance`."""
        check_generation(pointer, expected_generation)
        with self._moved:
            history = self._history.setdefault((pointer.role, pointer.domain), deque(maxlen=HISTORY_LIMIT))
            if history and history[0] == pointer:
                return
            if pointer.fencing_token < self._fence:
                raise stale_fence(pointer, self._fence)
            generation = history[0].generation if history else 0
            if generation != expected_generation:
                raise stale_pointer(pointer, generation)
            if self._frozen is not None and not is_operator:
                raise promotion_frozen(self._frozen)
            self._fence = pointer.fencing_token
            if is_operator:
                self._frozen = pointer.reason
            history.appendleft(pointer)
            self._num_moves += 1
            self._moved.notify_all()

    def history(self, role: Role, domain: str, *, limit: int) -> list[ServingPointer]:
        """See `PointerStore.history`."""
        with self._moved:
            return list(self._history.get((role, domain), ()))[:limit]

    def places(self) -> list[Place]:
        """See `PointerStore.places`."""
        with self._moved:
            moved = {place for place, history in self._history.items() if history}
            return sorted(Place(*place) for place in moved | self._acknowledgements.keys())

    def freeze(self, reason: str) -> None:
        """See `PointerStore.freeze`."""
        with self._moved:
            self._frozen = reason

    def unfreeze(self) -> None:
        """See `PointerStore.unfreeze`."""
        with self._moved:
            self._frozen = None

    def frozen(self) -> str | None:
        """See `PointerStore.frozen`."""
        with self._moved:
            return self._frozen

    def wait_for_move(self, *, timeout_s: float) -> bool:
        """See `PointerStore.wait_for_move`."""
        with self._moved:
            seen = getattr(self._seen, "num_moves", 0)
            has_moved = self._moved.wait_for(lambda: self._num_moves > seen, timeout_s)
            self._seen.num_moves = self._num_moves
            return has_moved

    def acknowledge(self, acknowledgement: Acknowledgement) -> None:
        """See `PointerStore.acknowledge`."""
        with self._moved:
            place = self._acknowledgements.setdefault((acknowledgement.role, acknowledgement.domain), {})
            place[acknowledgement.replica_id] = (time.monotonic(), acknowledgement)

    def acknowledgements(self, role: Role, domain: str) -> list[Acknowledgement]:
        """See `PointerStore.acknowledgements`."""
        oldest = time.monotonic() - self._ttl_s
        with self._moved:
            heard = sorted(self._acknowledgements.get((role, domain), {}).items())
            return [word for _, (at, word) in heard if at >= oldest]

    def record_decision(self, decision: PromotionDecision) -> None:
        """See `PointerStore.record_decision`."""
        with self._moved:
            self._decisions.appendleft(decision)

    def decisions(self, *, limit: int) -> list[PromotionDecision]:
        """See `PointerStore.decisions`."""
        with self._moved:
            return list(self._decisions)[:limit]

    def report_worker(self, status: WorkerStatus) -> None:
        """See `PointerStore.report_worker`."""
        with self._moved:
            self._workers[status.worker] = status

    def workers(self) -> list[WorkerStatus]:
        """See `PointerStore.workers`."""
        with self._moved:
            return [status for _, status in sorted(self._workers.items())]

    def close(self) -> None:
        """Nothing to release."""
