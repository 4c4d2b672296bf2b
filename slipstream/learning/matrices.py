"""The Token Recycling matrix that a distiller fills beside its student, and the versions it becomes.

Nothing is trained: every observation's rows replace what was known behind their tokens, in the order of the log. The
newest registered version and the replay buffer make it again after a crash, so nothing of its own is on disk but what
is on its way into the registry.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from slipstream.drafting.recycling_artifact import load_matrix, save_matrix
from slipstream.engine.artifact import local_path
from slipstream.errors import ArtifactRejected
from slipstream.learning.matrix_replay import rows_of
from slipstream.records import Observation
from slipstream.stores.protocols import ModelRegistry, PointerStore
from slipstream.versions import MATRIX, NO_VERSION, Lineage, ModelVersion
from slipstream_kernels.adjacency import Adjacency, empty_adjacency, remember

_logger = logging.getLogger(__name__)

_PROTECTED_HISTORY = 10


class MatrixVersions:
    """One matrix for one target. Call `resume` first; `publish` may raise StoreUnavailable and be repeated."""

    def __init__(
        self,
        registry: ModelRegistry,
        pointers: PointerStore,
        *,
        target_digest: str,
        vocab_size: int,
        keep_versions: int,
        staging_dir: Path,
        artifact_root: Path,
    ) -> None:
        self._registry = registry
        self._pointers = pointers
        self._target_digest = target_digest
        self._vocab_size = vocab_size
        self._keep_versions = keep_versions
        self._staging_dir = staging_dir
        self._artifact_root = artifact_root
        self._matrix = empty_adjacency(vocab_size)
        self._parent_version = NO_VERSION
        self._outgoing: tuple[str, Lineage] | None = None
        self._unaliased = NO_VERSION

    def resume(self, observations: Iterable[Observation]) -> None:
        """Begin with the newest registered matrix that loads, else an empty one, and take these in, oldest first."""
        self._outgoing = None
        versions = [one for one in self._registry.versions(*MATRIX) if one.lineage.target_digest == self._target_digest]
        newest = versions[-1].version if versions else NO_VERSION
        challenger = self._registry.alias(*MATRIX, "challenger") or NO_VERSION
        self._unaliased = newest if challenger < newest else NO_VERSION
        self._parent_version, self._matrix = self._newest_that_loads(versions)
        for one in observations:
            self.take_in(one)

    def take_in(self, observation: Observation) -> None:
        """Learn what an observation (`is_trainable` in this vocabulary) says."""
        remember(self._matrix, *rows_of(observation))

    def stage(self, lineage: Lineage) -> None:
        """Write what is known now as the next version, made from what this lineage of a draft names.

        One that no registry has taken yet is replaced: the new one holds all that it held.
        """
        shutil.rmtree(self._staging_dir, ignore_errors=True)
        digest = save_matrix(self._staging_dir, self._matrix)
        of_matrix = msgspec.structs.replace(lineage, parent_version=self._parent_version, num_train_steps=0)
        self._outgoing = (digest, of_matrix)

    def publish(self) -> ModelVersion | None:
        """Register what is staged and make it the challenger, finishing what an outage cut short; the new version."""
        registered = None
        if self._outgoing is not None:
            digest, lineage = self._outgoing
            registered = self._registry.register(*MATRIX, self._staging_dir, digest=digest, lineage=lineage)
            self._outgoing = None
            self._parent_version = self._unaliased = registered.version
            _logger.info("registered matrix version %d: %s", registered.version, lineage)
        if self._unaliased:
            self._registry.set_alias(*MATRIX, "challenger", self._unaliased)
            self._unaliased = NO_VERSION
            served = self._pointers.history(*MATRIX, limit=_PROTECTED_HISTORY)
            protected = frozenset(pointer.version for pointer in served)
            self._registry.prune(*MATRIX, keep=self._keep_versions, protected=protected)
        return registered

    def _newest_that_loads(self, versions: list[ModelVersion]) -> tuple[int, Adjacency]:
        for one in reversed(versions):
            try:
                directory = local_path(one.artifact_uri, self._artifact_root)
                return one.version, load_matrix(directory, vocab_size=self._vocab_size, digest=one.digest).matrix
            except ArtifactRejected as error:
                _logger.warning("cannot begin with matrix version %d: %s", one.version, error)
        return NO_VERSION, empty_adjacency(self._vocab_size)
