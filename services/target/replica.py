"""One replica: the engine, what it observes, what it follows, and its HTTP face. Composition only.

Ray Serve makes, checks and ends it. Settings are read from the environment, which every process of the service
shares; so no address or password travels through Ray's control plane.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from starlette.types import ASGIApp

import slipstream_kernels
from services.target.callers import Callers
from services.target.ingress import Ingress, ServedModel
from services.target.prompt_text import PromptText
from slipstream.config import Settings, load_config, load_tenants, served_places
from slipstream.drafting.merge import DraftingOptions
from slipstream.engine.blocks import blocks_for
from slipstream.engine.engine import Engine
from slipstream.engine.observer import Observer
from slipstream.engine.runner import EngineRunner
from slipstream.engine.scheduler import EngineLimits
from slipstream.engine.served import Served, ServedDraft, ServedMatrix
from slipstream.engine.swap import PointerFollower
from slipstream.errors import EngineStopped
from slipstream.models.checkpoint import load_checkpoint, target_digest
from slipstream.records import Observation
from slipstream.stores.opening import ARTIFACTS, open_log, open_pointers
from slipstream.telemetry import ReplicaMetrics, configure_logging
from slipstream.versions import MATRIX, Place

logger = logging.getLogger(__name__)

_STOP_S = 2.0

_MAX_TENANT_MATRICES = 16
"""Of Token Recycling, those of the tenants that came last: 1 MB each at 32,000 tokens."""


class Replica:
    """Loads the target and serves it; raises CheckpointError or ConfigError if it cannot."""

    def __init__(self, target_dir: str, model_name: str) -> None:
        configure_logging("replica")
        settings = load_config()
        directory = Path(target_dir)
        torch.set_num_threads(settings.config.serving.num_threads)
        if slipstream_kernels.is_available():
            slipstream_kernels.set_num_threads(settings.config.serving.num_threads)
        self._metrics = ReplicaMetrics()
        self._replica_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._observer = _observer(settings, self._metrics)
        target = load_checkpoint(directory)
        digest = target_digest(directory)
        prompt_text = PromptText(directory)
        drafting = _drafting(settings)
        engine = Engine(
            target,
            limits=_limits(settings, drafting),
            target_digest=digest,
            replica_id=self._replica_id,
            top_n=settings.config.observing.top_n,
            observe=self._observer.offer if self._observer else _forget,
            metrics=self._metrics,
            token_bytes=prompt_text.token_bytes.__getitem__,
            device=settings.config.serving.device,
            drafting=drafting,
        )
        self._runner = EngineRunner(engine)
        places = served_places(settings.config.serving)
        followed = [place for place in places if place != MATRIX or drafting is not None]
        self._followers = self._pointer_followers(settings, digest, followed)
        model = ServedModel(
            name=model_name,
            created=int(time.time()),
            vocab_size=engine.vocab_size,
            max_context_tokens=engine.max_context_tokens,
            stop_token_ids=target.config.eos_token_ids,
        )
        self._ingress = self._make_ingress(model, prompt_text, settings)
        self._start()

    def app(self) -> ASGIApp:
        """The ASGI application."""
        return self._ingress.app()

    def check_health(self) -> None:
        """Raise EngineStopped if the engine's thread is dead or stuck; a store that is down is no reason."""
        if not self._runner.is_healthy():
            raise EngineStopped(
                f"replica {self._replica_id}: the engine is dead or stuck; Serve starts another replica"
            )

    def stop(self) -> None:
        """Stop, sending what was observed if the log answers; running requests end with an error."""
        for follower in self._followers:
            follower.ask_to_stop()  # all at once, so that their waits run side by side
        for follower in self._followers:
            follower.stop(_STOP_S)
        self._runner.stop(_STOP_S)
        if self._observer is not None:
            self._observer.stop(_STOP_S)

    def _start(self) -> None:
        # What is loaded by now lives as long as the process. Looked through for garbage it stops a step for 85 ms.
        gc.freeze()
        self._runner.start()
        if self._observer is not None:
            self._observer.start()
        for follower in self._followers:
            follower.start()
        logger.info("replica %s serves", self._replica_id)

    def _make_ingress(self, model: ServedModel, prompt_text: PromptText, settings: Settings) -> Ingress:
        keys = settings.addresses.api_keys
        return Ingress(
            model,
            prompt_text=prompt_text,
            runner=self._runner,
            metrics=self._metrics,
            callers=Callers(load_tenants(keys) if keys else None),
        )

    def _pointer_followers(self, settings: Settings, digest: str, places: Sequence[Place]) -> list[PointerFollower]:
        """One for each of these places, with the last good version of it on disk."""
        if settings.addresses.redis is None:
            logger.warning("SLIPSTREAM_REDIS is not set: no pointer to follow, this replica serves without a draft")
            return []
        pointers = open_pointers(settings)
        return [
            PointerFollower(
                pointers,
                self._served(place),
                target_digest=digest,
                replica_id=self._replica_id,
                artifact_root=settings.state_dir / ARTIFACTS,
                cache_dir=settings.state_dir / "last_good" / place.role / place.domain,
                poll_s=settings.config.serving.pointer_poll_s,
                metrics=self._metrics,
            )
            for place in places
        ]

    def _served(self, place: Place) -> Served:
        return ServedMatrix(self._runner) if place == MATRIX else ServedDraft(self._runner, domain=place.domain)


def _observer(settings: Settings, metrics: ReplicaMetrics) -> Observer | None:
    if settings.addresses.redis is None and settings.addresses.kafka is None:
        logger.warning("no log is named (SLIPSTREAM_REDIS, SLIPSTREAM_KAFKA): nothing is observed or learned")
        return None
    return Observer(
        open_log(settings), max_queued_records=settings.config.observing.max_queued_records, metrics=metrics
    )


def _drafting(settings: Settings) -> DraftingOptions | None:
    """None for chains of the installed draft alone."""
    if settings.config.serving.drafting != "auto":
        return None
    if not slipstream_kernels.is_available():
        logger.warning("no compiled kernels: drafting with the draft model alone, whatever it costs")
        return None
    # Where tenants are told apart, none is drafted for with what another one's requests taught.
    return DraftingOptions(max_tenants=None if settings.addresses.api_keys is None else _MAX_TENANT_MATRICES)


def _limits(settings: Settings, drafting: DraftingOptions | None) -> EngineLimits:
    serving = settings.config.serving
    num_draft_tokens = serving.num_draft_tokens if drafting is None else serving.max_draft_nodes
    return EngineLimits(
        max_running_requests=serving.max_running_requests,
        max_queued_requests=serving.max_queued_requests,
        max_step_tokens=serving.max_step_tokens,
        max_context_tokens=serving.max_context_tokens,
        num_draft_tokens=0 if serving.drafting == "off" else num_draft_tokens,
        num_blocks=blocks_for(serving.kv_cache_tokens),
    )


def _forget(_: Observation) -> None:
    """Where observations go when no log is named."""
