"""The processes of one machine: started in their own groups, found again by a mark, ended without leftovers.

Every process that a supervisor starts, and every process those start, inherits two environment variables: MARK with
the supervisor's state directory and PART with the name of the part. On Linux that finds them all, however they were
re-parented (Ray's detach themselves). Elsewhere only the process groups are known. A Valkey overwrites its environment
with its title; its socket tells who it is (`unix_peer`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

MARK = "SLIPSTREAM_SUPERVISED"
PART = "SLIPSTREAM_PART"
_PROC = Path("/proc")
_PR_SET_PDEATHSIG = 1
_LISTEN = "0A"
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Listener(NamedTuple):
    """A listening TCP socket; `inode` tells it from a later one on the same port."""

    address: str
    port: int
    inode: str


class Child:
    """One program, its log file and its restarts. Used from one thread, which must outlive the child."""

    def __init__(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path, niceness: int = 0
    ) -> None:
        self.name = name
        self.log = log
        self.num_starts = 0
        self.started_at = 0.0
        self._command = list(command)
        self._environment = dict(environment) | {PART: name}
        self._niceness = niceness
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, directory: Path) -> None:
        """Start the program in a new session, its output appended to the log; it ends when its starter does (Linux)."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = _spawn(self._command, self._environment, output, directory, self._niceness)
        self.num_starts += 1
        self.started_at = time.monotonic()

    def exit_code(self) -> int | None:
        """The code of an ended program; None while it runs or before the first start."""
        return self._process.poll() if self._process else None

    def is_running(self) -> bool:
        """Whether the program was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the program itself, so that it ends its own children in order."""
        if self._process is not None and self.is_running():
            self._process.terminate()

    def stop(self, *, timeout_s: float) -> bool:
        """Wait for the program after `ask_to_stop`, then kill its whole group; False if it had to be killed."""
        if self._process is None:
            return True
        is_in_time = True
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            is_in_time = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return is_in_time

    def last_line(self) -> str:
        """The last line of the log that says something, or ""."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _spawn(
    command: list[str], environment: dict[str, str], output: IO[bytes], directory: Path, niceness: int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C in the terminal reaches the supervisor alone, which stops in order
        preexec_fn=_before_exec(os.getpid(), niceness),  # the supervisor has one thread
    )


def _before_exec(parent: int, niceness: int) -> Callable[[], None]:
    def before_exec() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # the parent died before the line above
                os._exit(1)
        os.nice(niceness)

    return before_exec


def marked_processes(state_dir: Path, *, part: str | None = None) -> list[int]:
    """Ids of the living processes that carry the mark of this state directory (and part), this process excepted.

    Empty where there is no /proc.
    """
    marks = {f"{MARK}={state_dir}".encode()} | ({f"{PART}={part}".encode()} if part else set())
    found = []
    for entry in _PROC.glob("[0-9]*") if _PROC.is_dir() else ():
        pid = int(entry.name)
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes().split(b"\0")
            if pid != os.getpid() and marks <= set(environment) and not _is_dead(entry):
                found.append(pid)
    return found


def _is_dead(entry: Path) -> bool:
    """Whether a process has ended and only waits for its parent to look."""
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")


def command_of(pid: int) -> str:
    """The start of a process's command line, for people; "?" if it is gone."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:90].strip()
    except OSError:
        return "?"


def end_marked(state_dir: Path, *, part: str | None = None, timeout_s: float) -> list[str]:
    """End every marked process: SIGTERM, then SIGKILL after `timeout_s`; returns the commands that had to be ended."""

    def left() -> list[int]:
        return marked_processes(state_dir, part=part)

    commands = [command_of(pid) for pid in left()]
    _signal_all(left(), signal.SIGTERM)
    if not wait_until(lambda: not left(), timeout_s=timeout_s):
        _signal_all(left(), signal.SIGKILL)
        wait_until(lambda: not left(), timeout_s=timeout_s)
    return commands


def _signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def unix_peer(path: str) -> int | None:
    """The process that listens on a unix socket; None if nobody does, or where the system does not say."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError, AttributeError):
        probe.settimeout(1.0)
        probe.connect(path)
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[0])
    return None


def end_unix_peer(path: str, *, timeout_s: float) -> None:
    """End the process that listens on a unix socket, if there is one, and wait until nobody does."""
    if pid := unix_peer(path):
        _signal_all([pid], signal.SIGTERM)
        wait_until(lambda: unix_peer(path) is None, timeout_s=timeout_s)


def listeners(pids: Iterable[int]) -> set[Listener]:
    """The listening TCP sockets that these processes hold; empty where there is no /proc."""
    held = {inode for pid in pids for inode in _socket_inodes(pid)}
    return {one for one in all_listeners() if one.inode in held}


def all_listeners() -> set[Listener]:
    """Every listening TCP socket of this machine (of this network namespace)."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    address, _, port = fields[1].rpartition(":")
                    found.add(Listener(_readable_address(address), int(port, 16), fields[9]))
    return found


def _readable_address(packed: str) -> str:
    """The kernel's hexadecimal words, each in the machine's byte order, as an address."""
    words = [int(packed[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(packed), 8)]
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words))


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    return address.startswith(("127.", "::ffff:127.")) or address == "::1"


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    with contextlib.suppress(OSError):
        for descriptor in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(descriptor)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    return inodes


def free_port(preferred: int) -> int:
    """`preferred` if nobody listens there on loopback, else (or for 0) a port that the system picks."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise OSError("no free TCP port on 127.0.0.1")


def wait_until(condition: Callable[[], bool], *, timeout_s: float, poll_s: float = 0.05) -> bool:
    """Whether `condition` came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True
