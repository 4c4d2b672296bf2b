"""How the service starts, survives and ends: refusals, stores that are down, a killed replica, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from deploy.local.processes import Listener, is_loopback, listeners
from tests.integration.serving_process import MODEL, ServiceProcess, environment, run_to_exit
from tests.servers import eventually, free_port

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    ("serving", "addresses", "message"),
    [
        ({"no_such_knob": 1}, {}, "no_such_knob"),
        ({"num_replicas": 0}, {}, "num_replicas"),
        ({}, {"redis": "http://localhost"}, "SLIPSTREAM_REDIS=http://localhost"),
        ({}, {"kafka": "nowhere"}, "'nowhere' is no host:port"),
        ({}, {"api_keys": "/nonexistent/keys.toml"}, "cannot read /nonexistent/keys.toml"),
        ({"target": "/nonexistent/model"}, {}, "cannot read /nonexistent/model/config.json"),
        ({"host": "192.0.2.77"}, {}, "cannot listen at 192.0.2.77"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_setting_stops_the_start_with_one_line(
    tmp_path: Path, serving: dict[str, int | str], addresses: dict[str, str], message: str
) -> None:
    ended = run_to_exit(environment(tmp_path, serving=serving, **addresses))
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_taken_port_stops_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = run_to_exit(environment(tmp_path, serving={"port": taken.getsockname()[1]}))
    assert ended.returncode == 2
    assert "cannot listen at 127.0.0.1" in ended.stderr


@pytest.fixture(scope="module")
def lonely() -> Iterator[ServiceProcess]:
    """A service whose stores have never been up."""
    with tempfile.TemporaryDirectory(prefix="lonely-") as folder:
        service = ServiceProcess(
            Path(folder), serving={}, redis=f"redis://127.0.0.1:{free_port()}", kafka=f"127.0.0.1:{free_port()}"
        )
        yield service
        if service.process.poll() is None:
            service.stop()


def client_of(service: ServiceProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0, timeout=120)


def test_a_service_starts_and_serves_with_every_store_down(lonely: ServiceProcess) -> None:
    answer = client_of(lonely).completions.create(model=MODEL, prompt="def", max_tokens=5)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_a_second_service_on_the_same_state_directory_is_refused(lonely: ServiceProcess) -> None:
    ended = run_to_exit(environment(lonely.log.parent, serving={"port": free_port()}))
    assert ended.returncode == 2
    assert "a service runs on this state directory" in ended.stderr


OPEN_PORTS = {
    "-m services.target": 1,  # gRPC of a Ray worker, as in every "1" below that says no more
    "/gcs_server": 1,  # gRPC
    "/raylet/raylet": 2,  # gRPC of the node and of its objects
    "/autoscaler/_private/monitor.py": 1,  # metrics of the process
    "/_private/log_monitor.py": 1,
    "/ray/dashboard/dashboard.py": 1,  # metrics of the process
    "ray::DashboardAgent": 3,  # gRPC, metrics of the node, HTTP on the node's address
    "ray::RuntimeEnvAgent": 1,  # HTTP on the node's address
    "ray::ServeController": 1,
    "ray::ProxyActor": 1,
    "ray::HAProxyManager": 1,
    "ray::ServeReplica": 2,  # gRPC of a Ray worker, and between Serve's deployments
    "ray::IDLE": 1,
}
"""How many ports Ray 2.60 opens beyond loopback, whatever it is told; HTTP and gRPC ask for the token (docs/api.md)."""

OVERWRITTEN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes whose title covers their environment in /proc; their own HTTP ports tell that they ask for the token."""


def processes_of(service: ServiceProcess) -> dict[int, str]:
    return {service.process.pid: f"{sys.executable} -m services.target"} | service.children()


def open_listeners(pid: int) -> list[Listener]:
    return [one for one in listeners([pid]) if not is_loopback(one.address)]


def test_nothing_but_rays_own_ports_is_open_beyond_loopback(lonely: ServiceProcess) -> None:
    mine = processes_of(lonely)
    assert lonely.port in {one.port for one in listeners(mine) if is_loopback(one.address)}
    for pid, command in mine.items():
        allowed = sum(number for name, number in OPEN_PORTS.items() if name in command)
        seen = open_listeners(pid)
        assert len(seen) <= allowed, f"{command}: {seen}, expected at most {allowed} ports beyond loopback"


def test_every_ray_process_is_told_to_ask_for_the_token(lonely: ServiceProcess) -> None:
    mine = lonely.children()
    told = {pid for pid in mine if b"RAY_AUTH_MODE=token" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
    rest = {pid: command for pid, command in mine.items() if pid not in told}
    assert told
    assert all(command.startswith(OVERWRITTEN) for command in rest.values()), rest
    for pid in rest:
        for one in open_listeners(pid):
            if one.address not in ("::", "0.0.0.0"):  # their HTTP; the rest is gRPC and metrics
                assert httpx.get(f"http://{one.address}:{one.port}/", timeout=30).status_code == 401


def test_a_killed_replica_ends_its_requests_clearly_and_fails_none_that_comes_later(lonely: ServiceProcess) -> None:
    body = {"model": MODEL, "prompt": "def", "max_tokens": 400, "temperature": 2, "seed": 6}
    with httpx.Client(base_url=lonely.url, timeout=120) as client, ThreadPoolExecutor(8) as pool:

        def ask() -> httpx.Response:
            return client.post("/v1/completions", json=body)

        assert ask().status_code == 200  # so that connections are there to be kept
        (replica,) = (pid for pid, name in lonely.children().items() if name.startswith("ray::ServeReplica"))
        running = [pool.submit(ask) for _ in range(4)]
        eventually(lambda: "requests_running 4.0" in httpx.get(f"{lonely.url}/metrics", timeout=30).text)
        os.kill(replica, signal.SIGKILL)
        running += [pool.submit(ask) for _ in range(4)]  # the dying socket may have taken these in
        for answer in (one.result() for one in running):
            assert answer.status_code in (200, 503), answer.text
            assert answer.status_code == 200 or answer.json()["error"]["code"] == "replica_lost"
        assert [one.result().status_code for one in [pool.submit(ask) for _ in range(4)]] == [200] * 4


def test_a_stop_leaves_no_process_no_port_and_no_files(lonely: ServiceProcess) -> None:
    assert lonely.children()
    assert lonely.stop() == 0
    eventually(lambda: not lonely.children())
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", lonely.port))
    assert not (lonely.log.parent / "run").exists()
