"""The implementations under the contract suite, each with its real server."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from kafka import KafkaAdminClient

from slipstream.stores.kafka import KafkaLog
from slipstream.stores.memory import MemoryLog, MemoryPointers, MemoryRegistry
from slipstream.stores.mlflow import MlflowRegistry
from slipstream.stores.protocols import ModelRegistry, ObservationLog, PointerStore, Subscription
from slipstream.stores.redis import RedisLog, RedisPointers
from tests.servers import KafkaBroker, ValkeyServer, eventually

CHILD = Path(__file__).parent / "consumer_process.py"
ACKNOWLEDGEMENT_TTL_S = 0.3


class LogUnderTest:
    """An empty log of one kind; `open` gives a client to it, `server` is None if it has none of its own to kill."""

    def __init__(self, kind: str, address: str, name: str, server: ValkeyServer | KafkaBroker | None) -> None:
        self.kind, self.address, self.name, self.server = kind, address, name, server
        self._memory = MemoryLog()
        self._opened: list[ObservationLog | Subscription] = []

    def open(self) -> ObservationLog:
        log = open_named_log(self.kind, self.address, self.name) if self.kind != "memory" else self._memory
        self._opened.append(log)
        return log

    def subscribe(self, group: str) -> Subscription:
        """A member that leaves at the test's end: one that neither polls nor leaves holds up a Kafka group."""
        subscription = self.open().subscribe(group)
        self._opened.insert(0, subscription)
        return subscription

    def start_consumer(self, group: str, *, num_records: int) -> subprocess.Popen[str]:
        """A process that has polled `num_records` of the log and committed nothing."""
        arguments = [sys.executable, str(CHILD), self.kind, self.address, self.name, group, str(num_records)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "polled\n"
        return process

    def lose_data(self) -> None:
        """What a server that comes back empty has done; clients opened from now on find nothing."""
        if self.kind == "memory":
            self._memory = MemoryLog()
        elif self.kind == "redis":
            client = redis.Redis.from_url(self.address)
            client.delete(*client.keys("{" + self.name + "}*"))
            client.close()
        else:
            admin = KafkaAdminClient(bootstrap_servers=self.address)
            admin.delete_topics([self.name])
            eventually(lambda: self.name not in admin.list_topics())
            admin.close()

    def close(self) -> None:
        for one in self._opened:
            one.close()


def open_named_log(kind: str, address: str, name: str) -> ObservationLog:
    return KafkaLog(address, topic=name) if kind == "kafka" else RedisLog(address, namespace=name)


@pytest.fixture(params=["memory", "redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def log_under_test(request: pytest.FixtureRequest) -> Iterator[LogUnderTest]:
    kind, name = request.param, f"test-{uuid.uuid4().hex[:12]}"
    if kind == "memory":
        log = LogUnderTest(kind, "", name, None)
    elif kind == "redis":
        valkey: ValkeyServer = request.getfixturevalue("valkey")
        log = LogUnderTest(kind, valkey.url, name, valkey)
    else:
        broker: KafkaBroker = request.getfixturevalue("kafka_broker")
        log = LogUnderTest(kind, broker.bootstrap, name, broker if broker.is_ours else None)
    yield log
    log.close()


@pytest.fixture(params=["memory", "redis"])
def pointers(request: pytest.FixtureRequest) -> Iterator[PointerStore]:
    store = make_pointers(request.param, request)
    yield store
    store.close()


def make_pointers(kind: str, request: pytest.FixtureRequest) -> PointerStore:
    if kind == "memory":
        return MemoryPointers(acknowledgement_ttl_s=ACKNOWLEDGEMENT_TTL_S)
    valkey: ValkeyServer = request.getfixturevalue("valkey")
    return RedisPointers(
        valkey.url, namespace=f"test-{uuid.uuid4().hex[:12]}", acknowledgement_ttl_s=ACKNOWLEDGEMENT_TTL_S
    )


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(params=["memory", "mlflow"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModelRegistry]:
    root = tmp_path / "root"
    store: ModelRegistry
    if request.param == "memory":
        store = MemoryRegistry(root)
    else:
        database = request.getfixturevalue("mlflow_database")
        store = MlflowRegistry(database, artifact_root=root, namespace=f"test-{uuid.uuid4().hex[:12]}")
    yield store
    store.close()
