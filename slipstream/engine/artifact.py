"""Fetching a version's files by URI, and what is refused before anything is loaded.

Only `file:` URIs below the configured artifact root are fetched, symbolic links resolved first. An artifact, a draft or
a matrix, is flat: config.json, *.safetensors and further *.json files. Anything else (pickles above all) is refused,
not skipped.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from slipstream.errors import ArtifactRejected, CheckpointError
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.versions import ServingPointer

MAX_ARTIFACT_BYTES = 4 * 2**30
_ALLOWED_SUFFIXES = (".json", ".safetensors")


def fetch(pointer: ServingPointer, *, artifact_root: Path, into: Path) -> Path:
    """Copy the pointer's files to `into/DIGEST`, whole or not at all; returns that directory.

    What is there already is not fetched again, so a version seen before needs no artifact store. Raises
    ArtifactRejected for a malformed digest, a place outside the root, a missing directory, or a file of no
    kind that artifacts have.
    """
    destination = into / checked_digest(pointer.digest)
    if destination.is_dir():
        return destination
    source = local_path(pointer.artifact_uri, artifact_root)
    files = _checked_files(source)
    into.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=into))
    try:
        for path in files:
            shutil.copyfile(path, partial / path.name)
        partial.rename(destination)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        # Replicas of one machine share the cache: another one may have put the same digest there meanwhile.
        if not destination.is_dir():
            raise ArtifactRejected(f"cannot copy {source}: {error}", reason="location") from error
    return destination


def checked_digest(digest: str) -> str:
    """`digest`, which may name a directory; raises ArtifactRejected unless it is 64 hexadecimal digits."""
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ArtifactRejected(f"digest is {digest!r}; expected 64 hexadecimal digits (SHA-256)", reason="digest")
    return digest


def load_verified(directory: Path, *, digest: str) -> Checkpoint:
    """The checkpoint in `directory`; raises ArtifactRejected unless its tensors have this digest."""
    try:
        checkpoint = load_checkpoint(directory)
    except CheckpointError as error:
        raise ArtifactRejected(str(error), reason="format") from error
    if checkpoint.digest != digest:
        raise ArtifactRejected(
            f"tensors have digest {checkpoint.digest}, the pointer promises {digest}; the files were changed or "
            "damaged after registration",
            reason="digest",
        )
    return checkpoint


def local_path(uri: str, artifact_root: Path) -> Path:
    """The directory a `file:` URI names, links resolved; raises ArtifactRejected if it is not below the root."""
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ArtifactRejected(
            f"artifact URI is {uri!r}; expected file:///... below {artifact_root}", reason="location"
        )
    path, root = Path(unquote(parts.path)).resolve(), artifact_root.resolve()
    if root not in path.parents:
        raise ArtifactRejected(f"artifact URI {uri!r} leads to {path}, outside the root {root}", reason="location")
    return path


def _checked_files(directory: Path) -> list[Path]:
    try:
        files = sorted(directory.iterdir())
    except OSError as error:
        raise ArtifactRejected(f"cannot read {directory}: {error.strerror}", reason="location") from error
    for path in files:
        if path.is_symlink() or not path.is_file() or path.suffix not in _ALLOWED_SUFFIXES:
            raise ArtifactRejected(
                f"{path.name} in {directory} is not allowed; expected regular files ending in "
                f"{' or '.join(_ALLOWED_SUFFIXES)}",
                reason="format",
            )
    num_bytes = sum(path.stat().st_size for path in files)
    if num_bytes > MAX_ARTIFACT_BYTES:
        raise ArtifactRejected(f"{directory} has {num_bytes} bytes, the limit is {MAX_ARTIFACT_BYTES}", reason="format")
    return files
