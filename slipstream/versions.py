"""What a version is, where it came from, and which one is served.

Frozen records without behaviour. `version` 0 always means "none": without a draft the target decodes plainly, without
a matrix Token Recycling starts empty.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Role = Literal["draft", "recycling", "routing", "placement"]
"""What a version is: a draft model, a Token Recycling matrix, a routing predictor, a placement of experts."""

NO_VERSION = 0
"""The version number that stands for "none": no draft model, no matrix, no routing predictor."""

DEFAULT_DOMAIN = "default"
"""The domain of a version that serves every request without a version for its own domain."""


class Place(NamedTuple):
    """What has versions, a champion and a pointer of its own."""

    role: Role
    domain: str


DRAFT = Place("draft", DEFAULT_DOMAIN)
"""The draft of every request whose domain has none of its own."""

MATRIX = Place("recycling", DEFAULT_DOMAIN)
"""The matrix that Token Recycling starts from in every replica."""


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

    `digest` is the SHA-256 over architecture and tensor values (`models.checkpoint.checkpoint_digest`), of a matrix
    over its arrays (`drafting.recycling_artifact.matrix_digest`).
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

    `digest` is computed from the tensors in memory, never copied from the pointer; of a matrix as it began. `state` is
    `serving` when the replica runs `generation`; `refused` when it looked and kept the old version, with `error` saying
    why.
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
