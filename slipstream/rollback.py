"""Rollback: an operator's move of the pointer. Needs the pointer store alone; promoter and registry may be dead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from slipstream.errors import UnknownVersion
from slipstream.stores.protocols import HISTORY_LIMIT, PointerStore
from slipstream.versions import NO_VERSION, Role, ServingPointer

REASON_PREFIX = "rollback: "
"""How the reason of every rollback begins in the pointer's history."""


def rollback(
    pointers: PointerStore, *, role: Role, domain: str, to_version: int | None = None, reason: str = ""
) -> ServingPointer:
    """Point at an earlier version and freeze promotion in the same step; the pointer that was set.

    `to_version` None means the version that the current one replaced (what rollbacks undid does not count); for the
    first version that is 0, which serves without one. Takes a new fencing token first, so that no promoter moves
    the pointer meanwhile.
    Raises UnknownVersion if the history does not hold that version, or if there is no pointer yet; StalePointer or
    StaleFence if another operator was faster.
    """
    fencing_token = pointers.issue_fencing_token()
    history = pointers.history(role, domain, limit=HISTORY_LIMIT)
    if not history:
        raise UnknownVersion(
            f"the store holds no pointer of {role} {domain!r}, so there is nothing to roll back to: none was ever set, "
            "or the store lost its data; in that case the promoter sets it again: start it if it is down, then repeat"
        )
    current = history[0]
    wanted = _previous_version(history) if to_version is None else to_version
    place = _place_of(history, wanted)
    pointer = msgspec.structs.replace(
        current,
        version=wanted,
        artifact_uri=place.artifact_uri if place else "",
        digest=place.digest if place else "",
        target_digest=place.target_digest if place else current.target_digest,
        generation=current.generation + 1,
        fencing_token=fencing_token,
        reason=f"{REASON_PREFIX}version {current.version} to {wanted}" + (f", {reason}" if reason else ""),
        set_at=time.time(),
    )
    pointers.advance(pointer, expected_generation=current.generation, is_operator=True)
    return pointer


def rolled_back_versions(history: Sequence[ServingPointer]) -> frozenset[int]:
    """Versions that an operator moved away from and did not bring back (`history` newest first)."""
    left = {
        older.version
        for newer, older in pairwise(history)
        if newer.reason.startswith(REASON_PREFIX) and older.version != newer.version
    }
    return frozenset(left.difference(_path_to_current(history)))


def _previous_version(history: Sequence[ServingPointer]) -> int:
    path = _path_to_current(history)
    return path[-2] if len(path) > 1 else NO_VERSION


def _path_to_current(history: Sequence[ServingPointer]) -> list[int]:
    """The versions that led to the current one, oldest first, without what rollbacks undid."""
    path: list[int] = []
    for pointer in reversed(history):
        if pointer.reason.startswith(REASON_PREFIX) and pointer.version in path:
            del path[path.index(pointer.version) :]
        elif pointer.reason.startswith(REASON_PREFIX) and pointer.version == NO_VERSION:
            path.clear()
        path.append(pointer.version)
    return path


def _place_of(history: Sequence[ServingPointer], version: int) -> ServingPointer | None:
    """The newest pointer at this version; None for version 0, which has no files."""
    if version == NO_VERSION:
        return None
    found = next((one for one in history if one.version == version), None)
    if found is None:
        known = sorted({one.version for one in history} | {NO_VERSION})
        raise UnknownVersion(f"version {version} was never served for {history[0].domain!r}; expected one of {known}")
    return found
