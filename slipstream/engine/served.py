"""What a replica's pointers move: the draft of each domain, and the matrix that Token Recycling starts from."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple, Protocol

from slipstream.drafting.recycling_artifact import StoredMatrix, load_matrix
from slipstream.engine.artifact import load_verified
from slipstream.engine.runner import EngineRunner
from slipstream.versions import MATRIX, NO_VERSION, Place
from slipstream_kernels.adjacency import empty_adjacency


class Served(Protocol):
    """What one pointer names, as this replica runs it."""

    @property
    def place(self) -> Place:
        """Whose pointer it is."""

    @property
    def version(self) -> int:
        """The version in use, NO_VERSION for none."""

    @property
    def digest(self) -> str:
        """Digest of what was loaded for that version, computed from memory; "" for none."""

    def install(self, directory: Path | None, *, version: int, digest: str) -> threading.Event:
        """Load a version's files (None: version 0, which has none) beside what runs and switch between two steps.

        The event is set when the switch has happened. Raises ArtifactRejected, with nothing changed, for files that are
        not what `digest` promises or do not fit this replica's target.
        """


class ServedDraft:
    """The draft model of one domain; without one the domain's requests use that of the default domain."""

    def __init__(self, runner: EngineRunner, *, domain: str) -> None:
        self._runner = runner
        self.place = Place("draft", domain)

    @property
    def version(self) -> int:
        """See `Served.version`."""
        return self._runner.draft_version_of(self.place.domain)

    @property
    def digest(self) -> str:
        """See `Served.digest`."""
        return self._runner.engine.draft_digest_of(self.place.domain)

    def install(self, directory: Path | None, *, version: int, digest: str) -> threading.Event:
        """See `Served.install`."""
        draft = None if directory is None else load_verified(directory, digest=digest)
        return self._runner.install_draft(draft, version=version, domain=self.place.domain)


class _Start(NamedTuple):
    version: int
    digest: str
    switched: threading.Event


class ServedMatrix:
    """What Token Recycling began with. It learns from there on, so the digest is that of the beginning."""

    def __init__(self, runner: EngineRunner) -> None:
        self._runner = runner
        self.place = MATRIX
        self._started = self._incoming = _Start(NO_VERSION, "", threading.Event())

    @property
    def version(self) -> int:
        """See `Served.version`."""
        return self._now().version

    @property
    def digest(self) -> str:
        """See `Served.digest`."""
        return self._now().digest

    def install(self, directory: Path | None, *, version: int, digest: str) -> threading.Event:
        """See `Served.install`; version 0 forgets everything and begins with an empty matrix."""
        vocab_size = self._runner.engine.vocab_size
        if directory is None:
            matrix = StoredMatrix(empty_adjacency(vocab_size), "")
        else:
            matrix = load_matrix(directory, vocab_size=vocab_size, digest=digest)
        switched = self._runner.install_matrix(matrix, version=version)
        self._started, self._incoming = self._now(), _Start(version, matrix.digest, switched)
        return switched

    def _now(self) -> _Start:
        return self._incoming if self._incoming.switched.is_set() else self._started
