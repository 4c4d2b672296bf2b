"""`make up`: every process of the loop on one machine, supervised. `python -m deploy.local.supervisor [--state DIR]`.

Order: Valkey (unless SLIPSTREAM_REDIS names a server), the target until it is ready, the workers
and the promoter, and last MLflow's pages (unless SLIPSTREAM_MLFLOW names a server). What ends by itself is started
again with a growing pause; a process that refuses its configuration (exit code 2) stops everything. Ctrl-C or SIGTERM
stops in the opposite order and leaves nothing behind. One supervisor a state directory.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import msgspec

from deploy.local.processes import MARK, Child, end_marked, end_unix_peer, free_port
from slipstream.config import Config, Settings, load_config
from slipstream.errors import ConfigError, SlipstreamError, StoreError, StoreUnavailable
from slipstream.models.hub import target_directory
from slipstream.stores.embedded import EmbeddedValkey, start_valkey
from slipstream.stores.opening import open_pointers

ROOT = Path(__file__).resolve().parents[2]
ENDPOINTS = "endpoints.json"
MLFLOW_PORT = 5000
READY_TIMEOUT_S = 120.0
WORKERS_TIMEOUT_S = 40.0
STOP_TIMEOUT_S = 20.0
FIRST_PAUSE_S, LONGEST_PAUSE_S, STEADY_S = 1.0, 30.0, 60.0
_TICK_S = 0.1
_CONFIG_EXIT_CODE = 2
_PAGES_NICENESS = 15
_WORKERS = ("workers.distiller", "workers.evaluator", "services.promoter")


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Where things are, as the supervisor writes it to `endpoints.json` of the state directory (mode 0600).

    `redis_url` holds a password. `is_ready` once the API serves, `mlflow_url` "" until its pages answer;
    `seconds` is how long each part took to come up.
    """

    pid: int
    api_url: str
    redis_url: str
    mlflow_url: str
    is_ready: bool
    seconds: dict[str, float]


class Stopped(Exception):
    """Asked to stop while starting."""


