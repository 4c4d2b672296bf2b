"""Every error of Slipstream, in one tree.

    SlipstreamError
    ├── ConfigError            a setting, address or file of the deployment is wrong; stops the start
    ├── CheckpointError        a checkpoint directory cannot be served (missing, unsupported, malformed)
    ├── RequestError           the caller's request cannot be served; carries the parameter's name (HTTP 400)
    │   ├── RequestTooLarge    the body is longer than the limit (HTTP 413)
    │   ├── RequestTimedOut    the body did not come in time (HTTP 408)
    │   └── UnknownModel       no such model here (HTTP 404)
    ├── QueueFull              more requests than the configured limit (HTTP 429)
    ├── EngineStopped          the replica is going away and finishes no more requests (HTTP 503)
    ├── GenerationFailed       the engine failed while it ran this request (HTTP 500)
    ├── RecordError            bytes of the log that are no record of a known schema version
    ├── StoreError
    │   ├── StoreUnavailable   the store does not answer; the same call may succeed later
    │   ├── StalePointer       compare-and-set lost: another writer moved the pointer first
    │   ├── StaleFence         the writer's fencing token is older than one issued since
    │   ├── PromotionFrozen    an operator froze promotion; `slipstream unfreeze` releases it
    │   └── UnknownVersion     the registry has no such version
    └── ArtifactRejected       a version's files are not what the pointer promised; the old version stays

A message gives the value seen, the value expected, and what to do next.
"""

from __future__ import annotations

from typing import Literal


class SlipstreamError(Exception):
    """Root of the tree."""


class ConfigError(SlipstreamError):
    """A setting, address or file of the deployment is wrong."""


class CheckpointError(SlipstreamError):
    """A checkpoint directory cannot be served."""


class RequestError(SlipstreamError, ValueError):
    """The caller's request cannot be served.

    `param` names the offending field of the request, or None if no single field is at fault.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLarge(RequestError):
    """The body is longer than the limit."""


class RequestTimedOut(RequestError):
    """The body did not come in time."""


class UnknownModel(RequestError):
    """The request names a model that is not served here."""


class QueueFull(SlipstreamError):
    """More requests are waiting than the configured limit."""


class EngineStopped(SlipstreamError):
    """The engine is stopping or has failed: it takes no more requests and finishes none."""


class GenerationFailed(SlipstreamError):
    """The engine failed while it ran this request."""


class RecordError(SlipstreamError, ValueError):
    """Bytes that are no record of a known schema version."""


class StoreError(SlipstreamError):
    """A store refused or failed a call."""


class StoreUnavailable(StoreError):
    """The store does not answer; the same call may succeed later."""


class StalePointer(StoreError):
    """Compare-and-set lost: the pointer's generation is no longer the expected one."""


class StaleFence(StoreError):
    """The writer's fencing token is older than one issued since."""


class PromotionFrozen(StoreError):
    """An operator froze promotion."""


class UnknownVersion(StoreError):
    """The registry has no such version."""


RejectionReason = Literal["location", "format", "digest", "target", "vocabulary", "not_finite", "timeout"]


class ArtifactRejected(SlipstreamError):
    """A version's files are not what the pointer promised; `reason` is one of a few words that metrics can carry."""

    def __init__(self, message: str, *, reason: RejectionReason) -> None:
        super().__init__(message)
        self.reason: RejectionReason = reason
