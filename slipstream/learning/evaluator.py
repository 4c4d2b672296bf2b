"""Challenger against champion on held-out observations: keeps them, replays both drafts, records the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from slipstream.engine.artifact import load_verified, local_path
from slipstream.errors import ArtifactRejected, RecordError
from slipstream.learning.distillation import is_trainable
from slipstream.learning.replay import Kept, ReplayBuffer
from slipstream.learning.shadow import ComparedVersions, ReplayScore, compare, score
from slipstream.models.checkpoint import Checkpoint, check_draft
from slipstream.promoter import ROLE, served_version
from slipstream.promotion import EvaluationReport
from slipstream.records import Observation, decode_observation, is_held_out, observation_id
from slipstream.stores.protocols import LogEntry, ModelRegistry, PointerStore
from slipstream.telemetry import WorkerMetrics
from slipstream.versions import DEFAULT_DOMAIN, NO_VERSION

_logger = logging.getLogger(__name__)

LOOK_REQUESTS = 4
"""Further held-out requests before a challenger is looked at again: every look costs a share of the error budget."""


class Exam(msgspec.Struct, frozen=True, kw_only=True):
    """What drafts are judged for: the target they serve, the drafted chain's length, the window in requests."""

    target_digest: str
    vocab_size: int
    num_draft_tokens: int
    num_recent: int
    domain: str = DEFAULT_DOMAIN


class Evaluator:
    """Judges the challenger of one domain; every call may raise StoreUnavailable and be repeated."""

    def __init__(
        self,
        registry: ModelRegistry,
        pointers: PointerStore,
        held_out: ReplayBuffer,
        *,
        exam: Exam,
        artifact_root: Path,
        metrics: WorkerMetrics,
    ) -> None:
        self._registry = registry
        self._pointers = pointers
        self._held_out = held_out
        self._exam = exam
        self._artifact_root = artifact_root
        self._metrics = metrics
        self._num_requests = 0
        self._num_requests_at_look = 0
        self._drafts: dict[int, Checkpoint] = {}
        self._scores: dict[tuple[int, str], ReplayScore] = {}
        self._refused: set[int] = set()

    @property
    def detail(self) -> str:
        """One line for `slipstream status`."""
        return f"{len(self._held_out)} held-out observations kept, domains {', '.join(self._held_out.domains()) or '-'}"

    def follow(self, log: str) -> None:
        """Read from the log of this identity from now on; what was held out from another one stays."""
        self._held_out.adopt(log)

    def ingest(self, entries: Sequence[LogEntry]) -> dict[int, int]:
        """Keep the held-out observations, durably on return; the ends that may now be committed."""
        ends: dict[int, int] = {}
        for entry in entries:
            self._metrics.consumed.labels(self._take_in(entry)).inc()
            ends[entry.partition] = max(entry.offset + 1, ends.get(entry.partition, 0))
        self._held_out.flush()
        return ends

    def settle(self, ends: Mapping[int, int]) -> None:
        """The log will not deliver what lies below `ends` again: the oldest held-out observations may go."""
        self._held_out.settle(ends)

    def evaluate(self) -> EvaluationReport | None:
        """Judge the challenger if that is due; the recorded report, or None.

        Due means: it is not what is served, and it has no report against what is served, or at least LOOK_REQUESTS
        held-out requests arrived since the last look.
        """
        challenger = self._registry.alias(ROLE, self._exam.domain, "challenger")
        champion = served_version(self._pointers.read(ROLE, self._exam.domain), self._exam.target_digest)
        if challenger is None or challenger == champion or challenger in self._refused or not len(self._held_out):
            return None
        earlier = self._registry.report(ROLE, self._exam.domain, challenger)
        if earlier is not None and earlier.champion_version == champion and not self._has_news():
            return None
        report = self._judge(challenger, champion, look=earlier.look + 1 if earlier else 1)
        if report is None:
            return None
        self._registry.record_report(report)
        self._metrics.reports.inc()
        self._num_requests_at_look = self._num_requests
        return report

    def _has_news(self) -> bool:
        return self._num_requests - self._num_requests_at_look >= LOOK_REQUESTS

    def _take_in(self, entry: LogEntry) -> str:
        try:
            observation = decode_observation(entry.record)
        except RecordError as error:
            _logger.warning("partition %d offset %d: %s", entry.partition, entry.offset, error)
            return "skipped"
        is_wanted = (
            is_held_out(observation.request_id)
            and observation.target_digest == self._exam.target_digest
            and is_trainable(observation, vocab_size=self._exam.vocab_size)
        )
        if not is_wanted:
            return "skipped"
        if not self._held_out.append(Kept(entry.partition, entry.offset, observation)):
            return "duplicate"
        self._num_requests += observation.chunk == 0
        return "held_out"

    def _judge(self, challenger: int, champion: int, *, look: int) -> EvaluationReport | None:
        observations = self._window()
        drafts = {challenger: self._draft(challenger), champion: self._draft(champion)}
        if drafts[challenger] is None or (drafts[champion] is None and champion != NO_VERSION):
            return None
        wanted = {(version, observation_id(one)) for version in drafts for one in observations}
        self._scores = {key: known for key, known in self._scores.items() if key in wanted}
        scores = {
            version: [self._score(version, draft, one) for one in observations] for version, draft in drafts.items()
        }
        of = ComparedVersions(
            domain=self._exam.domain, challenger_version=challenger, champion_version=champion, look=look
        )
        return compare(scores[challenger], scores[champion], of=of, num_recent=self._exam.num_recent, at=time.time())

    def _window(self) -> list[Observation]:
        """The latest of all traffic and the latest of every domain, in order of arrival."""
        num_recent = self._exam.num_recent
        chosen = {observation_id(one) for one in self._held_out.newest(num_recent)}
        for domain in self._held_out.domains():
            chosen |= {observation_id(one) for one in self._held_out.newest(num_recent, domain=domain)}
        return [one.observation for one in self._held_out.kept() if observation_id(one.observation) in chosen]

    def _score(self, version: int, draft: Checkpoint | None, observation: Observation) -> ReplayScore:
        """Replay is deterministic, so a further look replays only what is new."""
        key = version, observation_id(observation)
        if key not in self._scores:
            self._scores[key] = score(draft, observation, num_draft_tokens=self._exam.num_draft_tokens)
        # Callers name domains: a report has as many as the buffer, not one for every name there ever was.
        return msgspec.structs.replace(self._scores[key], domain=self._held_out.domain_of(observation))

    def _draft(self, version: int) -> Checkpoint | None:
        """The loaded draft; None for version 0, or if its files are refused (logged once, never judged again)."""
        if version == NO_VERSION or version in self._refused:
            return None
        if version not in self._drafts:
            known = self._registry.get(ROLE, self._exam.domain, version)
            try:
                draft = load_verified(local_path(known.artifact_uri, self._artifact_root), digest=known.digest)
                check_draft(draft, vocab_size=self._exam.vocab_size)
            except ArtifactRejected as error:
                _logger.error("draft version %d is not judged: %s", version, error)
                self._refused.add(version)
                return None
            self._drafts = {kept: one for kept, one in list(self._drafts.items())[-1:]} | {version: draft}
        return self._drafts[version]
