"""A version's files on disk: what every registry does with them.

A directory of artifacts is flat and holds regular files. It is copied under a hidden name, synced, then renamed: a
directory under its final name is whole, whatever was killed in between.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from slipstream.errors import ArtifactRejected
from slipstream.versions import Lineage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def lineage_key(digest: str, lineage: Lineage) -> str:
    """What makes a registration the same one when it is repeated: 32 hex digits over digest and lineage."""
    return hashlib.sha256(msgspec.json.encode((digest, lineage), order="sorted")).hexdigest()[:32]


def checked_name(kind: str, value: str) -> str:
    """`value`, which may stand in a path, a key or a model's name; ValueError if it may not."""
    if not _NAME.fullmatch(value):
        raise ValueError(f"{kind} {value!r}: expected 1 to 64 letters, digits, '.', '_', '-', first a letter or digit")
    return value


def store_artifact(source: Path, destination: Path) -> str:
    """Copy `source` to `destination`, durably; the file:// URI of the copy.

    An existing `destination` is a whole copy from an earlier try and is kept. Raises ArtifactRejected if `source` is
    no directory, is empty, or holds anything but regular files (links and directories included).
    """
    files = _regular_files(source)
    if not destination.exists():
        destination.parent.mkdir(parents=True, exist_ok=True)
        incoming = destination.parent / f".incoming-{uuid.uuid4().hex}"
        incoming.mkdir()
        try:
            for file in files:
                _copy_durably(file, incoming / file.name)
            _sync(incoming)
            _rename_unless_there(incoming, destination)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        _sync(destination.parent)
    return destination.absolute().as_uri()


def path_of_uri(uri: str) -> Path:
    """The path that a file: URI names; the caller checks the scheme and that the path is where it may be."""
    return Path(unquote(urlsplit(uri).path))


def delete_artifact(uri: str, *, root: Path) -> None:
    """Delete the directory behind a URI of `store_artifact`; nothing happens if it is gone or not below `root`."""
    path = path_of_uri(uri).resolve()
    if path.is_dir() and path.is_relative_to(root.resolve()) and path != root.resolve():
        # Renamed first: a deletion cut short must not leave half a directory under its final name.
        leaving = path.with_name(f".leaving-{uuid.uuid4().hex}")
        path.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file whole, synced, or not at all; makes its directory if that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = path.with_name(f".incoming-{uuid.uuid4().hex}")
    with incoming.open("xb") as writer:
        writer.write(data)
        writer.flush()
        os.fsync(writer.fileno())
    incoming.rename(path)
    _sync(path.parent)


def _regular_files(source: Path) -> list[Path]:
    if source.is_symlink() or not source.is_dir():
        raise ArtifactRejected(
            f"artifact {source}: no directory; expected a flat directory of regular files", reason="format"
        )
    files = sorted(source.iterdir())
    odd = [file.name for file in files if file.is_symlink() or not file.is_file()]
    if odd or not files:
        seen = f"{odd[0]!r} is no regular file" if odd else "it is empty"
        raise ArtifactRejected(
            f"artifact {source}: {seen}; expected a flat directory of regular files", reason="format"
        )
    return files


def _copy_durably(source: Path, destination: Path) -> None:
    with source.open("rb") as reader, destination.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
    destination.chmod(0o444)


def _rename_unless_there(incoming: Path, destination: Path) -> None:
    try:
        incoming.rename(destination)
    except OSError:
        # Another process finished the same copy first; a directory is never renamed over one that holds files.
        if not destination.is_dir():
            raise


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
