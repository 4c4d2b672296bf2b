"""The server we start ourselves: private, bounded, found again after a kill, and never two on one directory."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream.errors import ConfigError
from slipstream.stores.embedded import EmbeddedValkey, server_binary, start_valkey
from slipstream.stores.redis import RedisPointers
from tests.servers import ValkeyServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    running = start_valkey(tmp_path / "state")
    yield running
    running.stop()


@pytest.fixture
def short_temp() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="s") as directory:
        yield Path(directory)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_nobody_else_can_read_the_password_or_reach_the_socket(server: EmbeddedValkey, tmp_path: Path) -> None:
    home = tmp_path / "state"
    password = (home / "password").read_text()
    assert len(password) >= 40
    assert mode_of(home) == 0o700
    assert mode_of(home / "password") == mode_of(home / "valkey.conf") == 0o600
    assert mode_of(home / "valkey.sock") == 0o700
    assert server.pid is not None
    command_line = Path(f"/proc/{server.pid}/cmdline")
    if command_line.exists():
        assert password.encode() not in command_line.read_bytes()


def test_the_server_has_no_port_and_evicts_nothing(server: EmbeddedValkey) -> None:
    settings = RedisPointers(server.url)._client.config_get("port", "maxmemory*", "appendonly", "appendfsync")
    wanted = {"port": "0", "maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "always"}
    assert {key: settings[key] for key in wanted} == wanted
    assert int(settings["maxmemory"]) == 512 * 2**20


def test_url_and_data_survive_a_kill(tmp_path: Path) -> None:
    server = ValkeyServer(tmp_path / "state")
    url = server.url
    pointers = RedisPointers(url)
    tokens = [pointers.issue_fencing_token() for _ in range(50)]
    server.kill()
    server.start()
    assert server.url == url
    assert pointers.issue_fencing_token() == tokens[-1] + 1
    server.stop()


def test_a_second_start_uses_the_running_server_and_does_not_end_it(server: EmbeddedValkey, tmp_path: Path) -> None:
    second = start_valkey(tmp_path / "state")
    assert (second.url, second.pid) == (server.url, None)
    second.stop()
    assert server.is_running()
    assert RedisPointers(server.url).frozen() is None


def test_stop_ends_the_process(tmp_path: Path) -> None:
    server = start_valkey(tmp_path / "state")
    assert server.is_running()
    server.stop()
    assert not server.is_running()
    server.stop()


def test_a_deep_state_directory_gets_a_short_private_socket(
    tmp_path: Path, short_temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_temp))
    server = start_valkey(tmp_path / ("deep" * 20) / ("deeper" * 10))
    try:
        socket_path = Path(server.url.rpartition("@")[2])
        assert len(os.fsencode(socket_path)) <= 100
        assert mode_of(socket_path.parent) == 0o700
        assert RedisPointers(server.url).frozen() is None
    finally:
        server.stop()
    assert list(short_temp.iterdir()) == []


def test_a_socket_directory_that_others_may_enter_is_refused(
    tmp_path: Path, short_temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_temp))
    home = tmp_path / ("deep" * 20) / ("deeper" * 10)
    server = start_valkey(home)
    socket_path = Path(server.url.rpartition("@")[2])
    server.stop()
    socket_path.parent.mkdir(exist_ok=True)
    socket_path.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="mode 0700"):
        start_valkey(home)


def test_a_machine_without_any_server_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert server_binary().name == "valkey-server"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="SLIPSTREAM_REDIS"):
        server_binary()
