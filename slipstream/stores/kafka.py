"""Kafka: the observation log of a cluster.

The only file that imports kafka-python. Three of its habits are tamed here: its producer buffers without limit, so
`append` waits for its own records and drops the producer when they fail; its constructors block until a broker
answers, so they run at the first call; its consumer hides an outage behind empty polls, so an empty poll asks the
broker for a sign of life.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import (
    AuthorizationError,
    KafkaError,
    MessageSizeTooLargeError,
    SaslAuthenticationFailedError,
    TopicAlreadyExistsError,
)
from kafka.structs import OffsetAndMetadata, TopicPartition

from slipstream.errors import ConfigError, RecordError, StoreUnavailable
from slipstream.stores.artifacts import checked_name
from slipstream.stores.protocols import LogEntry
from slipstream.stores.rules import check_record_sizes

logger = logging.getLogger(__name__)

TOPIC = "slipstream.observations.v1"
"""The topic's name carries the major version of the records."""

_TIMEOUT_MS = 5_000
_SESSION_MS = 10_000
"""A killed member's partitions go to another one after this long; the smallest that brokers allow is 6 s."""

_MAX_POLL_INTERVAL_MS = 15 * 60_000
"""Longest pause between two polls, for training, before the member is taken for stuck."""


class KafkaLog:
    """An `ObservationLog` on one Kafka topic, made if missing; `bootstrap` is `host:port[,host:port...]`.

    Records are kept for `retention_s` and up to `retention_bytes` a partition; both are applied when the topic is made.
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        topic: str = TOPIC,
        num_partitions: int = 4,
        retention_s: int = 24 * 3600,
        retention_bytes: int = 512 * 2**20,
    ) -> None:
        self._bootstrap = [broker.strip() for broker in bootstrap.split(",")]
        self._topic = topic
        self._num_partitions = num_partitions
        self._topic_config = {"retention.ms": str(retention_s * 1000), "retention.bytes": str(retention_bytes)}
        self._identity: str | None = None
        self._producer: Any = None
        self._lock = threading.Lock()
        # An outage is raised as StoreUnavailable and said once by the caller; the client would say it at every try.
        logging.getLogger("kafka").setLevel(logging.CRITICAL)

    def append(self, records: Sequence[tuple[str, bytes]]) -> None:
        """See `ObservationLog.append`."""
        check_record_sizes(records)
        with self._lock:
            try:
                with _translated(self._bootstrap):
                    self._send(records)
            except (StoreUnavailable, RecordError):
                # With the producer goes what it still buffers: the caller repeats the call.
                self._close_producer()
                self._identity = None
                raise

    def subscribe(self, group: str) -> KafkaSubscription:
        """See `ObservationLog.subscribe`; connects at the first call of the subscription."""
        return KafkaSubscription(self, group=checked_name("group", group))

    def identity(self) -> str:
        """See `ObservationLog.identity`: the topic's id, asked for at the first call and after every failure."""
        with self._lock, _translated(self._bootstrap):
            return self._make_topic()

    def close(self) -> None:
        """See `ObservationLog.close`."""
        with self._lock:
            self._close_producer()

    def _send(self, records: Sequence[tuple[str, bytes]]) -> None:
        if self._producer is None:
            self._make_topic()
            self._producer = KafkaProducer(
                **_connection(self._bootstrap),
                acks="all",
                enable_idempotence=True,
                compression_type="zstd",
                max_block_ms=_TIMEOUT_MS,
                request_timeout_ms=_TIMEOUT_MS,
                delivery_timeout_ms=2 * _TIMEOUT_MS,
                linger_ms=5,
                batch_size=256 * 1024,
            )
        futures = [self._producer.send(self._topic, key=key.encode(), value=record) for key, record in records]
        deadline = time.monotonic() + 2 * _TIMEOUT_MS / 1000
        for future in futures:
            future.get(timeout=max(0.001, deadline - time.monotonic()))

    def _close_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(KafkaError):
                producer.close(timeout=1)

    def _make_topic(self) -> str:
        """Make the topic unless it is there; its identity.

        Brokers may come back empty, so this is done at the first call and after every failure.
        """
        if self._identity is not None:
            return self._identity
        _check_reachable(self._bootstrap)
        admin = KafkaAdminClient(**_connection(self._bootstrap), request_timeout_ms=_TIMEOUT_MS)
        try:
            self._create(admin)
            described = admin.describe_topics([self._topic])[0]
        finally:
            admin.close()
        if described["error_code"]:
            raise StoreUnavailable(f"kafka does not know topic {self._topic!r} yet: {described}; try again")
        self._identity = f"kafka {described['topic_id']}"
        return self._identity

    def _create(self, admin: Any) -> None:
        try:
            admin.create_topics(
                {self._topic: {"num_partitions": self._num_partitions, "configs": self._topic_config}},
                timeout_ms=_TIMEOUT_MS,
                wait_for_metadata=True,
            )
        except TopicAlreadyExistsError:
            pass
        except AuthorizationError:
            logger.info("not allowed to make topics; expecting that %s is there", self._topic)


