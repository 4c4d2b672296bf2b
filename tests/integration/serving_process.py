"""The real service as a process, for tests: started on a free port with its own state directory, stopped in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from tests.servers import free_port

ROOT = Path(__file__).parents[2]
MODEL = "mix-moe-11m"

START_S = 120.0
"""Deadline of a start on a machine that is busy with other tests; the claim about start-up time is a benchmark's."""


def environment(state_dir: Path, *, serving: Mapping[str, int | str], **addresses: str) -> dict[str, str]:
    """The environment of a service with these `[serving]` settings and SLIPSTREAM_... addresses."""
    config = state_dir / "slipstream.toml"
    values = "\n".join(f"{name} = {value!r}".replace("'", '"') for name, value in serving.items())
    config.write_text(f"[serving]\n{values}\n")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
    named = {f"SLIPSTREAM_{name.upper()}": value for name, value in addresses.items()}
    return (
        inherited
        | named
        | {
            "SLIPSTREAM_CONFIG": str(config),
            "SLIPSTREAM_STATE": str(state_dir),
            "OMP_NUM_THREADS": "1",
        }
    )


def run_to_exit(env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Start a service that must refuse to."""
    return subprocess.run(
        [sys.executable, "-m", "services.target"], cwd=ROOT, env=dict(env), capture_output=True, text=True, timeout=60
    )


class ServiceProcess:
    """A running `python -m services.target`; ready when constructed."""

    def __init__(self, state_dir: Path, *, serving: Mapping[str, int | str], **addresses: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = state_dir / "service.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.target"],
                cwd=ROOT,
                env=environment(state_dir, serving={**serving, "port": self.port}, **addresses),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_ready()

    def stop(self) -> int:
        """Ask it to stop; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def children(self) -> dict[int, str]:
        """Processes of its session that live, by id, with their command lines; the service itself left out."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != self.process.pid:
                try:
                    if os.getsid(int(entry.name)) == self.process.pid:
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except (OSError, UnicodeDecodeError):
                    continue
        return found

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the service ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        self.stop()
        pytest.fail(f"the service was not ready within {START_S} s:\n{self.log.read_text()}")
