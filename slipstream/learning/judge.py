"""Challenger against champion of one place, on the held-out observations that concern it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from slipstream.drafting.recycling_artifact import StoredMatrix, load_matrix
from slipstream.engine.artifact import load_verified, local_path
from slipstream.errors import ArtifactRejected
from slipstream.learning.matrix_replay import score_matrix
from slipstream.learning.replay import ReplayBuffer
from slipstream.learning.shadow import ComparedVersions, ReplayScore, compare, score
from slipstream.models.checkpoint import Checkpoint, check_draft
from slipstream.promoter import served_version
from slipstream.promotion import EvaluationReport
from slipstream.records import Observation, observation_id
from slipstream.stores.protocols import ModelRegistry, PointerStore
from slipstream.versions import DEFAULT_DOMAIN, DRAFT, MATRIX, NO_VERSION, Place, ServingPointer

_logger = logging.getLogger(__name__)

LOOK_REQUESTS = 4
"""Further held-out requests before a challenger is looked at again: every look costs a share of the error budget."""

_NUM_LOADED = 2

Replay = Callable[[Observation], ReplayScore]
"""What a version would have done on an observation."""


class Exam(msgspec.Struct, frozen=True, kw_only=True):
    """What versions are judged for: the target they serve, the drafted tokens of a pass, the window in requests."""

    target_digest: str
    vocab_size: int
    num_draft_tokens: int
    num_recent: int
    places: tuple[Place, ...] = (DRAFT, MATRIX)


class _Contender(NamedTuple):
    """A version and its files; without a digest: nothing, as plain decoding or an empty matrix."""

    version: int
    digest: str = ""
    artifact_uri: str = ""


class Judge:
    """Judges the challenger of one place; every call may raise StoreUnavailable and be repeated.

    A draft of the default domain is judged on all traffic, one of another domain on that domain's, and there against
    the default draft as long as the domain has none of its own.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        pointers: PointerStore,
        held_out: ReplayBuffer,
        *,
        place: Place,
        exam: Exam,
        artifact_root: Path,
    ) -> None:
        self._registry = registry
        self._pointers = pointers
        self._held_out = held_out
        self._place = place
        self._exam = exam
        self._artifact_root = artifact_root
        self._num_requests_at_look = 0
        # By digest, which says what a contender is whatever its number.
        self._replays: dict[str, Replay] = {}
        self._scores: dict[tuple[str, str], ReplayScore] = {}
        self._refused: set[str] = set()

    def look(self, num_requests: int) -> EvaluationReport | None:
        """Judge the challenger if that is due and record the report; None if it is not.

        Due means: it is not what is served, and it has no report against what is served, or at least LOOK_REQUESTS
        held-out requests arrived since the last look; `num_requests` counts those that ever arrived.
        """
        challenger = self._registry.alias(*self._place, "challenger")
        pointer = self._pointers.read(*self._place)
        champion = served_version(pointer, self._exam.target_digest)
        if challenger is None or challenger == champion:
            return None
        earlier = self._registry.report(*self._place, challenger)
        has_news = num_requests - self._num_requests_at_look >= LOOK_REQUESTS
        if earlier is not None and earlier.champion_version == champion and not has_news:
            return None
        of = ComparedVersions(
            role=self._place.role,
            domain=self._place.domain,
            challenger_version=challenger,
            champion_version=champion,
            look=earlier.look + 1 if earlier else 1,
        )
        report = self._judge(of, pointer)
        if report is not None:
            self._registry.record_report(report)
            self._num_requests_at_look = num_requests
        return report

    def _judge(self, of: ComparedVersions, pointer: ServingPointer | None) -> EvaluationReport | None:
        known = self._registry.get(*self._place, of.challenger_version)
        contenders = (
            _Contender(of.challenger_version, known.digest, known.artifact_uri),
            self._champion(of.champion_version, pointer),
        )
        replays = [self._replay(one) for one in contenders]
        observations = self._window()
        if None in replays or not observations:
            return None
        wanted = {(one.digest, observation_id(observation)) for one in contenders for observation in observations}
        self._scores = {key: score for key, score in self._scores.items() if key in wanted}
        ours, theirs = (
            [self._score(one, replay, observation) for observation in observations]
            for one, replay in zip(contenders, replays, strict=True)
            if replay is not None
        )
        return compare(ours, theirs, of=of, num_recent=self._exam.num_recent, at=time.time())

    def _champion(self, version: int, pointer: ServingPointer | None) -> _Contender:
        """What serves this place now, be it the default draft in place of a domain's own."""
        if version == NO_VERSION and self._place.role == "draft" and self._place.domain != DEFAULT_DOMAIN:
            pointer = self._pointers.read(*DRAFT)
        if pointer is None or served_version(pointer, self._exam.target_digest) == NO_VERSION:
            return _Contender(NO_VERSION)
        return _Contender(version, pointer.digest, pointer.artifact_uri)

    def _window(self) -> list[Observation]:
        """The latest of all traffic and the latest of every domain, or of the one domain, in order of arrival."""
        num_recent = self._exam.num_recent
        if self._place.domain != DEFAULT_DOMAIN:
            return self._held_out.newest(num_recent, domain=self._place.domain)
        chosen = {observation_id(one) for one in self._held_out.newest(num_recent)}
        for domain in self._held_out.domains():
            chosen |= {observation_id(one) for one in self._held_out.newest(num_recent, domain=domain)}
        return [one.observation for one in self._held_out.kept() if observation_id(one.observation) in chosen]

    def _score(self, contender: _Contender, replay: Replay, observation: Observation) -> ReplayScore:
        """Replay is deterministic, so a further look replays only what is new."""
        key = contender.digest, observation_id(observation)
        if key not in self._scores:
            self._scores[key] = replay(observation)
        # Callers name domains: a report has as many as the buffer, not one for every name there ever was.
        return msgspec.structs.replace(self._scores[key], domain=self._held_out.domain_of(observation))

    def _replay(self, contender: _Contender) -> Replay | None:
        """The contender's replay; None if its files are refused (logged once, never judged again)."""
        if contender.digest in self._refused:
            return None
        if contender.digest not in self._replays:
            try:
                opened = self._opened(contender)
            except ArtifactRejected as error:
                _logger.error("%s version %d is not judged: %s", self._place.role, contender.version, error)
                self._refused.add(contender.digest)
                return None
            kept = list(self._replays.items())[1 - _NUM_LOADED :]
            self._replays = dict(kept) | {contender.digest: opened}
        return self._replays[contender.digest]

    def _opened(self, contender: _Contender) -> Replay:
        """Load what the contender is; raises ArtifactRejected."""
        exam, draft, matrix = self._exam, None, None
        if contender.digest:
            directory = local_path(contender.artifact_uri, self._artifact_root)
            if self._place.role == "recycling":
                matrix = load_matrix(directory, vocab_size=exam.vocab_size, digest=contender.digest)
            else:
                draft = load_verified(directory, digest=contender.digest)
                check_draft(draft, vocab_size=exam.vocab_size)
        if self._place.role == "recycling":
            return _replay_of_matrix(matrix, exam)
        return _replay_of_draft(draft, exam)


def _replay_of_draft(draft: Checkpoint | None, exam: Exam) -> Replay:
    return lambda observation: score(draft, observation, num_draft_tokens=exam.num_draft_tokens)


def _replay_of_matrix(matrix: StoredMatrix | None, exam: Exam) -> Replay:
    return lambda observation: score_matrix(
        matrix, observation, vocab_size=exam.vocab_size, num_draft_tokens=exam.num_draft_tokens
    )