class Supervisor:
    """The processes of one state directory. `run` is its whole life; it has one thread."""

    def __init__(self, settings: Settings, *, environment: Mapping[str, str]) -> None:
        self._settings = settings
        self._state = settings.state_dir
        self._port = free_port(settings.config.serving.port)
        self._mlflow_port = free_port(MLFLOW_PORT)
        self._environment = dict(environment) | {MARK: str(self._state), "SLIPSTREAM_STATE": str(self._state)}
        self._valkey: EmbeddedValkey | None = None
        self._children: list[Child] = []
        self._resting: dict[str, tuple[float, float]] = {}
        self._last_pause: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._mlflow_url = ""
        self._is_ready = False
        self._is_stopping = False

    def run(self) -> int:
        """Start everything, supervise until a signal, stop everything; returns the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)
        code = 0
        try:
            self._start_all()
            say("up: Ctrl-C stops everything")
            self._wait_for(lambda: False, timeout_s=float("inf"))
        except Stopped:
            say("stopping")
        except SlipstreamError as error:
            print(f"supervisor: {error}", file=sys.stderr, flush=True)
            code = _CONFIG_EXIT_CODE if isinstance(error, ConfigError) else 1
        finally:
            self._stop_all()
        return code

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True

    def _start_all(self) -> None:
        with self._timed("valkey"):
            self._start_valkey()
        self._environment["SLIPSTREAM_CONFIG"] = str(self._write_config())
        self._write_endpoints()
        with self._timed("target"):
            self._start("target", "-m", "services.target")
            self._wait_for(self._answers(f"{self._api_url()}/ready"), timeout_s=READY_TIMEOUT_S)
        self._is_ready = True
        self._write_endpoints()
        say(f"    API      {self._api_url()}/v1     metrics  {self._api_url()}/metrics")
        with self._timed("workers"):
            for name in _WORKERS:  # they lower their own priority once they have loaded
                self._start_worker(name)
            self._wait_for_workers()
        self._show_mlflow(self._settings.addresses.mlflow)
        self._write_endpoints()

    def _start_valkey(self) -> None:
        named = self._settings.addresses.redis
        if named is None:
            self._valkey = start_valkey(self._state / "valkey")
        self._environment["SLIPSTREAM_REDIS"] = named or (self._valkey.url if self._valkey else "")

    def _start_worker(self, module: str) -> None:
        """Each serves its metrics on a port of its own."""
        name = module.partition(".")[2]
        address = f"127.0.0.1:{free_port(0)}"
        self._start(name, "-m", module, extra={"SLIPSTREAM_METRICS": address})
        say(f"    metrics  http://{address}/metrics  ({name})")

    def _wait_for_workers(self) -> None:
        """Let the workers load before MLflow's pages take their share of the cores; goes on without a late one."""
        addresses = msgspec.structs.replace(self._settings.addresses, redis=self._environment["SLIPSTREAM_REDIS"])
        pointers = open_pointers(msgspec.structs.replace(self._settings, addresses=addresses))
        deadline = time.monotonic() + WORKERS_TIMEOUT_S

        def have_reported() -> bool:
            try:
                return len(pointers.workers()) >= len(_WORKERS) or time.monotonic() > deadline
            except StoreError:
                return time.monotonic() > deadline

        self._wait_for(have_reported, timeout_s=READY_TIMEOUT_S)
        pointers.close()

    def _show_mlflow(self, named: str | None) -> None:
        if named is not None:
            place = urlsplit(named)._replace(netloc=urlsplit(named).netloc.rpartition("@")[2])  # no password
            self._mlflow_url = place.geturl() if named.startswith("http") else ""
            return
        url = f"http://127.0.0.1:{self._mlflow_port}"
        with self._timed("mlflow"):
            arguments = ("--host", "127.0.0.1", "--port", str(self._mlflow_port), "--workers", "1")
            stores = ("--backend-store-uri", f"sqlite:///{self._state / 'mlflow.db'}")
            artifacts = ("--default-artifact-root", str(self._state / "artifacts"), "--no-serve-artifacts")
            command = ("-m", "mlflow", "server", *arguments, *stores, *artifacts)
            self._start("mlflow", *command, niceness=_PAGES_NICENESS)
            try:
                self._wait_for(self._answers(f"{url}/health"), timeout_s=READY_TIMEOUT_S)
            except StoreUnavailable as error:
                say(f"MLflow's pages are not up, everything else is: {error}")
                return
        self._mlflow_url = url
        say(f"    MLflow   {url}")

    def _child(self, name: str, arguments: Sequence[str], *, niceness: int, extra: Mapping[str, str]) -> Child:
        log = self._state / "logs" / f"{name}.log"
        environment = {**self._environment, **_PROCESS_ENVIRONMENT, **extra}
        return Child(name, (sys.executable, *arguments), environment=environment, log=log, niceness=niceness)

    def _start(self, name: str, *arguments: str, niceness: int = 0, extra: Mapping[str, str] | None = None) -> None:
        child = self._child(name, arguments, niceness=niceness, extra=extra or {})
        child.start(directory=ROOT)
        self._children.append(child)

    def _wait_for(self, condition: Callable[[], bool], *, timeout_s: float) -> None:
        """Supervise until `condition` holds; raises Stopped when asked to stop, StoreUnavailable after the time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self._is_stopping:
                raise Stopped
            if time.monotonic() > deadline:
                logs = self._state / "logs"
                raise StoreUnavailable(f"not ready after {timeout_s:.0f} s; the reason is in {logs}")
            self._supervise()
            time.sleep(_TICK_S)

    def _supervise(self) -> None:
        """Start again what has ended, each after its pause."""
        if self._valkey is not None and not self._valkey.is_running():
            self._restart_valkey()
        now = time.monotonic()
        for child in self._children:
            code = child.exit_code()
            if code is None:
                continue
            if code == _CONFIG_EXIT_CODE and child.num_starts == 1 and now - child.started_at < STEADY_S:
                raise ConfigError(f"{child.name} refused its configuration: {child.last_line()}")
            if child.name not in self._resting:
                pause_s = self._next_pause(child, now)
                self._resting[child.name] = (now + pause_s, pause_s)
                say(f"{child.name} ended with code {code}: {child.last_line()[:160]}; again in {pause_s:.0f} s")
            elif now >= self._resting[child.name][0]:
                self._last_pause[child.name] = self._resting.pop(child.name)[1]
                end_marked(self._state, part=child.name, timeout_s=5.0)  # what it left would hold its port
                child.start(directory=ROOT)

    def _restart_valkey(self) -> None:
        say("valkey ended; starting it again")
        try:
            self._valkey = start_valkey(self._state / "valkey")
        except StoreUnavailable as error:
            say(f"valkey does not start, serving goes on without it: {error}")

    def _next_pause(self, child: Child, now: float) -> float:
        was_steady = now - child.started_at > STEADY_S
        last_s = 0.0 if was_steady else self._last_pause.get(child.name, 0.0)
        return min(max(2 * last_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)

    def _stop_all(self) -> None:
        """Workers first, then the target, then the store they write to; leftovers by their mark."""
        target = [child for child in self._children if child.name == "target"]
        workers = [child for child in self._children if child.name != "target"]
        for group in (workers, target):
            for child in group:
                child.ask_to_stop()
            for child in group:
                if not child.stop(timeout_s=STOP_TIMEOUT_S):
                    say(f"{child.name} did not stop in {STOP_TIMEOUT_S:.0f} s and was killed")
        if self._valkey is not None:
            self._valkey.stop()
            end_unix_peer(embedded_socket(self._valkey.url), timeout_s=5.0)  # one that an earlier run had left
        for command in end_marked(self._state, timeout_s=5.0):
            say(f"ended a leftover: {command}")
        (self._state / ENDPOINTS).unlink(missing_ok=True)
        say("stopped")

    def _api_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _answers(self, url: str) -> Callable[[], bool]:
        def answers() -> bool:
            try:
                with urllib.request.urlopen(url, timeout=1.0) as answer:
                    return bool(answer.status == 200)
            except (urllib.error.URLError, OSError):
                return False

        return answers

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[part] = round(time.monotonic() - began, 2)
        say(f"{part:<9}up after {self._seconds[part]:.1f} s")

    def _write_config(self) -> Path:
        config = self._settings.config
        serving = msgspec.structs.replace(config.serving, port=self._port)
        if self._port != config.serving.port:
            say(f"port {config.serving.port} is taken; the API takes {self._port}")
        path = self._state / "slipstream.toml"
        path.write_text(to_toml(msgspec.structs.replace(config, serving=serving)), encoding="utf-8")
        return path

    def _write_endpoints(self) -> None:
        endpoints = Endpoints(
            pid=os.getpid(),
            api_url=self._api_url(),
            redis_url=self._environment["SLIPSTREAM_REDIS"],
            mlflow_url=self._mlflow_url,
            is_ready=self._is_ready,
            seconds=self._seconds,
        )
        incoming = self._state / f".{ENDPOINTS}"
        with os.fdopen(os.open(incoming, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as writer:
            writer.write(msgspec.json.encode(endpoints))
        incoming.rename(self._state / ENDPOINTS)


_PROCESS_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 processes instead of 15
}


def read_endpoints(state_dir: Path) -> Endpoints | None:
    """What the supervisor of a state directory last wrote, or None if none is up."""
    try:
        return msgspec.json.decode((state_dir / ENDPOINTS).read_bytes(), type=Endpoints)
    except (OSError, msgspec.MsgspecError):
        return None


def embedded_socket(redis_url: str) -> str:
    """The path in a `unix://:password@/path` URL, "" for a server that is reached otherwise."""
    parts = urlsplit(redis_url)
    return parts.path if parts.scheme == "unix" else ""


def to_toml(config: Config) -> str:
    """The config as a TOML file that `load_config` reads back to an equal one."""
    lines = []
    for group, table in msgspec.to_builtins(config).items():
        lines.append(f"[{group}]")
        lines += [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def with_target(settings: Settings, path_or_hub_id: str) -> Settings:
    """The settings with another target, fetched if it is on the hub; its drafts start from none. Raises ConfigError."""
    target = str(target_directory(path_or_hub_id))
    serving = msgspec.structs.replace(settings.config.serving, target=target, initial_draft="")
    return msgspec.structs.replace(settings, config=msgspec.structs.replace(settings.config, serving=serving))


@contextmanager
def only_supervisor(state_dir: Path) -> Iterator[None]:
    """Hold the state directory, ending what a supervisor that was killed left; raises ConfigError if it is held."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state_dir / "supervisor.pid").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"{state_dir} is held by the supervisor with pid {lock.read().strip()}; "
                "stop that one or take another directory: make up STATE=DIR"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        for command in end_marked(state_dir, timeout_s=10.0):
            say(f"ended what an earlier run left: {command}")
        yield


def say(line: str) -> None:
    """One line for people, at once."""
    print(line, flush=True)


def main() -> int:
    """Supervise until a signal; returns the exit code: 0 in order, 1 a process did not come up, 2 wrong settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, help="state directory (default: SLIPSTREAM_STATE or .state)")
    parser.add_argument("--target", metavar="PATH_OR_HUB_ID", help="checkpoint to serve (default: serving.target)")
    arguments = parser.parse_args()
    if arguments.state is not None:
        os.environ["SLIPSTREAM_STATE"] = str(arguments.state.absolute())
    try:
        settings = load_config()
        if arguments.target is not None:
            settings = with_target(settings, arguments.target)
        os.environ[MARK] = str(settings.state_dir)  # Valkey inherits it from here
        with only_supervisor(settings.state_dir):
            return Supervisor(settings, environment=os.environ).run()
    except ConfigError as error:
        print(f"supervisor: {error}", file=sys.stderr, flush=True)
        return _CONFIG_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
