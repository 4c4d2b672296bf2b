"""Is this machine fit to run Slipstream: versions, the C extensions that speed hangs on, servers within reach."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from slipstream.config import Settings, log_kind
from slipstream.errors import SlipstreamError
from slipstream.stores.embedded import server_binary
from slipstream.stores.opening import open_pointers, open_registry

CONNECT_TIMEOUT_S = 2.0
_PACKAGES = (
    "torch", "tokenizers", "safetensors", "msgspec", "prometheus-client", "ray", "redis", "kafka-python", "mlflow",
)  # fmt: skip


class Finding(msgspec.Struct, frozen=True):
    """One check: `bad` stops something that is configured, `absent` costs only what it names."""

    level: Literal["ok", "absent", "bad"]
    text: str


def examine(settings: Settings) -> list[Finding]:
    """All findings on this machine under these settings; connects to the named servers."""
    return [*_versions(), *_extensions(settings), *_target(settings), *_servers(settings)]


def _versions() -> Iterator[Finding]:
    yield Finding("ok", f"python {sys.version.split()[0]}")
    for name in _PACKAGES:
        try:
            yield Finding("ok", f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding("absent", f"{name} is not installed; `make install` takes every extra")


def _extensions(settings: Settings) -> Iterator[Finding]:
    if importlib.util.find_spec("crc32c"):
        yield Finding("ok", f"crc32c {importlib.metadata.version('crc32c')}: Kafka records are summed in C")
    else:
        level: Literal["bad", "absent"] = "bad" if log_kind(settings.addresses) == "kafka" else "absent"
        yield Finding(level, "crc32c is missing: kafka-python is 8 to 12 times slower without; pip install crc32c")
    if settings.addresses.redis is None:
        try:
            yield Finding("ok", f"embedded store: {server_binary()}")
        except SlipstreamError as error:
            yield Finding("bad", str(error))


def _target(settings: Settings) -> Iterator[Finding]:
    config = Path(settings.config.serving.target) / "config.json"
    if config.is_file():
        yield Finding("ok", f"target {config.parent}")
    else:
        yield Finding("bad", f"target: no {config}; set serving.target to a checkpoint directory")


def _servers(settings: Settings) -> Iterator[Finding]:
    addresses = settings.addresses
    if addresses.redis is not None:
        yield _reached("pointer store", lambda: open_pointers(settings).read("draft", "default"))
    for broker in (addresses.kafka or "").split(",") if addresses.kafka else ():
        yield _reached(f"Kafka broker {broker}", partial(_connect, broker.strip()))
    place = "named by SLIPSTREAM_MLFLOW" if addresses.mlflow else "SQLite in the state directory"
    if addresses.mlflow is not None or (settings.state_dir / "mlflow.db").exists():
        yield _reached(f"registry ({place})", lambda: open_registry(settings).versions("draft", "default"))


def _connect(broker: str) -> None:
    host, _, port = broker.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _reached(what: str, call: Callable[[], object]) -> Finding:
    try:
        call()
    except (SlipstreamError, OSError) as error:
        return Finding("bad", f"{what}: {error}")
    return Finding("ok", f"{what} answers")
