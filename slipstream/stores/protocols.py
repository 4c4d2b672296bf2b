"""The three seams between processes. `tests/stores` holds the one contract suite that every implementation passes.

All calls block, raise StoreUnavailable when the store does not answer in bounded time, and may then be repeated.
Implementations are safe to use from several threads, except a `Subscription`, which belongs to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from slipstream.promotion import EvaluationReport, PromotionDecision
from slipstream.versions import Acknowledgement, Lineage, ModelVersion, Place, Role, ServingPointer


class LogEntry(msgspec.Struct, frozen=True):
    """One record of the log and its place; `record` is undecoded, so that a consumer decides about poison."""

    partition: int
    offset: int
    record: bytes


class Subscription(Protocol):
    """One member of a consumer group.

    Starts at the group's committed offsets, or at the oldest kept record. What was polled and not committed is
    delivered again to the group's next member.
    """

    def poll(self, *, max_records: int, timeout_s: float) -> list[LogEntry]:
        """Up to `max_records` further entries, in offset order per partition; empty after `timeout_s` without one.

        After StoreUnavailable nothing counts as delivered: what a lost reply held comes with the next call.
        """

    def commit(self, ends: Mapping[int, int]) -> None:
        """Durably mark everything below `ends[partition]` as processed; partitions left out stay as they are.

        Where members share a partition entry by entry (Redis), another member's deliveries stay that member's.
        """

    def lag(self) -> int:
        """Records in the log that this group has not committed."""

    def close(self) -> None:
        """Leave the group without committing."""


class ObservationLog(Protocol):
    """An append-only, partitioned, bounded log of encoded observations; delivery is at least once."""

    def append(self, records: Sequence[tuple[str, bytes]]) -> None:
        """Store `(request id, record)` pairs; all are acknowledged by the store on return.

        After StoreUnavailable some may be stored: repeat the call, consumers recognise duplicates.
        Raises RecordError, storing nothing, if one is longer than MAX_RECORD_BYTES.
        """

    def subscribe(self, group: str) -> Subscription:
        """Join a consumer group."""

    def identity(self) -> str:
        """A name of this log that no other log ever has, not even one that takes its place after its data was lost.

        Offsets mean something together with it only. May be remembered between two failures of the server.
        """

    def close(self) -> None:
        """Release connections."""


Alias = Literal["champion", "challenger"]


class ModelRegistry(Protocol):
    """Versions, their lineage, aliases and evaluation reports; a version's files never change."""

    def register(self, role: Role, domain: str, artifact_dir: Path, *, digest: str, lineage: Lineage) -> ModelVersion:
        """A new version, one above the highest ever given, holding a copy of `artifact_dir` (flat, regular files).

        Idempotent: if a version of the same role and domain with the same digest and lineage exists, that one is
        returned. Raises ArtifactRejected if the directory is empty or holds links or directories, ValueError for a
        domain that cannot be part of a path.
        """

    def get(self, role: Role, domain: str, version: int) -> ModelVersion:
        """That version; raises UnknownVersion."""

    def versions(self, role: Role, domain: str) -> list[ModelVersion]:
        """All kept versions, ascending."""

    def set_alias(self, role: Role, domain: str, alias: Alias, version: int) -> None:
        """Point an alias at a version; raises UnknownVersion."""

    def alias(self, role: Role, domain: str, alias: Alias) -> int | None:
        """The version an alias points at, or None."""

    def record_report(self, report: EvaluationReport) -> None:
        """Attach a report to its challenger, replacing an earlier one; raises UnknownVersion."""

    def report(self, role: Role, domain: str, version: int) -> EvaluationReport | None:
        """The latest report on a version, or None; raises UnknownVersion."""

    def prune(self, role: Role, domain: str, *, keep: int, protected: frozenset[int] = frozenset()) -> list[int]:
        """Delete all but the newest `keep` versions, sparing aliased and `protected` ones; returns what went.

        The lineage of a deleted version stays readable through `lineages`.
        """

    def lineages(self, role: Role, domain: str) -> dict[int, Lineage]:
        """The lineage of every version ever registered, pruned ones included."""

    def close(self) -> None:
        """Release connections."""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's last word about itself, for `slipstream status`; `lag` in records, -1 if it has none."""

    worker: str
    lag: int
    detail: str
    at: float


class PointerStore(Protocol):
    """The pointer per role and domain: the truth about what is served."""

    def issue_fencing_token(self) -> int:
        """A token higher than every one issued before; from now on writers with older ones are refused."""

    def read(self, role: Role, domain: str) -> ServingPointer | None:
        """The current pointer, or None if none was ever set."""

    def advance(self, pointer: ServingPointer, *, expected_generation: int, is_operator: bool = False) -> None:
        """Move the pointer, append it to the history and announce it: one atomic compare-and-set.

        `pointer.generation` must be `expected_generation + 1` (ValueError else); `expected_generation` 0 means that
        none was ever set. Raises StaleFence if the token is older than the newest issued, StalePointer if the
        generation is not the expected one, PromotionFrozen if promotion is frozen and `is_operator` is False. An
        operator's move freezes promotion in the same step. Repeating the move that is already the current pointer
        succeeds and changes nothing: the reply to the first try may have been lost.
        """

    def history(self, role: Role, domain: str, *, limit: int) -> list[ServingPointer]:
        """The latest pointers, newest first, the current one included."""

    def places(self) -> list[Place]:
        """Every role and domain that ever had a pointer or an acknowledgement, sorted."""

    def freeze(self, reason: str) -> None:
        """Refuse promotions until `unfreeze`."""

    def unfreeze(self) -> None:
        """Allow promotions again."""

    def frozen(self) -> str | None:
        """Why promotion is frozen, or None if it is not."""

    def wait_for_move(self, *, timeout_s: float) -> bool:
        """Return True early if any pointer was announced since this thread's last call on this object, else False.

        A hint only: announcements can be lost, so callers also poll `read`. Raises nothing during an outage: it
        then waits out the time and returns False.
        """

    def acknowledge(self, acknowledgement: Acknowledgement) -> None:
        """Record what a replica runs, replacing its earlier word for that role and domain."""

    def acknowledgements(self, role: Role, domain: str) -> list[Acknowledgement]:
        """The last word of every replica heard of within the last ACKNOWLEDGEMENT_TTL_S, by replica id."""

    def record_decision(self, decision: PromotionDecision) -> None:
        """Append to the bounded list of decisions."""

    def decisions(self, *, limit: int) -> list[PromotionDecision]:
        """The latest decisions, newest first."""

    def report_worker(self, status: WorkerStatus) -> None:
        """Record a worker's status, replacing its earlier one."""

    def workers(self) -> list[WorkerStatus]:
        """The last status of every worker, by name."""

    def close(self) -> None:
        """Release connections."""


ACKNOWLEDGEMENT_TTL_S = 60.0
"""A replica that has not repeated its acknowledgement for this long is gone."""

HISTORY_LIMIT = 1000
"""Pointers and decisions kept."""
