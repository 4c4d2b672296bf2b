"""What the demo must show: drafts were promoted, and the last one beats the first on the same held-out requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from urllib.parse import unquote, urlsplit

import msgspec
import torch

from slipstream.errors import RecordError
from slipstream.learning import shadow
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.promotion import lower_bound
from slipstream.records import Observation, decode_observation, is_held_out
from slipstream.stores.protocols import ObservationLog
from slipstream.versions import ServingPointer

MAX_REQUESTS_PER_DOMAIN = 60
_QUIET_S = 1.0


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two drafts replayed on the same held-out requests of one domain.

    `gain` is the mean paired difference in acceptance length, last minus first, `gain_low` its 95 % lower bound.
    """

    domain: str
    num_requests: int
    first_rate: float
    last_rate: float
    first_length: float
    last_length: float
    gain: float
    gain_low: float


def promoted(history: Sequence[ServingPointer]) -> list[ServingPointer]:
    """The pointers that promotion moved to a draft, oldest first, from a history that is newest first.

    The very first pointer counts only if its version was trained from traffic: an initial draft names itself so.
    """
    return [one for one in reversed(history) if one.version and not one.reason.startswith(("initial", "rollback"))]


def held_out(log: ObservationLog, *, group: str) -> list[Observation]:
    """Every held-out observation that the log still keeps, in its order; damaged records are left out."""
    subscription = log.subscribe(group)
    found: dict[tuple[str, int], Observation] = {}
    try:
        while entries := subscription.poll(max_records=500, timeout_s=_QUIET_S):
            for entry in entries:
                try:
                    observation = decode_observation(entry.record)
                except RecordError:
                    continue
                if is_held_out(observation.request_id):
                    found[observation.request_id, observation.chunk] = observation
    finally:
        subscription.close()
    return list(found.values())


def load_draft(pointer: ServingPointer) -> Checkpoint:
    """The draft that a pointer names; raises CheckpointError."""
    return load_checkpoint(Path(unquote(urlsplit(pointer.artifact_uri).path)))


def compare(
    first: Checkpoint, last: Checkpoint, observations: Sequence[Observation], *, domain: str, num_draft_tokens: int
) -> Comparison:
    """Replay both drafts on the latest held-out requests of a domain."""
    torch.set_num_threads(1)
    mine = [one for one in observations if one.domain == domain][-MAX_REQUESTS_PER_DOMAIN:]
    scores = [
        shadow.by_request([shadow.score(draft, one, num_draft_tokens=num_draft_tokens) for one in mine])
        for draft in (first, last)
    ]
    old, new = scores
    gain, gain_low = lower_bound(
        tuple(new[name].acceptance_length - old[name].acceptance_length for name in old), error_rate=0.05
    )
    return Comparison(
        domain=domain,
        num_requests=len(old),
        first_rate=_mean([one.acceptance_rate for one in old.values()]),
        last_rate=_mean([one.acceptance_rate for one in new.values()]),
        first_length=_mean([one.acceptance_length for one in old.values()]),
        last_length=_mean([one.acceptance_length for one in new.values()]),
        gain=gain,
        gain_low=gain_low,
    )


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
