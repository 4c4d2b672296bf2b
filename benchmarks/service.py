"""The real processes on this machine, for benchmarks: one supervisor on its own state directory, and its stores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from benchmarks.report import progress
from deploy.local.supervisor import Endpoints, read_endpoints, to_toml
from slipstream.config import Addresses, Config, Settings
from slipstream.errors import StoreUnavailable

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


@contextmanager
def running_service(
    state: Path, config: Config, *, kafka: str | None = None, mlflow: str | None = None
) -> Iterator[tuple[Endpoints, Settings]]:
    """Start everything with this config, yield when it is ready, stop everything; StoreUnavailable if it fails."""
    state.mkdir(parents=True, exist_ok=True)
    (state / "benchmark.toml").write_text(to_toml(config), encoding="utf-8")
    environment = {**os.environ, "SLIPSTREAM_CONFIG": str(state / "benchmark.toml"), "SLIPSTREAM_STATE": str(state)}
    log = (state / "supervisor.log").open("wb")
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "deploy.local.supervisor"],
        cwd=ROOT,
        env=_with(environment, {"SLIPSTREAM_KAFKA": kafka, "SLIPSTREAM_MLFLOW": mlflow}),
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: _is_ready(state, supervisor), timeout_s=START_TIMEOUT_S, what="the service to be ready")
        endpoints = read_endpoints(state)
        assert endpoints is not None
        addresses = Addresses(redis=endpoints.redis_url, kafka=kafka, mlflow=mlflow)
        yield endpoints, Settings(config=config, addresses=addresses, state_dir=state)
    finally:
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait(STOP_TIMEOUT_S)
        log.close()


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Poll until `condition` holds; raises StoreUnavailable after `timeout_s`."""
    began = time.monotonic()
    reported_s = 0.0
    while not condition():
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise StoreUnavailable(f"waited {timeout_s:.0f} s for {what}; the logs are in the state directory")
        if waited_s - reported_s > 10:
            reported_s = waited_s
            progress(f"  waiting for {what}: {waited_s:.0f} s")
        time.sleep(0.2)


def _is_ready(state: Path, supervisor: subprocess.Popen[bytes]) -> bool:
    if supervisor.poll() is not None:
        raise StoreUnavailable(f"the supervisor ended: {(state / 'supervisor.log').read_text()[-2000:]}")
    endpoints = read_endpoints(state)
    return endpoints is not None and endpoints.is_ready


def _with(environment: Mapping[str, str], stores: Mapping[str, str | None]) -> dict[str, str]:
    # Addresses of the caller's shell must not reach a benchmark that brings its own stores.
    own = {"SLIPSTREAM_REDIS", "SLIPSTREAM_API_KEYS", *stores}
    kept = {name: value for name, value in environment.items() if name not in own}
    return kept | {name: value for name, value in stores.items() if value}


def with_serving(config: Config, **changes: object) -> Config:
    """A copy of the config with these knobs of `serving` changed."""
    return msgspec.structs.replace(config, serving=msgspec.structs.replace(config.serving, **changes))
