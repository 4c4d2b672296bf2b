"""Held-out observations in, evaluation reports out: what the evaluator keeps, and which place it judges next."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from slipstream.errors import RecordError
from slipstream.learning.distillation import is_trainable
from slipstream.learning.judge import Exam, Judge
from slipstream.learning.replay import Kept, ReplayBuffer
from slipstream.promotion import EvaluationReport
from slipstream.records import Observation, decode_observation, is_held_out
from slipstream.stores.protocols import LogEntry, ModelRegistry, PointerStore
from slipstream.telemetry import WorkerMetrics
from slipstream.versions import DEFAULT_DOMAIN

_logger = logging.getLogger(__name__)


class Evaluator:
    """Judges the challengers of all places; every call may raise StoreUnavailable and be repeated."""

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
        self._held_out = held_out
        self._exam = exam
        self._metrics = metrics
        self._judges = {
            place: Judge(registry, pointers, held_out, place=place, exam=exam, artifact_root=artifact_root)
            for place in exam.places
        }
        # Of the domains that are judged alone; the default one stands for all traffic.
        self._num_requests = dict.fromkeys([DEFAULT_DOMAIN, *(place.domain for place in exam.places)], 0)

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
        """Judge the first challenger for which that is due (`Judge.look`); the recorded report, or None."""
        for place, judge in self._judges.items() if len(self._held_out) else ():
            report = judge.look(self._num_requests[place.domain])
            if report is not None:
                self._metrics.reports.inc()
                return report
        return None

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
        self._count(observation)
        return "held_out"

    def _count(self, observation: Observation) -> None:
        if observation.chunk:
            return
        self._num_requests[DEFAULT_DOMAIN] += 1
        if observation.domain != DEFAULT_DOMAIN and observation.domain in self._num_requests:
            self._num_requests[observation.domain] += 1
