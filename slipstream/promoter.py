"""The promoter's turn: the newest report through the gate, then the pointer, then the registry's alias.

The pointer is the truth and moves first. The champion alias only tells people what the pointer says, and is repaired
whenever it differs. Whoever holds an older fencing token than an operator's rollback cannot move the pointer.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec

from slipstream.errors import (
    ArtifactRejected,
    CheckpointError,
    ConfigError,
    PromotionFrozen,
    StaleFence,
    StalePointer,
    UnknownVersion,
)
from slipstream.models.checkpoint import check_draft, load_checkpoint
from slipstream.promotion import PromotionDecision, PromotionGate, decide
from slipstream.registration import register_draft
from slipstream.rollback import rolled_back_versions
from slipstream.stores.protocols import HISTORY_LIMIT, ModelRegistry, PointerStore
from slipstream.telemetry import WorkerMetrics
from slipstream.versions import DEFAULT_DOMAIN, DRAFT, NO_VERSION, Lineage, ModelVersion, Place, ServingPointer

_logger = logging.getLogger(__name__)

_RESTORED = "restored: the pointer store was empty"
_NUM_DECISIONS_SEEN = 50
"""Among so many latest decisions of all places the last one of a place is looked for, not to record it again."""


class Fence:
    """The fencing token of one process. Its promoters share it: the store refuses all but the newest issued."""

    def __init__(self, pointers: PointerStore) -> None:
        self._pointers = pointers
        self._token: int | None = None

    def token(self) -> int:
        """The token, issued at the first call."""
        if self._token is None:
            self._token = self._pointers.issue_fencing_token()
        return self._token

    def renew(self) -> None:
        """Let the next call of `token` take a new one."""
        self._token = None


class Promoter:
    """Moves the pointer of one place; every call may raise StoreUnavailable and be repeated.

    Promoters of several places in one process share a `fence` (None: this one has its own).
    """

    def __init__(
        self,
        pointers: PointerStore,
        registry: ModelRegistry,
        *,
        gate: PromotionGate,
        target_digest: str,
        metrics: WorkerMetrics,
        place: Place = DRAFT,
        fence: Fence | None = None,
    ) -> None:
        self._pointers = pointers
        self._registry = registry
        self._gate = gate
        self._target_digest = target_digest
        self._metrics = metrics
        self._place = place
        self._fence = fence or Fence(pointers)
        self._said = ""

    def turn(self) -> PromotionDecision | None:
        """Reconcile, then decide on the challenger; the decision if it is a new one."""
        self._fence.token()
        pointer = self._pointers.read(*self._place) or self._restore()
        reconcile_champion(self._registry, pointer)
        challenger = self._challenger(pointer)
        if challenger is None:
            return None
        report = self._registry.report(*self._place, challenger.version)
        if report is None or report.champion_version != served_version(pointer, self._target_digest):
            return None
        decision = decide(self._gate, report, at=time.time())
        if decision.verdict == "promote" and not self._promote(challenger, pointer, decision):
            return None
        if not self._record(decision):
            return None
        return decision

    def _restore(self) -> ServingPointer | None:
        """Set the pointer that an emptied store has lost; None if there was none or it may not be set now."""
        version = lost_version(self._pointers, self._registry, target_digest=self._target_digest, place=self._place)
        return None if version is None else self._move(version, after=None, reason=_RESTORED)

    def _challenger(self, pointer: ServingPointer | None) -> ModelVersion | None:
        """The version that wants to be promoted and may be, or None."""
        number = self._registry.alias(*self._place, "challenger")
        if number is None or (pointer is not None and number == pointer.version):
            return None
        challenger = self._registry.get(*self._place, number)
        if challenger.lineage.target_digest != self._target_digest:
            self._say(
                f"{self._name(number)} was made from target {challenger.lineage.target_digest[:12]}, "
                f"served is {self._target_digest[:12]}; it is never promoted here"
            )
            return None
        if number in rolled_back_versions(self._pointers.history(*self._place, limit=HISTORY_LIMIT)):
            self._say(f"{self._name(number)} was rolled back by an operator; only an operator may bring it back")
            return None
        return challenger

    def _promote(self, challenger: ModelVersion, pointer: ServingPointer | None, decision: PromotionDecision) -> bool:
        """Move the pointer, then the alias; False if that is not allowed now, which the log says once."""
        frozen = self._pointers.frozen()
        if frozen is not None:
            self._say(f"{self._name(challenger.version)} passes the gate, but promotion is frozen: {frozen}")
            return False
        return self._move(challenger, after=pointer, reason=decision.reason) is not None

    def _move(self, version: ModelVersion, *, after: ServingPointer | None, reason: str) -> ServingPointer | None:
        """Point at a version; None if that is not allowed now, which the log says once."""
        token = self._fence.token()
        try:
            moved = advance(self._pointers, version, after=after, fencing_token=token, reason=reason)
        except (StalePointer, StaleFence, PromotionFrozen) as error:
            self._say(f"{self._name(version.version)} is not served now: {error}")
            if isinstance(error, StaleFence) and self._pointers.frozen() is None:
                self._fence.renew()
            return None
        _logger.info("generation %d serves %s: %s", moved.generation, self._name(moved.version), moved.reason)
        self._said = ""
        return moved

    def _record(self, decision: PromotionDecision) -> bool:
        """Record and reconcile after a decision; False if the newest recorded one of this place says the same."""
        recorded = self._pointers.decisions(limit=_NUM_DECISIONS_SEEN)
        newest = next((one for one in recorded if (one.role, one.domain) == self._place), None)
        is_new = newest is None or msgspec.structs.replace(newest, at=decision.at) != decision
        if is_new:
            self._pointers.record_decision(decision)
            self._metrics.decisions.labels(decision.verdict).inc()
            _logger.info("%s %s: %s", decision.verdict, self._name(decision.challenger_version), decision.reason)
        if decision.verdict == "promote":
            reconcile_champion(self._registry, self._pointers.read(*self._place))
        return is_new

    def _name(self, version: int) -> str:
        return f"{self._place.role} version {version} of domain {self._place.domain}"

    def _say(self, line: str) -> None:
        """Log a line unless it was the last one said."""
        if line != self._said:
            _logger.warning("%s", line)
            self._said = line


def served_version(pointer: ServingPointer | None, target_digest: str) -> int:
    """The version that serves this target: 0 for none, also where the pointer belongs to another target."""
    is_ours = pointer is not None and pointer.target_digest == target_digest
    return pointer.version if pointer is not None and is_ours else NO_VERSION


def lost_version(
    pointers: PointerStore, registry: ModelRegistry, *, target_digest: str, place: Place
) -> ModelVersion | None:
    """What a pointer store without a pointer last named for this target, as far as others remember; None for nothing.

    Replicas go on with what they last applied and say so, and what they say comes first: the champion alias does not
    follow the pointer to version 0.
    """
    heard = [one for one in pointers.acknowledgements(*place) if one.generation > 0]
    newest = max(heard, key=lambda one: one.generation, default=None)
    number = registry.alias(*place, "champion") if newest is None else newest.version
    if not number:
        return None
    try:
        version = registry.get(*place, number)
    except UnknownVersion as error:
        _logger.warning("the pointer cannot be restored: %s", error)
        return None
    return version if version.lineage.target_digest == target_digest else None


def advance(
    pointers: PointerStore,
    version: ModelVersion,
    *,
    after: ServingPointer | None,
    fencing_token: int,
    reason: str,
) -> ServingPointer:
    """Point at a version, one generation after `after` (None: the first); errors as `PointerStore.advance`."""
    expected_generation = after.generation if after else 0
    pointer = ServingPointer(
        role=version.role,
        domain=version.domain,
        version=version.version,
        artifact_uri=version.artifact_uri,
        digest=version.digest,
        target_digest=version.lineage.target_digest,
        generation=expected_generation + 1,
        fencing_token=fencing_token,
        reason=reason,
        set_at=time.time(),
    )
    pointers.advance(pointer, expected_generation=expected_generation)
    return pointer


def reconcile_champion(registry: ModelRegistry, pointer: ServingPointer | None) -> None:
    """Make the champion alias say what the pointer says; version 0 and a pruned version leave it as it is."""
    if pointer is None or pointer.version == NO_VERSION:
        return
    if registry.alias(pointer.role, pointer.domain, "champion") == pointer.version:
        return
    try:
        registry.set_alias(pointer.role, pointer.domain, "champion", pointer.version)
    except UnknownVersion as error:
        _logger.warning("the champion alias cannot follow the pointer: %s", error)


def initial_draft_dir(named: str, *, vocab_size: int) -> Path | None:
    """The directory that `serving.initial_draft` names, None for ""; ConfigError if no draft of this target is there.

    Every process that uses it looks at its start: later the error would repeat in every turn.
    """
    if not named:
        return None
    try:
        check_draft(load_checkpoint(Path(named)), vocab_size=vocab_size)
    except (CheckpointError, ArtifactRejected) as error:
        raise ConfigError(f"serving.initial_draft={named!r}: {error}") from error
    return Path(named)


def seed(
    pointers: PointerStore,
    registry: ModelRegistry,
    draft_dir: Path,
    *,
    target_digest: str,
    vocab_size: int,
) -> ServingPointer | None:
    """Register a draft that exists already and point at it, if there never was a pointer; what was set, or None.

    Raises CheckpointError or ArtifactRejected for a directory that cannot serve. A crash in between is made good by
    the next call: registration is idempotent.
    """
    if pointers.read(*DRAFT) is not None:
        return None
    if lost_version(pointers, registry, target_digest=target_digest, place=DRAFT) is not None:
        return None
    lineage = Lineage(target_digest=target_digest, note="initial draft, not trained here")
    version = register_draft(registry, draft_dir, domain=DEFAULT_DOMAIN, lineage=lineage, vocab_size=vocab_size)
    token = pointers.issue_fencing_token()
    try:
        pointer = advance(pointers, version, after=None, fencing_token=token, reason="initial draft")
    except (StalePointer, PromotionFrozen) as error:
        _logger.warning("the initial draft is not served: %s", error)
        return None
    _logger.info("generation 1 serves the initial draft as version %d", version.version)
    return pointer
