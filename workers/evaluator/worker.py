"""The evaluator as a process: one turn keeps held-out observations, commits, and judges a challenger if due."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from slipstream.config import Settings, log_kind, served_places
from slipstream.learning.evaluator import Evaluator
from slipstream.learning.judge import Exam
from slipstream.learning.replay import ReplayBuffer
from slipstream.models.checkpoint import target_digest
from slipstream.models.config import read_config
from slipstream.stores.opening import ARTIFACTS, open_log, open_pointers, open_registry
from slipstream.stores.protocols import ObservationLog, PointerStore, Subscription, WorkerStatus
from slipstream.telemetry import WorkerMetrics
from slipstream.turns import run_parts, run_turns, serve_metrics, stop_on_signals

NAME = "evaluator"
_NICENESS = 10
_MAX_POLL = 256
_POLL_S = 1.0
_REPORT_EVERY_S = 2.0


class EvaluatorWorker:
    """Process concerns around an `Evaluator`: the subscription, commits, status."""

    def __init__(
        self, evaluator: Evaluator, log: ObservationLog, pointers: PointerStore, *, metrics: WorkerMetrics
    ) -> None:
        self._evaluator = evaluator
        self._log = log
        self._pointers = pointers
        self._metrics = metrics
        self._subscription: Subscription | None = None
        self._log_name: str | None = None
        self._uncommitted: dict[int, int] = {}
        self._reported_at = float("-inf")

    def turn(self) -> bool:
        """Read and commit, judge, report; whether anything was done.

        A store that is down stops only the part that needs it: the first StoreUnavailable is raised at the end.
        """
        return run_parts((self._read, self._judge, self._report))

    def close(self) -> None:
        """Leave the consumer group."""
        if self._subscription is not None:
            self._subscription.close()

    def _read(self) -> bool:
        log_name = self._log.identity()
        if log_name != self._log_name:
            self._follow(log_name)
        if self._subscription is None:
            self._subscription = self._log.subscribe(NAME)
        entries = self._subscription.poll(max_records=_MAX_POLL, timeout_s=_POLL_S)
        self._uncommitted |= self._evaluator.ingest(entries)
        if self._uncommitted:
            # After a failure the next turn polls before it commits again: only a poll joins a group that was lost.
            self._subscription.commit(self._uncommitted)
            self._evaluator.settle(self._uncommitted)
            self._uncommitted = {}
        return bool(entries)

    def _follow(self, log_name: str) -> None:
        """Begin anew on a log that took another one's place: its offsets are not those we hold."""
        self.close()
        self._subscription, self._uncommitted = None, {}
        self._evaluator.follow(log_name)
        self._log_name = log_name

    def _judge(self) -> bool:
        return self._evaluator.evaluate() is not None

    def _report(self) -> bool:
        if time.monotonic() - self._reported_at < _REPORT_EVERY_S or self._subscription is None:
            return False
        lag = self._subscription.lag()
        self._metrics.lag.set(lag)
        self._pointers.report_worker(WorkerStatus(worker=NAME, lag=lag, detail=self._evaluator.detail, at=time.time()))
        self._reported_at = time.monotonic()
        return False


def run(settings: Settings) -> None:
    """Judge challengers until SIGTERM or SIGINT; raises ConfigError or CheckpointError if that cannot work."""
    stop, metrics = stop_on_signals(), WorkerMetrics()
    serve_metrics(metrics, settings.addresses.metrics)
    exam = exam_of(settings)
    os.nice(_NICENESS)
    torch.set_num_threads(settings.config.learning.num_threads)
    state_dir = settings.state_dir / NAME / f"{log_kind(settings.addresses)}-{exam.target_digest[:16]}"
    log, registry, pointers = open_log(settings), open_registry(settings), open_pointers(settings)
    evaluator = Evaluator(
        registry,
        pointers,
        ReplayBuffer(state_dir / "held-out", max_per_domain=settings.config.learning.replay_per_domain),
        exam=exam,
        artifact_root=settings.state_dir / ARTIFACTS,
        metrics=metrics,
    )
    worker = EvaluatorWorker(evaluator, log, pointers, metrics=metrics)
    run_turns(worker.turn, stop=stop, metrics=metrics, idle_s=0.0)
    worker.close()
    for store in (log, registry, pointers):
        store.close()


def exam_of(settings: Settings) -> Exam:
    """What the settings say about judging; raises CheckpointError for a target that cannot be read."""
    target = Path(settings.config.serving.target)
    return Exam(
        target_digest=target_digest(target),
        vocab_size=read_config(target / "config.json").vocab_size,
        num_draft_tokens=settings.config.serving.num_draft_tokens,
        num_recent=settings.config.gate.recent_requests,
        places=served_places(settings.config.serving),
    )
