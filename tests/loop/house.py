"""Stores that outlive a distiller, and distillers that may be killed at any call of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from slipstream.engine.artifact import local_path
from slipstream.learning.distiller import LINEAGE_FILE, Curriculum, Distiller, LineageFile
from slipstream.learning.replay import ReplayBuffer
from slipstream.records import encode, is_held_out
from slipstream.stores.memory import MemoryLog, MemoryPointers, MemoryRegistry
from slipstream.stores.protocols import Subscription
from slipstream.telemetry import WorkerMetrics
from slipstream.versions import DRAFT
from tests.observed import TARGET_DIGEST, VOCAB_SIZE, observation
from workers.distiller.worker import DistillerWorker

CURRICULUM = Curriculum(
    target_digest=TARGET_DIGEST,
    vocab_size=VOCAB_SIZE,
    observations_per_version=5,
    steps_per_version=2,
    batch_sequences=2,
    learning_rate=3e-3,
    replay_ratio=0.5,
    keep_versions=1000,
)


class Killed(Exception):
    """Stands for kill -9: nothing after it runs in this life of the worker."""


class Faulty:
    """A real store whose calls of some names fail when `fault` says so, before or after they took effect."""

    def __init__(self, real: Any, fault: Callable[[str, str], None]) -> None:
        self._real = real
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._fault(name, "before")
            result = real(*args, **kwargs)
            self._fault(name, "after")
            return Faulty(result, self._fault) if name == "subscribe" else result

        return call


def no_fault(name: str, when: str) -> None:
    """Let every call pass."""


class House:
    """Stores and a state directory that outlive any number of distillers."""

    def __init__(self, root: Path, *, log: Any = None, pointers: Any = None) -> None:
        self.root = root
        self.artifact_root = root / "artifacts"
        self.log = log or MemoryLog(num_partitions=3)
        self.registry = MemoryRegistry(self.artifact_root)
        self.pointers = pointers or MemoryPointers()
        self.metrics = WorkerMetrics()
        self.worker: DistillerWorker | None = None

    def start(self, fault: Callable[[str, str], None] = no_fault, curriculum: Curriculum = CURRICULUM) -> None:
        """A new distiller on what the last one left; the last one's membership ends as a dead member's does."""
        if self.worker is not None and self.worker._subscription is not None:
            real: Subscription = self.worker._subscription._real  # type: ignore[attr-defined]
            real.close()
        distiller = Distiller(
            Faulty(self.registry, fault),
            self.pointers,
            ReplayBuffer(self.root / "replay", max_per_domain=8),
            curriculum=curriculum,
            state_dir=self.root,
            artifact_root=self.artifact_root,
            metrics=self.metrics,
        )
        self.worker = DistillerWorker(
            distiller, Faulty(self.log, fault), self.pointers, metrics=self.metrics, max_poll=4
        )

    def run(self, *, idle_turns: int = 2) -> None:
        """Turns until nothing is left to do; the log is asked without waiting."""
        assert self.worker is not None
        num_idle = 0
        while num_idle < idle_turns:
            num_idle = 0 if self.worker.turn() else num_idle + 1

    def lineage_files(self) -> Iterator[tuple[int, LineageFile]]:
        for version in self.registry.versions(*DRAFT):
            path = local_path(version.artifact_uri, self.artifact_root) / LINEAGE_FILE
            yield version.version, msgspec.json.decode(path.read_bytes(), type=LineageFile)


def send(log: Any, names: list[str]) -> None:
    log.append([(name, encode(observation(name))) for name in names])


def trained(names: list[str]) -> set[str]:
    return {f"{name}/0" for name in names if not is_held_out(name)}
