"""kill -9 of every process, one at a time, under load: no request fails, the loop goes on, no observation is lost.

The whole service runs as `make up` starts it, with the log on Kafka and the registry behind an MLflow server, both of
which this test kills and starts again itself.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from benchmarks.service import running_service
from deploy.local.processes import command_of, marked_processes
from deploy.local.queries import builtin_streams
from deploy.local.supervisor import Endpoints
from deploy.local.traffic import Outcome, connected
from slipstream.config import Config, GateConfig, LearningConfig, ServingConfig, Settings
from slipstream.learning.distiller import LineageFile
from slipstream.records import decode_observation, is_held_out, observation_id
from slipstream.stores.opening import open_log, open_pointers, open_registry
from slipstream.versions import DEFAULT_DOMAIN
from tests.servers import KafkaBroker, eventually, free_port

CONCURRENCY = 3
RECOVERY_S = 150.0
CONFIG = Config(
    serving=ServingConfig(num_draft_tokens=2, pointer_poll_s=0.5),
    learning=LearningConfig(observations_per_version=16, steps_per_version=16, keep_versions=500),
    gate=GateConfig(min_requests=4, recent_requests=16),
)


class Load:
    """Requests that keep coming on a thread of their own, and what became of them."""

    def __init__(self, api_url: str) -> None:
        self.outcomes: list[Outcome] = []
        self._api_url = api_url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()), daemon=True)
        self._thread.start()

    def failures(self) -> list[str]:
        return [outcome.error for outcome in list(self.outcomes) if outcome.error]

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join(120)
        assert not self._thread.is_alive()

    async def _send(self) -> None:
        streams = itertools.cycle(builtin_streams(seed=3)[:3])
        async with connected(self._api_url) as client:

            async def sender() -> None:
                while not self._is_over.is_set():
                    domain, queries = next(streams)
                    self.outcomes.append(await client.ask(next(queries), domain=domain))

            await asyncio.gather(*(sender() for _ in range(CONCURRENCY)))


class MlflowServer:
    """A tracking server on SQLite, as a deployment would have one."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        arguments = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1", "--no-serve-artifacts"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments, "--backend-store-uri", "sqlite:///mlflow.db"],
            cwd=self._directory,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=(self._directory / "output").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Deployment:
    """The running service, its stores, its load, and ways to hurt it."""

    def __init__(self, endpoints: Endpoints, settings: Settings, broker: KafkaBroker, mlflow: MlflowServer) -> None:
        self.settings = settings
        self.broker = broker
        self.mlflow = mlflow
        self.pointers = open_pointers(settings)
        self.load = Load(endpoints.api_url)

    def newest_decision(self) -> int:
        """The highest challenger the gate has judged: distiller, evaluator and promoter all worked for it."""
        return max((one.challenger_version for one in self.pointers.decisions(limit=50)), default=0)

    def loop_goes_on(self) -> None:
        """Wait until a version that does not exist yet has been trained, registered, evaluated and judged."""
        registry = open_registry(self.settings)
        newest = eventually(lambda: max(registry.lineages("draft", DEFAULT_DOMAIN), default=-1) + 1, timeout_s=60) - 1
        eventually(lambda: self.newest_decision() > newest, timeout_s=RECOVERY_S)

    def kill(self, part: str, *, named: str = "") -> None:
        """SIGKILL to every process of a part whose command line has `named` in it."""
        _kill_all([pid for pid in marked_processes(self.settings.state_dir, part=part) if named in command_of(pid)])

    def kill_valkey(self) -> None:
        """SIGKILL to the embedded server; it overwrites its environment with its title, so its socket names it."""
        socket = str(self.settings.state_dir / "valkey").encode()
        _kill_all([int(one.parent.name) for one in Path("/proc").glob("[0-9]*/cmdline") if _mentions(one, socket)])


def _kill_all(pids: list[int]) -> None:
    assert pids, "no process to kill"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _mentions(path: Path, words: bytes) -> bool:
    try:
        return words in path.read_bytes()
    except OSError:
        return False


