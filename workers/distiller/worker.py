"""The distiller as a process: one turn reads, trains, publishes and commits; what a crash loses is read again."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from pathlib import Path

import torch

from slipstream.config import Settings, log_kind
from slipstream.learning.distiller import Curriculum, Distiller
from slipstream.learning.replay import ReplayBuffer
from slipstream.models.checkpoint import target_digest
from slipstream.models.config import read_config
from slipstream.promoter import initial_draft_dir
from slipstream.stores.opening import ARTIFACTS, open_log, open_pointers, open_registry
from slipstream.stores.protocols import ObservationLog, PointerStore, Subscription, WorkerStatus
from slipstream.telemetry import WorkerMetrics
from slipstream.turns import run_parts, run_turns, serve_metrics, stop_on_signals

_logger = logging.getLogger(__name__)

NAME = "distiller"
_NICENESS = 10
_STEPS_PER_TURN = 8
_POLL_S = 1.0
_REPORT_EVERY_S = 2.0


class DistillerWorker:
    """Process concerns around a `Distiller`: the subscription, commits, status."""

    def __init__(
        self,
        distiller: Distiller,
        log: ObservationLog,
        pointers: PointerStore,
        *,
        metrics: WorkerMetrics,
        max_poll: int,
    ) -> None:
        self._distiller = distiller
        self._log = log
        self._pointers = pointers
        self._metrics = metrics
        self._max_poll = max_poll
        self._subscription: Subscription | None = None
        self._log_name: str | None = None
        self._committed: dict[int, int] = {}
        self._reported_at = float("-inf")

    def turn(self) -> bool:
        """Read, train a little, publish and commit what is due, report; whether anything was done.

        A store that is down stops only the part that needs it: the first StoreUnavailable is raised at the end.
        """
        if self._log_name is None:
            log_name = self._log.identity()
            self._distiller.resume(log_name)
            self._log_name, self._committed = log_name, {}
        return run_parts((self._read, self._train, self._publish, self._report))

    def close(self) -> None:
        """Leave the consumer group."""
        if self._subscription is not None:
            self._subscription.close()

    def _read(self) -> bool:
        if not self._is_same_log():
            _logger.warning("another log took the place of %s: its offsets begin anew", self._log_name)
            self.close()
            self._subscription, self._log_name = None, None
            return True
        if not self._distiller.wants_observations:
            return False
        if self._subscription is None:
            self._subscription = self._log.subscribe(NAME)
        entries = self._subscription.poll(max_records=self._max_poll, timeout_s=_POLL_S)
        self._distiller.ingest(entries)
        return bool(entries)

    def _train(self) -> bool:
        return self._distiller.train(max_steps=_STEPS_PER_TURN) > 0

    def _publish(self) -> bool:
        version = self._distiller.publish()
        ends = self._distiller.settled_ends
        if self._subscription is not None and ends != self._committed and self._is_same_log():
            self._subscription.commit(ends)
            self._committed = ends
        return version is not None

    def _is_same_log(self) -> bool:
        """Whether the offsets that the distiller holds are this log's; a server may come back empty at any time."""
        return self._log.identity() == self._log_name

    def _report(self) -> bool:
        if time.monotonic() - self._reported_at < _REPORT_EVERY_S or self._subscription is None:
            return False
        lag = self._subscription.lag()
        self._metrics.lag.set(lag)
        self._pointers.report_worker(WorkerStatus(worker=NAME, lag=lag, detail=self._distiller.detail, at=time.time()))
        self._reported_at = time.monotonic()
        return False


def run(settings: Settings) -> None:
    """Distil until SIGTERM or SIGINT; raises ConfigError or CheckpointError if that cannot work."""
    stop, metrics = stop_on_signals(), WorkerMetrics()
    serve_metrics(metrics, settings.addresses.metrics)
    curriculum = curriculum_of(settings)
    os.nice(_NICENESS)
    torch.set_num_threads(settings.config.learning.num_threads)
    state_dir = settings.state_dir / NAME / f"{log_kind(settings.addresses)}-{curriculum.target_digest[:16]}"
    log, registry, pointers = open_log(settings), open_registry(settings), open_pointers(settings)
    distiller = Distiller(
        registry,
        pointers,
        ReplayBuffer(state_dir / "replay", max_per_domain=settings.config.learning.replay_per_domain),
        curriculum=curriculum,
        state_dir=state_dir,
        artifact_root=settings.state_dir / ARTIFACTS,
        metrics=metrics,
    )
    worker = DistillerWorker(distiller, log, pointers, metrics=metrics, max_poll=curriculum.observations_per_version)
    run_turns(worker.turn, stop=stop, metrics=metrics, idle_s=0.0)
    worker.close()
    for store in (log, registry, pointers):
        store.close()


def curriculum_of(settings: Settings) -> Curriculum:
    """What the settings say about learning; raises CheckpointError or ConfigError for files that cannot be used."""
    serving, learning = settings.config.serving, settings.config.learning
    target = Path(serving.target)
    vocab_size = read_config(target / "config.json").vocab_size
    return Curriculum(
        target_digest=target_digest(target),
        vocab_size=vocab_size,
        observations_per_version=learning.observations_per_version,
        steps_per_version=learning.steps_per_version,
        batch_sequences=learning.batch_sequences,
        learning_rate=learning.learning_rate,
        replay_ratio=learning.replay_ratio,
        keep_versions=learning.keep_versions,
        code_commit=_code_commit(),
        initial=initial_draft_dir(serving.initial_draft, vocab_size=vocab_size),
    )


def _code_commit() -> str:
    """The commit of this checkout, or `unknown` where there is none."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"
