"""Following a pointer: a replica's one way to another version, be it of a domain's draft or of the matrix.

    announcement or poll -> fetch -> check digest -> load beside -> warm -> switch between two steps -> acknowledge

A version that fails any check is refused: the old one keeps serving, the refusal is counted, logged, acknowledged and
tried again after RETRY_REFUSED_S. The last good version stays on local disk, and serves from the start of a replica on
even if every store is down.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path

import msgspec

from slipstream.engine.artifact import checked_digest, fetch
from slipstream.engine.served import Served
from slipstream.errors import ArtifactRejected, ConfigError, StoreError
from slipstream.stores.artifacts import write_durably
from slipstream.stores.protocols import ACKNOWLEDGEMENT_TTL_S, PointerStore
from slipstream.telemetry import ReplicaMetrics
from slipstream.versions import DRAFT, NO_VERSION, Acknowledgement, ServingPointer

logger = logging.getLogger(__name__)

RETRY_REFUSED_S = 30.0
_SWITCH_TIMEOUT_S = 60.0
_KEPT_ARTIFACTS = 3


class PointerFollower:
    """A thread that keeps what a replica serves at one place at what the pointer says; `cache_dir` is its own."""

    def __init__(
        self,
        pointers: PointerStore,
        served: Served,
        *,
        target_digest: str,
        replica_id: str,
        artifact_root: Path,
        cache_dir: Path,
        poll_s: float,
        metrics: ReplicaMetrics,
    ) -> None:
        self._pointers = pointers
        self._served = served
        self._target_digest = target_digest
        self._replica_id = replica_id
        self._artifact_root = artifact_root
        self._cache_dir = cache_dir
        self._poll_s = poll_s
        self._metrics = metrics
        self._applied_generation = 0
        self._applied_set_at = 0.0
        self._acknowledged_at = float("-inf")
        self._refused: ServingPointer | None = None
        self._refusal = ""
        self._retry_at = 0.0
        self._is_out_of_reach = False
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"follow-{'-'.join(served.place)}", daemon=True)

    def start(self) -> None:
        """Install the last good version from local disk, if any, and start following."""
        self._restore_last_good()
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Stop after the current look at the pointer, without waiting for it."""
        self._is_stopping.set()

    def stop(self, timeout_s: float) -> None:
        """Stop following."""
        self.ask_to_stop()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._is_stopping.is_set():
            try:
                self.look()
                self._pointers.wait_for_move(timeout_s=self._poll_s)
            except (StoreError, ConfigError) as error:  # a password that changed is an outage like any other
                self._note_outage(error)
                self._is_stopping.wait(self._poll_s)
            except Exception:  # the outermost loop: a follower that died would leave the replica behind for ever
                logger.exception("following the pointer failed; trying again")
                self._metrics.unexpected_errors.inc()
                self._is_stopping.wait(self._poll_s)

    def look(self) -> None:
        """Read the pointer once, apply or refuse it, and acknowledge; raises StoreError during an outage."""
        pointer = self._pointers.read(*self._served.place)
        self._note_answer()
        if pointer is not None and self._is_news(pointer):
            self._apply_or_refuse(pointer)
        if time.monotonic() - self._acknowledged_at > ACKNOWLEDGEMENT_TTL_S / 4:
            self._acknowledge()

    def _is_news(self, pointer: ServingPointer) -> bool:
        if self._refused is not None and pointer.generation == self._refused.generation:
            return time.monotonic() >= self._retry_at
        # A store that lost its latest writes shows an older pointer, which is no news; one that began anew counts from
        # 1 again, and its pointers are: the time tells them apart.
        has_begun_anew = pointer.generation < self._applied_generation and pointer.set_at > self._applied_set_at
        return pointer.generation > self._applied_generation or has_begun_anew

    def _apply_or_refuse(self, pointer: ServingPointer) -> None:
        try:
            self._apply(pointer)
        except ArtifactRejected as error:
            is_first = self._refused is None or self._refused.generation != pointer.generation
            self._refused, self._refusal = pointer, str(error)
            self._retry_at = time.monotonic() + RETRY_REFUSED_S
            self._metrics.swap_refusals.labels(error.reason).inc()
            if is_first:
                logger.error(
                    "refused %s version %d of domain %s (generation %d), version %d keeps serving: %s",
                    *(pointer.role, pointer.version, pointer.domain, pointer.generation),
                    self._served.version,
                    error,
                )
        else:
            self._refused, self._refusal = None, ""
        self._acknowledge()

    def _apply(self, pointer: ServingPointer) -> None:
        started = time.perf_counter()
        directory = self._install(pointer)
        self._remember(pointer, directory)
        logger.info(
            "serving %s version %d of domain %s (generation %d): %s; fetched, checked and switched in %.2f s",
            *(pointer.role, pointer.version, pointer.domain, pointer.generation),
            pointer.reason,
            time.perf_counter() - started,
        )

    def _install(self, pointer: ServingPointer) -> Path | None:
        """Load the pointer's version beside the running one and switch; returns its directory, None for version 0."""
        if pointer.target_digest != self._target_digest:
            raise ArtifactRejected(
                f"pointer is for target {pointer.target_digest[:12]}, this replica serves {self._target_digest[:12]}; "
                "a version is made from this target's observations",
                reason="target",
            )
        directory = None
        if pointer.version == NO_VERSION:
            switched = self._served.install(None, version=NO_VERSION, digest="")
        else:
            directory = fetch(pointer, artifact_root=self._artifact_root, into=self._cache_dir)
            try:
                switched = self._served.install(directory, version=pointer.version, digest=pointer.digest)
            except ArtifactRejected:
                shutil.rmtree(directory, ignore_errors=True)
                raise
        with self._metrics.swap_wait_s.time():
            if not switched.wait(_SWITCH_TIMEOUT_S):
                raise ArtifactRejected(
                    f"the engine took no step in {_SWITCH_TIMEOUT_S:.0f} s; it is not known whether it switched",
                    reason="timeout",
                )
        self._note_applied(pointer)
        if pointer.role == "draft":
            self._metrics.swaps.inc()
        return directory

    def _note_applied(self, pointer: ServingPointer) -> None:
        self._applied_generation, self._applied_set_at = pointer.generation, pointer.set_at
        self._metrics.served_version.labels(*self._served.place).set(pointer.version)
        if self._served.place == DRAFT:
            self._metrics.pointer_generation.set(pointer.generation)
            self._metrics.draft_info.clear()
            self._metrics.draft_info.labels(str(pointer.version)).set(1)

    def _acknowledge(self) -> None:
        refused, place = self._refused, self._served.place
        self._pointers.acknowledge(
            Acknowledgement(
                replica_id=self._replica_id,
                role=place.role,
                domain=place.domain,
                version=self._served.version,
                digest=self._served.digest,
                generation=refused.generation if refused else self._applied_generation,
                state="refused" if refused else "serving",
                error=self._refusal,
                at=time.time(),
            )
        )
        self._acknowledged_at = time.monotonic()

    def _remember(self, pointer: ServingPointer, directory: Path | None) -> None:
        """Keep the applied version as the last good one; older artifacts beyond a few go."""
        write_durably(self._last_good, msgspec.json.encode(pointer))
        if directory is not None:
            directory.touch()
        artifacts = sorted(
            (path for path in self._cache_dir.iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime
        )
        for path in artifacts[:-_KEPT_ARTIFACTS]:
            shutil.rmtree(path, ignore_errors=True)

    @property
    def _last_good(self) -> Path:
        return self._cache_dir / "last_good.json"

    def _restore_last_good(self) -> None:
        try:
            pointer = msgspec.json.decode(self._last_good.read_bytes(), type=ServingPointer)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("no last good version: %s is unreadable: %s", self._last_good, error)
            return
        try:
            self._install_cached(pointer)
        except ArtifactRejected as error:
            logger.warning("the last good version %d cannot be served: %s", pointer.version, error)

    def _install_cached(self, pointer: ServingPointer) -> None:
        if pointer.target_digest != self._target_digest:
            raise ArtifactRejected("it was made for another target", reason="target")
        if pointer.version != NO_VERSION:
            directory = self._cache_dir / checked_digest(pointer.digest)
            self._served.install(directory, version=pointer.version, digest=pointer.digest)
        self._note_applied(pointer)
        logger.info("starting with the last good %s of domain %s, version %d", *self._served.place, pointer.version)

    def _note_outage(self, error: StoreError | ConfigError) -> None:
        if not self._is_out_of_reach:
            logger.warning(
                "the pointer store does not answer, version %d keeps serving: %s", self._served.version, error
            )
        self._is_out_of_reach = True
        self._metrics.store_up.labels("pointers").set(0)

    def _note_answer(self) -> None:
        if self._is_out_of_reach:
            logger.warning("the pointer store answers again")
        self._is_out_of_reach = False
        self._metrics.store_up.labels("pointers").set(1)
