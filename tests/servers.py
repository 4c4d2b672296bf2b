"""Real servers for tests: a Valkey of our own and a Kafka broker, each of which can be killed and started again.

Fixtures `valkey` and `kafka_broker` last for the session; a test that kills a server starts it again.
Kafka: SLIPSTREAM_KAFKA names a running broker, else `../shared/tools/kafka/start` runs one with Java. Without either
the tests that ask for it are skipped; with CI=true they fail instead.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from slipstream.errors import StoreUnavailable
from slipstream.stores.embedded import EmbeddedValkey, start_valkey

KAFKA_START = Path(__file__).parents[2] / "shared" / "tools" / "kafka" / "start"

_T = TypeVar("_T")


def eventually(attempt: Callable[[], _T], *, timeout_s: float = 60.0) -> _T:
    """The first true answer of `attempt`, which may raise StoreUnavailable meanwhile; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    problem = "no true answer"
    while time.monotonic() < deadline:
        try:
            if answer := attempt():
                return answer
        except StoreUnavailable as error:
            problem = str(error)
        time.sleep(0.02)
    pytest.fail(f"not within {timeout_s} s: {problem}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ValkeyServer:
    """A Valkey on one state directory; `url` stays the same over restarts."""

    def __init__(self, state_dir: Path, *, max_memory_bytes: int = 256 * 2**20) -> None:
        self._state_dir = state_dir
        self._max_memory_bytes = max_memory_bytes
        self._server: EmbeddedValkey | None = None
        self.start()

    @property
    def url(self) -> str:
        assert self._server is not None
        return self._server.url

    def start(self) -> None:
        self._server = start_valkey(self._state_dir, max_memory_bytes=self._max_memory_bytes)

    def kill(self) -> None:
        """End the server as a crash does."""
        assert self._server is not None
        assert self._server.pid is not None
        os.kill(self._server.pid, signal.SIGKILL)
        eventually(lambda: self._server is not None and not self._server.is_running())

    def stop(self) -> None:
        if self._server is not None and self._server.is_running():
            self._server.stop()


class KafkaBroker:
    """A broker on one data directory and port, or a running one that is not ours to kill.

    The segment files of our own lie in `log_dir`/TOPIC-PARTITION.
    """

    def __init__(self, data_dir: Path, *, bootstrap: str | None = None) -> None:
        self._data_dir = data_dir
        self.log_dir = data_dir / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = (0, 0) if bootstrap else (free_port(), free_port())
        self.is_ours = bootstrap is None
        self.bootstrap = bootstrap or f"127.0.0.1:{self._ports[0]}"
        if self.is_ours:
            self.start()

    def start(self) -> None:
        self._data_dir.mkdir(parents=True, exist_ok=True)
        output = self._data_dir / "output"
        with output.open("wb") as log:
            self._process = subprocess.Popen(
                [str(KAFKA_START), str(self._data_dir), *map(str, self._ports)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "KAFKA_HEAP": "256m"},
                # The script runs java before it becomes java: ending the group ends both.
                start_new_session=True,
            )

        def is_ready() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, output.read_text()[-2000:]
            return b"Kafka Server started" in output.read_bytes()

        eventually(is_ready, timeout_s=120)

    def kill(self) -> None:
        """End the broker as a crash does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        if self.is_ours:
            self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, how)
            self._process.wait()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    named = os.environ.get("SLIPSTREAM_KAFKA")
    if not named and not (KAFKA_START.is_file() and shutil.which("java")):
        reason = "no Kafka: set SLIPSTREAM_KAFKA=host:port, or have Java 17 and the broker of ../shared/tools/kafka"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    broker = KafkaBroker(tmp_path_factory.mktemp("kafka"), bootstrap=named or None)
    yield broker
    broker.stop()
