"""The promoter as a process: seeds the first draft once, then one turn after another; holds no state of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from slipstream.config import Settings, served_places
from slipstream.models.checkpoint import target_digest
from slipstream.models.config import read_config
from slipstream.promoter import Fence, Promoter, initial_draft_dir, seed
from slipstream.promotion import PromotionGate
from slipstream.stores.opening import open_pointers, open_registry
from slipstream.stores.protocols import ModelRegistry, PointerStore, WorkerStatus
from slipstream.telemetry import WorkerMetrics
from slipstream.turns import run_turns, serve_metrics, stop_on_signals

NAME = "promoter"
_IDLE_S = 1.0
_NO_LAG = -1


class PromoterService:
    """Process concerns around the promoters of all places: the draft of day one, status."""

    def __init__(
        self,
        promoters: Sequence[Promoter],
        pointers: PointerStore,
        registry: ModelRegistry,
        *,
        initial_draft: Path | None,
        target_digest: str,
        vocab_size: int,
    ) -> None:
        self._promoters = promoters
        self._pointers = pointers
        self._registry = registry
        self._initial_draft = initial_draft
        self._target_digest = target_digest
        self._vocab_size = vocab_size

    def turn(self) -> bool:
        """Seed if that is still to be done, decide for every place, report; whether the gate said something new."""
        if self._initial_draft is not None:
            seed(
                self._pointers,
                self._registry,
                self._initial_draft,
                target_digest=self._target_digest,
                vocab_size=self._vocab_size,
            )
            self._initial_draft = None
        decisions = [promoter.turn() for promoter in self._promoters]
        detail = "frozen" if self._pointers.frozen() is not None else "deciding"
        self._pointers.report_worker(WorkerStatus(worker=NAME, lag=_NO_LAG, detail=detail, at=time.time()))
        return any(decision is not None for decision in decisions)


def run(settings: Settings) -> None:
    """Promote until SIGTERM or SIGINT; raises ConfigError or CheckpointError if that cannot work."""
    stop, metrics = stop_on_signals(), WorkerMetrics()
    serve_metrics(metrics, settings.addresses.metrics)
    serving, gate = settings.config.serving, settings.config.gate
    digest = target_digest(Path(serving.target))
    vocab_size = read_config(Path(serving.target) / "config.json").vocab_size
    initial_draft = initial_draft_dir(serving.initial_draft, vocab_size=vocab_size)
    registry, pointers = open_registry(settings), open_pointers(settings)
    thresholds = PromotionGate(
        margin=gate.margin,
        domain_tolerance=gate.domain_tolerance,
        error_rate=gate.error_rate,
        min_requests=gate.min_requests,
    )
    fence = Fence(pointers)
    promoters = [
        Promoter(pointers, registry, gate=thresholds, target_digest=digest, metrics=metrics, place=place, fence=fence)
        for place in served_places(serving)
    ]
    service = PromoterService(
        promoters,
        pointers,
        registry,
        initial_draft=initial_draft,
        target_digest=digest,
        vocab_size=vocab_size,
    )
    run_turns(service.turn, stop=stop, metrics=metrics, idle_s=_IDLE_S)
    for store in (registry, pointers):
        store.close()
