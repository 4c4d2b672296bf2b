"""What is served, by whom, and why: every pointer beside the replicas' acknowledgements (`slipstream status`).

Reads the pointer store only, so it works with the registry, the log and the promoter down.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from slipstream.promotion import PromotionDecision
from slipstream.stores.protocols import ACKNOWLEDGEMENT_TTL_S, PointerStore, WorkerStatus
from slipstream.versions import DEFAULT_DOMAIN, DRAFT, NO_VERSION, Acknowledgement, Place, ServingPointer

SILENT_AFTER_S = 120.0
"""A worker that has not reported for this long is shown as silent and counts as a problem."""

_NUM_DECISIONS = 5


class PlaceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What one pointer says, and what every replica that follows it answered last."""

    place: Place
    pointer: ServingPointer | None
    acknowledgements: tuple[Acknowledgement, ...]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the pointer store, the default draft's place first; `at` is seconds since the epoch."""

    places: tuple[PlaceStatus, ...]
    frozen: str | None
    workers: tuple[WorkerStatus, ...]
    decisions: tuple[PromotionDecision, ...]
    at: float


def read_status(pointers: PointerStore, *, at: float) -> Status:
    """The status now; raises StoreUnavailable."""
    places = [DRAFT, *(place for place in pointers.places() if place != DRAFT)]
    return Status(
        places=tuple(_read_place(pointers, place) for place in places),
        frozen=pointers.frozen(),
        workers=tuple(pointers.workers()),
        decisions=tuple(pointers.decisions(limit=_NUM_DECISIONS)),
        at=at,
    )


def _read_place(pointers: PointerStore, place: Place) -> PlaceStatus:
    return PlaceStatus(
        place=place, pointer=pointers.read(*place), acknowledgements=tuple(pointers.acknowledgements(*place))
    )


def problems(status: Status) -> list[str]:
    """What is not as it should be, one line each; empty when replicas and workers are heard and run what they should.

    No pointer yet is no problem: before the first promotion replicas acknowledge version 0.
    """
    found = [problem for at_place in status.places for problem in _problems_of(at_place)]
    if not status.workers:
        found.append("no worker heard: distiller, evaluator and promoter never reached this pointer store")
    for worker in status.workers:
        if status.at - worker.at > SILENT_AFTER_S:
            found.append(f"{worker.worker} has been silent for {_age(status, worker.at)}")
    return found


def _problems_of(one: PlaceStatus) -> Iterator[str]:
    for word in one.acknowledgements:
        problem = skew(one.pointer, word)
        if problem is not None:
            yield problem if one.place == DRAFT else f"{_name(one.place)}: {problem}"
    if one.acknowledgements:
        return
    if one.place == DRAFT:
        yield f"no replica heard within {ACKNOWLEDGEMENT_TTL_S:.0f} s: none runs, or none reaches the pointer store"
    elif one.pointer is not None and one.pointer.version != NO_VERSION:
        yield f"{_name(one.place)}: no replica follows this pointer; is the domain named in serving.draft_domains?"


def skew(pointer: ServingPointer | None, one: Acknowledgement) -> str | None:
    """How a replica differs from the pointer, or None; the digest decides, being that of the tensors in memory."""
    if pointer is None:
        return None
    if one.state == "refused":
        return f"{one.replica_id} refused generation {one.generation} and runs v{one.version}: {one.error}"
    if one.generation != pointer.generation:
        return f"{one.replica_id} runs generation {one.generation}, the pointer is at {pointer.generation}"
    if one.version != pointer.version or one.digest != pointer.digest:
        return (
            f"{one.replica_id} runs v{one.version} {short(one.digest)}, "
            f"the pointer says v{pointer.version} {short(pointer.digest)}"
        )
    return None


def render(status: Status) -> str:
    """The status as lines of text; ends with the problems, or with "ok"."""
    lines = [line for one in status.places for line in (_pointer_line(status, one), *_replica_lines(status, one))]
    lines += [f"promotion  {'allowed' if status.frozen is None else f'FROZEN: {status.frozen}'}"]
    lines += [*_worker_lines(status), *_decision_lines(status)]
    found = problems(status)
    lines += [f"PROBLEM    {one}" for one in found] or ["ok         every replica runs what the pointer says"]
    return "\n".join(lines)


def short(digest: str) -> str:
    """The first 12 characters of a digest, for people."""
    return digest[:12] or "-"


def _pointer_line(status: Status, one: PlaceStatus) -> str:
    name, pointer = _name(one.place), one.pointer
    if pointer is None:
        return f"pointer    {name}  none yet: {_without(one.place)}"
    age = _age(status, pointer.set_at)
    return (
        f"pointer    {name}  v{pointer.version}  generation {pointer.generation}  "
        f"digest {short(pointer.digest)}  set {age} ago: {pointer.reason}"
    )


def _without(place: Place) -> str:
    """What serves where there is no version."""
    if place.role == "recycling":
        return "Token Recycling starts empty, the first matrix is born from traffic"
    if place.domain != DEFAULT_DOMAIN:
        return f"requests of this domain use the draft of {DEFAULT_DOMAIN}"
    return "replicas serve without a draft, the first is born from traffic"


def _name(place: Place) -> str:
    return f"{place.role}/{place.domain}"


def _replica_lines(status: Status, place: PlaceStatus) -> Iterator[str]:
    for one in place.acknowledgements:
        verdict = "skewed" if skew(place.pointer, one) else "digest equal"
        yield (
            f"replica    {one.replica_id}  v{one.version}  generation {one.generation}  digest {short(one.digest)}  "
            f"{one.state}, {verdict}, heard {_age(status, one.at)} ago"
        )


def _worker_lines(status: Status) -> Iterator[str]:
    for one in status.workers:
        lag = "no lag" if one.lag < 0 else f"lag {one.lag} records"
        yield f"worker     {one.worker}  {lag}, heard {_age(status, one.at)} ago  {one.detail}"


def _decision_lines(status: Status) -> Iterator[str]:
    for one in status.decisions:
        yield (
            f"decision   {one.role}/{one.domain} {one.verdict} v{one.challenger_version} over v{one.champion_version}, "
            f"{_age(status, one.at)} ago: {one.reason}"
        )


def _age(status: Status, at: float) -> str:
    seconds = max(0.0, status.at - at)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
