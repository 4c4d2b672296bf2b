"""`make up` on real processes: one supervisor a state directory, restarts, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import processes
from deploy.local.supervisor import ROOT, Endpoints, embedded_socket, read_endpoints, to_toml
from slipstream.config import Config, GateConfig, LearningConfig, ServingConfig, load_config

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
READY_S = 180.0


def supervise(state: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.local.supervisor", "--state", str(state)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ready(state: Path) -> Endpoints | None:
    endpoints = read_endpoints(state)
    return endpoints if endpoints is not None and endpoints.is_ready else None


@pytest.fixture
def state() -> Iterator[Path]:
    """A short path: Valkey's and Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="up-") as directory:
        yield Path(directory)


@needs_proc
@pytest.mark.processes
@pytest.mark.timeout(600)
def test_up_restarts_what_dies_admits_no_second_and_leaves_nothing_even_of_a_killed_one(state: Path) -> None:
    first = supervise(state)
    try:
        assert processes.wait_until(lambda: ready(state) is not None, timeout_s=READY_S)
        endpoints = ready(state)
        assert endpoints is not None
        with urllib.request.urlopen(f"{endpoints.api_url}/v1/models", timeout=10) as answer:
            assert answer.status == 200

        second = supervise(state)
        assert second.wait(60) == 2
        assert second.stdout is not None
        assert f"held by the supervisor with pid {first.pid}" in second.stdout.read()

        def promoters() -> list[int]:
            return processes.marked_processes(state, part="promoter")

        assert processes.wait_until(lambda: len(promoters()) == 1, timeout_s=READY_S)
        (killed,) = promoters()
        os.kill(killed, signal.SIGKILL)
        assert processes.wait_until(lambda: promoters() not in ([], [killed]), timeout_s=READY_S)
        ports = processes.listeners(processes.marked_processes(state))
        assert int(endpoints.api_url.rpartition(":")[2]) in {one.port for one in ports}
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()

    last = supervise(state)  # ends what the killed one left, and starts afresh on the same data
    try:
        assert processes.wait_until(lambda: (up := ready(state)) is not None and up.pid == last.pid, timeout_s=READY_S)
    finally:
        last.terminate()
        assert last.wait(120) == 0
    assert processes.marked_processes(state) == []
    assert processes.unix_peer(embedded_socket(endpoints.redis_url)) is None
    assert not {one.inode for one in ports} & {one.inode for one in processes.all_listeners()}
    assert read_endpoints(state) is None


def test_a_written_config_reads_back_equal(tmp_path: Path) -> None:
    config = Config(
        serving=ServingConfig(target='a "quoted" \\ path', port=8123),
        learning=LearningConfig(learning_rate=1e-4),
        gate=GateConfig(margin=-0.5),
    )
    path = tmp_path / "some.toml"
    path.write_text(to_toml(config))
    assert load_config({"SLIPSTREAM_CONFIG": str(path)}).config == config


def test_the_demos_settings_are_valid() -> None:
    path = ROOT / "deploy" / "local" / "demo.toml"
    assert load_config({"SLIPSTREAM_CONFIG": str(path)}).config != Config()
