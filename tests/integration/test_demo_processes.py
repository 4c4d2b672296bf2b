"""The supervisor's view of processes, on small real programs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local import processes
from deploy.local.processes import MARK, Child

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")

SLEEP = "import time; time.sleep(600)"
LISTEN = (
    "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); " + SLEEP
)
DETACH = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)"


def child(state: Path, program: str, name: str = "part") -> Child:
    environment = dict(os.environ) | {MARK: str(state)}
    return Child(name, (sys.executable, "-c", program), environment=environment, log=state / f"{name}.log")


@needs_proc
def test_a_grandchild_that_detached_itself_is_found_and_ended(tmp_path: Path) -> None:
    starter = child(tmp_path, DETACH)
    starter.start(directory=tmp_path)
    assert processes.wait_until(lambda: starter.exit_code() == 0, timeout_s=30)
    assert len(processes.marked_processes(tmp_path)) == 1
    assert len(processes.marked_processes(tmp_path, part="part")) == 1
    assert processes.marked_processes(tmp_path, part="another") == []
    assert processes.marked_processes(tmp_path / "elsewhere") == []
    assert len(processes.end_marked(tmp_path, timeout_s=10)) == 1
    assert processes.marked_processes(tmp_path) == []


@needs_proc
def test_a_listening_port_is_seen_while_its_process_lives_and_not_after(tmp_path: Path) -> None:
    listener = child(tmp_path, LISTEN)
    listener.start(directory=tmp_path)
    assert processes.wait_until(lambda: listener.last_line().isdigit(), timeout_s=30)
    seen = processes.listeners(processes.marked_processes(tmp_path))
    assert {(one.address, one.port) for one in seen} == {("127.0.0.1", int(listener.last_line()))}
    assert seen <= processes.all_listeners()
    listener.ask_to_stop()
    assert listener.stop(timeout_s=10)
    assert not seen & processes.all_listeners()


@needs_proc
def test_a_child_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path; from deploy.local.processes import Child; "
        f"state = Path({str(tmp_path)!r}); "
        f"command = (sys.executable, '-c', {SLEEP!r}); "
        "one = Child('inner', command, environment=dict(os.environ), log=state / 'inner.log'); "
        "one.start(directory=state); print('started', flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", program], env=dict(os.environ) | {MARK: str(tmp_path)}, stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    assert starter.stdout.readline() == b"started\n"
    assert len(processes.marked_processes(tmp_path, part="inner")) == 1
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert processes.wait_until(lambda: not processes.marked_processes(tmp_path), timeout_s=10)


def test_a_child_that_ignores_the_request_is_killed_and_reported(tmp_path: Path) -> None:
    stubborn = child(
        tmp_path, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); " + SLEEP
    )
    stubborn.start(directory=tmp_path)
    assert processes.wait_until(lambda: stubborn.last_line() == "deaf", timeout_s=30)
    stubborn.ask_to_stop()
    assert not stubborn.stop(timeout_s=0.2)
    assert stubborn.exit_code() == -signal.SIGKILL


def test_a_taken_port_is_not_offered() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        offered = processes.free_port(port)
        assert offered != port
    assert processes.free_port(offered) == offered


def test_loopback_addresses_are_told_from_others() -> None:
    assert [processes.is_loopback(one) for one in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == [True] * 3
    assert [processes.is_loopback(one) for one in ("0.0.0.0", "::", "10.0.0.1")] == [False] * 3
