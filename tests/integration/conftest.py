"""One real service for all serving tests: Ray Serve, the reference target, a Valkey of its own, two tenants."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.integration.serving_process import ServiceProcess
from tests.servers import ValkeyServer

KEY = "key-of-acme"
PRIVATE_KEY = "key-of-private"


class Serving:
    """The running service, its stores (the Valkey's files in `valkey_dir`) and a client of each tenant."""

    def __init__(self, service: ServiceProcess, valkey_url: str, state_dir: Path, valkey_dir: Path) -> None:
        self.service = service
        self.valkey_url = valkey_url
        self.state_dir = state_dir
        self.valkey_dir = valkey_dir
        self.client = self.client_with(KEY)

    def client_with(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.service.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    valkey_dir = tmp_path_factory.mktemp("serving-valkey")
    valkey = ValkeyServer(valkey_dir)
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        state_dir = Path(folder)
        keys = write_keys(state_dir)
        limits = {"max_running_requests": 4, "max_queued_requests": 4, "pointer_poll_s": 1}
        service = ServiceProcess(state_dir, serving=limits, redis=valkey.url, api_keys=str(keys))
        yield Serving(service, valkey.url, state_dir, valkey_dir)
        service.stop()
    valkey.stop()


def write_keys(directory: Path) -> Path:
    """A file of two tenants: acme, which is learned from, and private, which is not."""
    keys = directory / "keys.toml"
    keys.write_text(_tenant("acme", KEY, train=True) + _tenant("private", PRIVATE_KEY, train=False))
    return keys


def _tenant(name: str, key: str, *, train: bool) -> str:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f'[tenants.{name}]\nkey_sha256 = "{digest}"\ntrain = {str(train).lower()}\n'