class KafkaSubscription:
    """A `Subscription` of `KafkaLog`; after a rebalance it reads on from the committed offsets."""

    def __init__(self, log: KafkaLog, *, group: str) -> None:
        self._log = log
        self._group = group
        self._consumer: Any = None

    def poll(self, *, max_records: int, timeout_s: float) -> list[LogEntry]:
        """See `Subscription.poll`."""
        with self._connected() as consumer:
            batches = consumer.poll(timeout_ms=max(1, int(timeout_s * 1000)), max_records=max_records)
            if not batches:
                _check_reachable(self._log._bootstrap)
                consumer.end_offsets(self._partitions(consumer), timeout_ms=_TIMEOUT_MS)
        # A record without a value is nobody's observation: the consumer sees empty bytes and skips them.
        return [
            LogEntry(place.partition, record.offset, record.value or b"")
            for place, records in batches.items()
            for record in records
        ]

    def commit(self, ends: Mapping[int, int]) -> None:
        """See `Subscription.commit`; raises StoreUnavailable if the partitions went to another member meanwhile."""
        offsets = {
            TopicPartition(self._log._topic, partition): OffsetAndMetadata(end, "", -1)
            for partition, end in ends.items()
        }
        if offsets:
            with self._connected() as consumer:
                consumer.commit(offsets, timeout_ms=_TIMEOUT_MS)

    def lag(self) -> int:
        """See `Subscription.lag`."""
        with self._connected() as consumer:
            _check_reachable(self._log._bootstrap)
            partitions = self._partitions(consumer)
            ends = consumer.end_offsets(partitions, timeout_ms=_TIMEOUT_MS)
            starts = consumer.beginning_offsets(partitions)
            committed = {one: consumer.committed(one, timeout_ms=_TIMEOUT_MS) or 0 for one in partitions}
        return sum(max(0, ends[one] - max(committed[one], starts[one])) for one in partitions)

    def close(self) -> None:
        """See `Subscription.close`; the broker hears of it, so that another member takes over at once."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with contextlib.suppress(KafkaError):
                consumer.close(autocommit=False, timeout_ms=1_000)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        try:
            with _translated(self._log._bootstrap):
                if self._consumer is None:
                    with self._log._lock:
                        self._log._make_topic()
                    self._consumer = self._join()
                yield self._consumer
        except StoreUnavailable:
            self._log._identity = None
            raise

    def _join(self) -> Any:
        return KafkaConsumer(
            self._log._topic,
            **_connection(self._log._bootstrap),
            # A group id spans topics, and members with different topics would wait for each other.
            group_id=f"{self._log._topic}.{self._group}",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=_SESSION_MS,
            max_poll_interval_ms=_MAX_POLL_INTERVAL_MS,
            request_timeout_ms=_TIMEOUT_MS,
            fetch_max_wait_ms=200,
            max_partition_fetch_bytes=4 * 2**20,
        )

    def _partitions(self, consumer: Any) -> list[TopicPartition]:
        numbers = consumer.partitions_for_topic(self._log._topic)
        if not numbers:
            raise StoreUnavailable(f"kafka topic {self._log._topic!r} has no partitions yet; try again")
        return [TopicPartition(self._log._topic, number) for number in sorted(numbers)]


def _connection(bootstrap: list[str]) -> dict[str, Any]:
    return {
        "bootstrap_servers": bootstrap,
        "bootstrap_timeout_ms": _TIMEOUT_MS,
        # The default of 30 s would let a restarted broker wait half a minute for us.
        "reconnect_backoff_max_ms": 1_000,
    }


def _check_reachable(bootstrap: list[str]) -> None:
    """Raise StoreUnavailable unless one broker accepts a connection.

    A client whose constructor fails leaves its network thread behind; so none is made while nobody listens.
    """
    for broker in bootstrap:
        host, _, port = broker.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
            return
    raise StoreUnavailable(f"kafka at {','.join(bootstrap)} accepts no connection; expected one reachable broker")


@contextlib.contextmanager
def _translated(bootstrap: list[str]) -> Iterator[None]:
    """Errors of the client as errors of ours."""
    try:
        yield
    except MessageSizeTooLargeError as error:
        raise RecordError(f"the broker refuses a record for its size: {error}; cut it into smaller chunks") from error
    except (AuthorizationError, SaslAuthenticationFailedError) as error:
        raise ConfigError(f"kafka at {','.join(bootstrap)} refuses us: {error}; correct its permissions") from error
    except (KafkaError, OSError) as error:
        raise StoreUnavailable(f"kafka at {','.join(bootstrap)} cannot serve now: {error!r}") from error
