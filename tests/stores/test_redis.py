"""What only the Redis stores have to get right: trimming, memory, members that share one partition, passwords."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream.errors import ConfigError, StoreUnavailable
from slipstream.stores.redis import RedisLog, RedisPointers
from tests.servers import ValkeyServer, eventually


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def small_valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path / "small", max_memory_bytes=8 * 2**20)
    yield server
    server.stop()


def numbered(num_records: int, *, num_bytes: int = 10) -> list[tuple[str, bytes]]:
    return [("request", b"%d" % number + b"." * num_bytes) for number in range(num_records)]


def test_offsets_are_integers_without_holes(valkey: ValkeyServer, name: str) -> None:
    log = RedisLog(valkey.url, namespace=name)
    log.append(numbered(20))
    RedisLog(valkey.url, namespace=name).append(numbered(20))
    entries = log.subscribe("readers").poll(max_records=100, timeout_s=1.0)
    assert [entry.offset for entry in entries] == list(range(1, 41))


def test_the_stream_is_trimmed_and_lag_counts_what_is_left(valkey: ValkeyServer, name: str) -> None:
    log = RedisLog(valkey.url, namespace=name, max_records=100)
    subscription = log.subscribe("readers")
    log.append(numbered(1_000))
    lag = subscription.lag()
    # Redis trims whole nodes of up to 100 entries.
    assert 100 <= lag <= 300
    entries = subscription.poll(max_records=1_000, timeout_s=1.0)
    assert [entry.offset for entry in entries] == list(range(1_001 - lag, 1_001))


def test_uncommitted_entries_that_were_trimmed_are_skipped_and_counted(
    valkey: ValkeyServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = RedisLog(valkey.url, namespace=name, max_records=100)
    log.append(numbered(10))
    first = log.subscribe("readers")
    assert len(first.poll(max_records=10, timeout_s=1.0)) == 10
    log.append(numbered(500))
    lag = first.lag()
    assert lag <= 300
    first.close()
    second = log.subscribe("readers")
    with caplog.at_level(logging.INFO, logger="slipstream.stores.redis"):
        entries = eventually(lambda: second.poll(max_records=1_000, timeout_s=1.0))
    assert entries[0].offset > 10
    assert len(entries) == lag
    second.commit({0: entries[-1].offset + 1})
    assert second.lag() == 0


def test_a_commit_leaves_the_other_members_entries_to_them(valkey: ValkeyServer, name: str) -> None:
    log = RedisLog(valkey.url, namespace=name)
    log.append(numbered(10))
    first, second, third = (log.subscribe("readers") for _ in range(3))
    mine = first.poll(max_records=5, timeout_s=1.0)
    theirs = second.poll(max_records=5, timeout_s=1.0)
    assert not {entry.offset for entry in mine} & {entry.offset for entry in theirs}
    second.commit({0: 11})
    assert third.lag() == 5
    first.close()
    assert eventually(lambda: third.poll(max_records=10, timeout_s=1.0)) == mine


def test_a_member_that_trains_for_long_keeps_its_entries(valkey: ValkeyServer, name: str) -> None:
    log = RedisLog(valkey.url, namespace=name)
    log.append(numbered(5))
    training, idle = log.subscribe("readers"), log.subscribe("readers")
    entries = training.poll(max_records=5, timeout_s=1.0)
    # Longer than the second between two looks for vanished members.
    assert idle.poll(max_records=5, timeout_s=1.5) == []
    training.commit({0: entries[-1].offset + 1})
    assert idle.lag() == 0


def test_a_commit_without_a_poll_covers_what_the_last_member_left(valkey: ValkeyServer, name: str) -> None:
    log = RedisLog(valkey.url, namespace=name)
    log.append(numbered(10))
    first = log.subscribe("readers")
    first.poll(max_records=4, timeout_s=1.0)
    first.close()
    second = log.subscribe("readers")
    second.commit({0: 8})
    assert second.lag() == 3
    assert [entry.offset for entry in second.poll(max_records=10, timeout_s=1.0)] == [8, 9, 10]


def test_a_server_that_lost_everything_is_used_from_its_beginning(valkey: ValkeyServer, name: str) -> None:
    log = RedisLog(valkey.url, namespace=name)
    log.append(numbered(5))
    subscription = log.subscribe("readers")
    subscription.poll(max_records=5, timeout_s=1.0)
    log._client.delete(log._stream, log._counter)
    log.append(numbered(2))
    entries = eventually(lambda: subscription.poll(max_records=5, timeout_s=1.0))
    assert [entry.offset for entry in entries] == [1, 2]


def test_out_of_memory_the_oldest_records_go_and_the_newest_are_kept(
    small_valkey: ValkeyServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = RedisLog(small_valkey.url, namespace=name)
    with caplog.at_level(logging.WARNING, logger="slipstream.stores.redis"):
        for _ in range(40):
            log.append(numbered(10, num_bytes=50_000))
    assert "dropped the oldest" in caplog.text
    subscription = log.subscribe("readers")
    offsets = [entry.offset for entry in subscription.poll(max_records=1_000, timeout_s=1.0)]
    assert offsets[-1] == 400
    assert offsets == list(range(offsets[0], 401))
    RedisPointers(small_valkey.url, namespace=name).freeze("the pointer can still be written")


def test_a_wrong_password_is_a_config_error_that_keeps_the_password_secret(valkey: ValkeyServer, name: str) -> None:
    wrong = re.sub(r"//:[^@]*@", "//:s3cret-guess@", valkey.url)
    for call in (
        lambda: RedisPointers(wrong, namespace=name).read("draft", "default"),
        lambda: RedisLog(wrong, namespace=name).append(numbered(1)),
        lambda: RedisLog(wrong, namespace=name).subscribe("readers").lag(),
    ):
        with pytest.raises(ConfigError, match="correct the user or password") as caught:
            call()
        assert "s3cret-guess" not in str(caught.value)


def test_no_password_is_a_config_error(valkey: ValkeyServer, name: str) -> None:
    with pytest.raises(ConfigError, match="refuses us"):
        RedisPointers(re.sub(r"//:[^@]*@", "//", valkey.url), namespace=name).frozen()


def test_a_url_of_another_kind_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="redis://, rediss:// or unix://"):
        RedisPointers("http://localhost:6379")


def test_a_server_that_never_was_there_is_store_unavailable(tmp_path: Path) -> None:
    pointers = RedisPointers(f"unix://:secret@{tmp_path}/nobody.sock")
    with pytest.raises(StoreUnavailable) as caught:
        pointers.read("draft", "default")
    assert "secret" not in str(caught.value)


def test_namespaces_do_not_see_each_other(valkey: ValkeyServer, name: str) -> None:
    RedisPointers(valkey.url, namespace=name).freeze("here")
    assert RedisPointers(valkey.url, namespace=f"{name}-other").frozen() is None
    with pytest.raises(ValueError, match="namespace"):
        RedisPointers(valkey.url, namespace="{two}{tags}")
