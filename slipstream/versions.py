"""What a version is, where it came from, and which one is served.

Frozen records without behaviour. `version` 0 always means "no draft": the target decodes plainly.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Role = Literal["draft", "routing", "placement"]

NO_VERSION = 0
"""The version number that stands for "none": no draft model, no routing predictor."""

DEFAULT_DOMAIN = "default"
"""The domain of a version that serves every request."""


class OffsetRange(msgspec.Struct, frozen=True):
    """Half-open range `[start, end)` of one partition of an observation log."""

    partition: int
    start: int
    end: int


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Where a version came from.

    `offsets` are the ranges of the log consumed since the parent's (empty for a version that was not trained here).
    `num_observations` counts the distinct training observations among them; their ids travel beside the weights
    in `lineage.json`. `parent_version` is 0 when there was none.
    """

    target_digest: str
    parent_version: int = NO_VERSION
    offsets: tuple[OffsetRange, ...] = ()
    num_observations: int = 0
    num_train_steps: int = 0
    code_commit: str = "unknown"
    note: str = ""


class ModelVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One registered version: an artifact directory that never changes again.

    `digest` is the SHA-256 over architecture and tensor values (`models.checkpoint.checkpoint_digest`).
    `created_at` is seconds since the epoch.
    """

    role: Role
    domain: str
    version: int
    artifact_uri: str
    digest: str
    lineage: Lineage
    created_at: float


class ServingPointer(msgspec.Struct, frozen=True, kw_only=True):
    """Which version is served for a role and domain; all a replica needs to fetch it.

    `generation` rises by one with every move, rollbacks included, and is the order of events.
    `version` 0 with an empty `artifact_uri` means: serve without one.
    """

    role: Role
    domain: str
    version: int
    artifact_uri: str
    digest: str
    target_digest: str
    generation: int
    fencing_token: int
    reason: str
    set_at: float


class Acknowledgement(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica runs after it looked at a pointer.

    `digest` is computed from the tensors in memory, never copied from the pointer. `state` is `serving` when the
    replica runs `generation`; `refused` when it looked and kept the old version, with `error` saying why.
    `version` and `digest` always describe what is running.
    """

    replica_id: str
    role: Role
    domain: str
    version: int
    digest: str
    generation: int
    state: Literal["serving", "refused"]
    error: str
    at: float
