"""The thread that steps an engine, and the door to it for other threads."""

from __future__ import annotations

import logging
import threading
import time

from slipstream.drafting.recycling_artifact import StoredMatrix
from slipstream.engine.batch import OnBlock
from slipstream.engine.engine import Engine
from slipstream.engine.request import REPLICA_STOPPING, Request
from slipstream.errors import EngineStopped
from slipstream.models.checkpoint import Checkpoint
from slipstream.versions import DEFAULT_DOMAIN, NO_VERSION

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 1.0


class EngineRunner:
    """Steps its engine while there is work; every method may be called from any thread."""

    def __init__(self, engine: Engine, *, max_step_s: float = 60.0) -> None:
        self.engine = engine
        self._max_step_s = max_step_s
        self._wake = threading.Event()
        self._is_stopping = False
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start stepping."""
        self._last_progress = time.monotonic()
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stop after the current step; requests that still run or wait end with an error."""
        self._is_stopping = True
        self._wake.set()
        self._thread.join(timeout_s)

    def submit(self, request: Request, on_block: OnBlock) -> None:
        """Queue a request; `on_block` is called on the engine's thread with every block.

        Raises RequestError, QueueFull, or EngineStopped.
        """
        if self._is_stopping or not self._thread.is_alive():
            raise EngineStopped("this replica is stopping and takes no more requests; retry, another one will answer")
        self.engine.submit(request, on_block)
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """Drop a request and free its slot at the next step; an unknown or finished id is ignored."""
        self.engine.cancel(request_id)
        self._wake.set()

    def install_draft(self, draft: Checkpoint | None, *, version: int, domain: str = DEFAULT_DOMAIN) -> threading.Event:
        """See `Engine.install_draft`."""
        switched = self.engine.install_draft(draft, version=version, domain=domain)
        self._wake.set()
        return switched

    def install_matrix(self, matrix: StoredMatrix, *, version: int) -> threading.Event:
        """See `Engine.install_matrix`."""
        switched = self.engine.install_matrix(matrix, version=version)
        self._wake.set()
        return switched

    def is_healthy(self) -> bool:
        """Whether the engine's thread lives and no step has lasted longer than `max_step_s`."""
        return self._thread.is_alive() and time.monotonic() - self._last_progress < self._max_step_s

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return self.engine.num_running

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self.engine.num_waiting

    @property
    def draft_version(self) -> int:
        """The version drafting for the default domain now; 0 without a draft."""
        return self.engine.draft_version

    def draft_version_of(self, domain: str) -> int:
        """The version of this domain's own draft; 0 if it has none."""
        return self.engine.draft_versions.get(domain, NO_VERSION)

    def _run(self) -> None:
        while not self._is_stopping:
            self._last_progress = time.monotonic()
            self._wake.clear()
            try:
                has_worked = self.engine.step()
            except Exception:  # the outermost loop: a broken step fails its requests, not the replica
                logger.exception("a step failed; its requests end with an error")
                self.engine.metrics.unexpected_errors.inc()
                self.engine.fail_all("the engine failed in this step; the request may be sent again")
                has_worked = True
            if not has_worked:
                self._wake.wait(_IDLE_WAIT_S)
        self.engine.close(REPLICA_STOPPING)
