"""What only the Kafka log has to get right: lazy construction, long pauses, one topic made once."""

from __future__ import annotations

import threading
import time
import uuid

import pytest
from kafka import KafkaAdminClient

from slipstream.errors import StoreUnavailable
from slipstream.stores import kafka
from slipstream.stores.kafka import KafkaLog
from tests.servers import KafkaBroker, eventually, free_port


@pytest.fixture
def topic() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


def test_nothing_is_asked_of_the_broker_before_the_first_call_and_failing_leaves_no_thread() -> None:
    log = KafkaLog(f"127.0.0.1:{free_port()}")
    subscription = log.subscribe("readers")
    num_threads = threading.active_count()
    for call in (
        lambda: log.append([("a", b"record")]),
        lambda: subscription.poll(max_records=1, timeout_s=0.1),
        lambda: subscription.commit({0: 1}),
        subscription.lag,
    ):
        with pytest.raises(StoreUnavailable, match="accepts no connection"):
            call()
    subscription.close()
    log.close()
    assert threading.active_count() == num_threads


@pytest.mark.kafka
def test_the_topic_is_made_once_with_its_partitions_and_retention(kafka_broker: KafkaBroker, topic: str) -> None:
    for _ in range(2):
        log = KafkaLog(kafka_broker.bootstrap, topic=topic, num_partitions=3, retention_s=600, retention_bytes=1 << 22)
        log.append([("a", b"record")])
        log.close()
    admin = KafkaAdminClient(bootstrap_servers=kafka_broker.bootstrap)
    (described,) = admin.describe_topics([topic])
    admin.close()
    assert len(described["partitions"]) == 3
    subscription = KafkaLog(kafka_broker.bootstrap, topic=topic).subscribe("readers")
    assert subscription.lag() == 2
    subscription.close()


@pytest.mark.kafka
def test_a_member_that_trains_longer_than_the_session_keeps_its_partitions(
    kafka_broker: KafkaBroker, topic: str
) -> None:
    log = KafkaLog(kafka_broker.bootstrap, topic=topic)
    log.append([(f"request-{number}", b"record") for number in range(20)])
    subscription = log.subscribe("readers")
    entries = eventually(lambda: subscription.poll(max_records=100, timeout_s=1.0))
    # The pause is the claim: no poll for longer than the session, so only the heartbeats keep the member alive.
    time.sleep(kafka._SESSION_MS / 1000 + 2.0)
    subscription.commit({entry.partition: entry.offset + 1 for entry in entries})
    assert subscription.lag() == 20 - len(entries)
    more = subscription.poll(max_records=100, timeout_s=1.0)
    assert not {(entry.partition, entry.offset) for entry in more} & {(one.partition, one.offset) for one in entries}
    subscription.close()
    log.close()