@pytest.fixture(scope="module")
def deployment(kafka_broker: KafkaBroker) -> Iterator[Deployment]:
    if not kafka_broker.is_ours:
        pytest.skip("the broker that SLIPSTREAM_KAFKA names is not ours to kill")
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        mlflow = MlflowServer(Path(directory) / "mlflow")
        state = Path(directory) / "state"
        with running_service(state, CONFIG, kafka=kafka_broker.bootstrap, mlflow=mlflow.url) as (endpoints, settings):
            deployment = Deployment(endpoints, settings, kafka_broker, mlflow)
            eventually(lambda: deployment.newest_decision() >= 1, timeout_s=RECOVERY_S)
            yield deployment
            deployment.load.stop()
        mlflow.kill()


def killed_and_started(server: KafkaBroker | MlflowServer) -> None:
    server.kill()
    server.start()


VICTIMS: dict[str, Callable[[Deployment], None]] = {
    "distiller": lambda it: it.kill("distiller"),
    "evaluator": lambda it: it.kill("evaluator"),
    "promoter": lambda it: it.kill("promoter"),
    "redis": lambda it: it.kill_valkey(),
    "kafka": lambda it: killed_and_started(it.broker),
    "mlflow": lambda it: killed_and_started(it.mlflow),
}


@pytest.mark.processes
@pytest.mark.kafka
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", list(VICTIMS))
def test_a_killed_process_fails_no_request_and_the_loop_goes_on(deployment: Deployment, victim: str) -> None:
    num_before = len(deployment.load.outcomes)
    VICTIMS[victim](deployment)
    deployment.loop_goes_on()
    eventually(lambda: len(deployment.load.outcomes) > num_before)
    assert deployment.load.failures() == []


@pytest.mark.processes
@pytest.mark.kafka
@pytest.mark.timeout(600)
def test_a_killed_replica_answers_its_running_requests_clearly_and_comes_back(deployment: Deployment) -> None:
    assert deployment.load.failures() == []
    deployment.kill("target", named="ray::ServeReplica")
    num_killed = len(deployment.load.outcomes)
    deployment.loop_goes_on()
    # A version that was on its way may be judged before the replica is back.
    eventually(lambda: len(deployment.load.outcomes) > num_killed + CONCURRENCY, timeout_s=RECOVERY_S)
    failures = deployment.load.failures()
    # What it was running, and once more what its dying socket took in before the kernel closed it.
    assert len(failures) <= 2 * CONCURRENCY, failures
    assert all(failure.startswith("HTTP 5") for failure in failures), failures
    deployment.load.outcomes.clear()


@pytest.mark.processes
@pytest.mark.kafka
@pytest.mark.timeout(600)
def test_the_versions_lineage_is_exactly_what_the_log_acknowledged(deployment: Deployment) -> None:
    """Runs last: after all the kills, every training observation up to the newest version is in exactly one."""
    deployment.load.stop()
    # Asked for once: the distiller still works off what the log holds, so a second answer may know one version more.
    versions = open_registry(deployment.settings).versions("draft", DEFAULT_DOMAIN)
    ends: dict[int, int] = {}
    in_versions: Counter[str] = Counter()
    for registered in versions:
        for one in registered.lineage.offsets:
            assert one.start == ends.get(one.partition, 0), f"version {registered.version} leaves a gap or overlaps"
            ends[one.partition] = one.end
        path = Path(registered.artifact_uri.removeprefix("file://")) / "lineage.json"
        in_versions.update(msgspec.json.decode(path.read_bytes(), type=LineageFile).observation_ids)
    assert set(in_versions.values()) == {1}, "an observation belongs to two versions"
    in_log = _training_observations(deployment.settings, ends)
    assert len(in_log) >= 8 * CONFIG.learning.observations_per_version
    assert in_log == set(in_versions)


def _training_observations(settings: Settings, ends: dict[int, int]) -> set[str]:
    """Ids of all training observations that the log holds below these ends, from its first record on.

    Reads on until every partition is at its end: on a busy machine an empty answer says only that none came in time.
    """
    log = open_log(settings)
    subscription = log.subscribe("faults-test")
    found: set[str] = set()
    unread = {partition: end for partition, end in ends.items() if end > 0}
    while unread:
        for entry in eventually(lambda: subscription.poll(max_records=500, timeout_s=5.0)):
            observation = decode_observation(entry.record)
            if entry.offset < ends.get(entry.partition, 0) and not is_held_out(observation.request_id):
                found.add(observation_id(observation))
            if entry.offset + 1 >= unread.get(entry.partition, math.inf):
                del unread[entry.partition]
    subscription.close()
    log.close()
    return found
