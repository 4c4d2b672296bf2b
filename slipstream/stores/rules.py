"""What every implementation of a store checks and says, in one place, so that no two differ."""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.errors import PromotionFrozen, RecordError, StaleFence, StalePointer, UnknownVersion
from slipstream.records import MAX_RECORD_BYTES
from slipstream.versions import Role, ServingPointer


def check_record_sizes(records: Sequence[tuple[str, bytes]]) -> None:
    """Raise RecordError if one record is longer than every log accepts."""
    for key, record in records:
        if len(record) > MAX_RECORD_BYTES:
            raise RecordError(
                f"the record of request {key!r} has {len(record)} bytes, the log takes at most {MAX_RECORD_BYTES}; "
                "cut it into smaller chunks"
            )


def prunable(versions: Sequence[int], *, keep: int, spared: frozenset[int] | set[int]) -> list[int]:
    """The versions that `ModelRegistry.prune` deletes, ascending; ValueError if `keep` is negative."""
    if keep < 0:
        raise ValueError(f"keep={keep}: expected 0 or more versions")
    ascending = sorted(versions)
    return [version for version in ascending[: max(0, len(ascending) - keep)] if version not in spared]


def unknown_version(role: Role, domain: str, version: int, kept: Sequence[int]) -> UnknownVersion:
    """The error for a version that the registry does not hold."""
    span = f"versions {min(kept)} to {max(kept)}" if kept else "no versions"
    return UnknownVersion(f"{role} version {version} of domain {domain!r} is not in the registry, which has {span}")


def check_generation(pointer: ServingPointer, expected_generation: int) -> None:
    """Raise ValueError unless the pointer's generation is the one after `expected_generation`."""
    if pointer.generation != expected_generation + 1:
        raise ValueError(
            f"pointer generation {pointer.generation}: expected {expected_generation + 1}, one above the expected one"
        )


def stale_fence(pointer: ServingPointer, fence: int) -> StaleFence:
    """The error for a writer that was superseded."""
    return StaleFence(
        f"fencing token {pointer.fencing_token} is older than {fence}, which was issued since; "
        "another writer took over: take a new token and read the pointer again"
    )


def stale_pointer(pointer: ServingPointer, generation: int) -> StalePointer:
    """The error for a lost compare-and-set."""
    return StalePointer(
        f"the pointer of {pointer.role} {pointer.domain!r} is at generation {generation}, expected "
        f"{pointer.generation - 1}; read it again and decide anew"
    )


def promotion_frozen(reason: str) -> PromotionFrozen:
    """The error for a promotion while an operator has frozen it."""
    return PromotionFrozen(f"promotion is frozen ({reason}); `slipstream unfreeze` releases it")
