"""The workers and the promoter as real processes: clear exits, one line per outage, a ledger that survives kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from slipstream.engine.artifact import local_path
from slipstream.learning.distiller import LINEAGE_FILE, LineageFile
from slipstream.models.checkpoint import target_digest
from slipstream.records import encode, is_held_out
from slipstream.stores.mlflow import MlflowRegistry
from slipstream.stores.redis import RedisLog, RedisPointers
from slipstream.versions import DEFAULT_DOMAIN
from tests.observed import observation
from tests.servers import ValkeyServer, eventually

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "deploy" / "models" / "mix-moe-11m"
MODULES = ("workers.distiller", "workers.evaluator", "services.promoter")
DRAFT = ("draft", DEFAULT_DOMAIN)

pytestmark = pytest.mark.processes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Valkey of this test alone: it is killed, and its log begins at offset 0."""
    server = ValkeyServer(tmp_path / "valkey")
    yield server
    server.stop()


def environment(state: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
    return kept | {"SLIPSTREAM_STATE": str(state), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | variables


class Process:
    """A module run as a program, its standard error in a file."""

    def __init__(self, module: str, variables: dict[str, str]) -> None:
        self.log = Path(variables["SLIPSTREAM_STATE"]) / "process.log"
        log = self.log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module], cwd=ROOT, env=variables, stdout=output, stderr=output
            )

    def text(self) -> str:
        return self.log.read_text()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def end(self, how: signal.Signals) -> int:
        self._process.send_signal(how)
        return self._process.wait(timeout=60)


@pytest.fixture
def start() -> Iterator[Callable[[str, dict[str, str]], Process]]:
    """Starts processes; what still runs after the test is killed."""
    started: list[Process] = []

    def start_one(module: str, variables: dict[str, str]) -> Process:
        started.append(Process(module, variables))
        return started[-1]

    yield start_one
    for process in started:
        if process.is_running():
            process.end(signal.SIGKILL)


Start = Callable[[str, dict[str, str]], Process]


WRONG_SETTINGS: list[tuple[dict[str, str], str, str]] = [
    ({"SLIPSTREAM_REDIS": "reddis://127.0.0.1:1"}, "", "SLIPSTREAM_REDIS=reddis://127.0.0.1:1"),
    ({}, "[learning]\nlerning_rate = 1.0\n", "lerning_rate"),
    ({}, '[serving]\ntarget = "no/such/directory"\n', "no/such/directory"),
    ({"SLIPSTREAM_METRICS": "9100"}, "", "SLIPSTREAM_METRICS=9100"),
    ({}, '[serving]\ninitial_draft = "no/such/draft"\n', "no/such/draft"),
]
# The evaluator has no use for an initial draft.
CASES = [(module, *case) for module in MODULES for case in WRONG_SETTINGS[: 4 if "evaluator" in module else 5]]


@pytest.mark.parametrize(("module", "variables", "toml", "complaint"), CASES)
def test_a_wrong_setting_stops_the_start_with_one_clear_line(
    tmp_path: Path, module: str, variables: dict[str, str], toml: str, complaint: str
) -> None:
    config = tmp_path / "slipstream.toml"
    config.write_text(toml)
    variables = {"SLIPSTREAM_REDIS": "redis://127.0.0.1:1"} | variables | {"SLIPSTREAM_CONFIG": str(config)}
    ended = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=environment(tmp_path, **variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert complaint in ended.stderr


@pytest.mark.parametrize("module", MODULES)
def test_an_outage_is_one_line_at_its_start_and_one_at_its_end(
    tmp_path: Path, module: str, server: ValkeyServer, start: Start
) -> None:
    server.kill()
    process = start(module, environment(tmp_path, SLIPSTREAM_REDIS=server.url))
    eventually(lambda: "store unavailable" in process.text(), timeout_s=240)
    server.start()
    eventually(lambda: "the stores answer again" in process.text(), timeout_s=240)
    assert process.is_running()
    assert process.end(signal.SIGTERM) == 0, process.text()
    assert process.text().count("store unavailable") == process.text().count("answer again") == 1
    assert "Traceback" not in process.text()


def ids_in(directory: Path) -> list[str]:
    """The observation ids of one version's files."""
    return list(msgspec.json.decode((directory / LINEAGE_FILE).read_bytes(), type=LineageFile).observation_ids)


def test_killing_the_distiller_again_and_again_keeps_the_ledger_exact(
    tmp_path: Path, server: ValkeyServer, start: Start
) -> None:
    config = tmp_path / "slipstream.toml"
    config.write_text("[learning]\nobservations_per_version = 6\nsteps_per_version = 3\nbatch_sequences = 2\n")
    variables = environment(tmp_path, SLIPSTREAM_REDIS=server.url, SLIPSTREAM_CONFIG=str(config))
    artifacts, log = tmp_path / "artifacts", RedisLog(server.url)
    digest = target_digest(TARGET)
    names = [f"request-{number}" for number in range(60)]
    trained = {f"{name}/0" for name in names if not is_held_out(name)}

    def send(some: list[str]) -> None:
        log.append([(name, encode(msgspec.structs.replace(observation(name), target_digest=digest))) for name in some])

    def num_artifacts() -> int:
        return len(list(artifacts.rglob(LINEAGE_FILE)))

    for life in range(2):
        num_before = num_artifacts()
        send(names[30 * life : 30 * life + 20])
        process = start("workers.distiller", variables)
        # Killed while or just after the registry takes a version: the files are there, the rest is open.
        eventually(lambda known=num_before: num_artifacts() > known, timeout_s=240)  # type: ignore[misc]
        send(names[30 * life + 20 : 30 * life + 30])
        process.end(signal.SIGKILL)
    process = start("workers.distiller", variables)
    pointers = RedisPointers(server.url)
    enough = f"/6 observations towards the next version, {len(trained)} kept"
    eventually(lambda: any(enough in one.detail and one.detail[0] < "6" for one in pointers.workers()), timeout_s=240)
    assert process.end(signal.SIGTERM) == 0, process.text()
    assert "Traceback" not in process.text()

    registry = MlflowRegistry(f"sqlite:///{tmp_path / 'mlflow.db'}", artifact_root=artifacts)
    held = [name for one in registry.versions(*DRAFT) for name in ids_in(local_path(one.artifact_uri, artifacts))]
    assert len(held) == len(set(held))
    assert set(held) <= trained
    assert len(trained) - len(held) < 6
    ends: dict[int, int] = {}
    for _, lineage in sorted(registry.lineages(*DRAFT).items()):
        for offsets in lineage.offsets:
            assert offsets.start == ends.get(offsets.partition, offsets.start)
            ends[offsets.partition] = offsets.end
    for store in (log, pointers, registry):
        store.close()
