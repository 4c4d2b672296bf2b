"""The directory of one running service: Ray's session, HAProxy's files, the token; nobody else may enter it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

from slipstream.errors import ConfigError

_MAX_PATH_CHARACTERS = 28
"""HAProxy's socket lies 68 characters below (a node id and a name) and may have 97 in all; Ray's 65 of 107."""


class RunDir:
    """A private directory, emptied at the start and held until `release`.

    It lies in the state directory, or, if that path is too long for unix sockets, in the system's temporary
    directory. Raises ConfigError if another service runs on the same state directory.
    """

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(state_dir / "target.lock")
        self.path = _place(state_dir)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(self.path)
        self.token_path = self.path / "ray_token"
        descriptor = os.open(self.token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))

    def release(self) -> None:
        """Remove the directory and let another service use the state directory."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(
            f"{path.parent}: a service runs on this state directory; stop it or set SLIPSTREAM_STATE to another one"
        ) from None
    return descriptor


def _place(state_dir: Path) -> Path:
    place = state_dir / "run"
    if len(str(place)) <= _MAX_PATH_CHARACTERS:
        return place
    name = hashlib.sha256(str(state_dir).encode()).hexdigest()[:10]
    return Path(tempfile.gettempdir()) / f"ss-{os.getuid()}-{name}"


def _check_private(path: Path) -> None:
    """Refuse a directory that another user laid in our way."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{path} is not a private directory of this user; remove it and start again")
