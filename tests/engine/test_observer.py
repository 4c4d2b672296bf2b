"""Learning never blocks serving: the observer's queue is bounded, its losses are counted, its thread survives."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import msgspec
import pytest
from conftest import Served, serve

from slipstream.engine.observer import Observer
from slipstream.errors import ConfigError, StoreUnavailable
from slipstream.models.checkpoint import Checkpoint
from slipstream.records import MAX_RECORD_BYTES, Observation, decode_observation
from slipstream.stores.memory import MemoryLog
from slipstream.telemetry import ReplicaMetrics
from tests.servers import eventually


class FailingLog(MemoryLog):
    """A log whose appends raise what it is told to, until it is told None."""

    def __init__(self, failure: Exception | None) -> None:
        super().__init__(num_partitions=1)
        self.failure = failure
        self.asked = threading.Event()

    def append(self, records: Sequence[tuple[str, bytes]]) -> None:
        self.asked.set()
        if self.failure is not None:
            raise self.failure
        super().append(records)

    def stored(self) -> list[str]:
        subscription = self.subscribe("test")
        entries = subscription.poll(max_records=1000, timeout_s=0.0)
        subscription.close()
        return [decode_observation(entry.record).request_id for entry in entries]


@pytest.fixture(scope="module")
def observation(target: Checkpoint, prompts: list[tuple[int, ...]]) -> Observation:
    return serve(target, prompts[:1], Served(max_tokens=4)).observations[0]


def named(observation: Observation, number: int) -> Observation:
    return msgspec.structs.replace(observation, request_id=f"request-{number}")


def fates(metrics: ReplicaMetrics) -> dict[str, float]:
    value = metrics.registry.get_sample_value
    names = ("sent", "dropped", "failed")
    return {name: value("slipstream_observations_total", {"result": name}) or 0.0 for name in names}


def test_what_is_offered_reaches_the_log_in_order(observation: Observation) -> None:
    log, metrics = FailingLog(None), ReplicaMetrics()
    observer = Observer(log, max_queued_records=500, metrics=metrics)
    for number in range(200):
        observer.offer(named(observation, number))
    observer.start()
    observer.stop(30)
    assert log.stored() == [f"request-{number}" for number in range(200)]
    assert fates(metrics) == {"sent": 200, "dropped": 0, "failed": 0}


@pytest.mark.parametrize("failure", [StoreUnavailable("connection refused"), ConfigError("wrong password")])
def test_an_outage_keeps_the_newest_drops_the_rest_and_counts_both(
    observation: Observation, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    log, metrics = FailingLog(failure), ReplicaMetrics()
    observer = Observer(log, max_queued_records=10, metrics=metrics)
    observer.start()
    observer.offer(named(observation, 0))
    assert log.asked.wait(30)
    for number in range(1, 51):
        observer.offer(named(observation, number))
    log.failure = None
    eventually(lambda: "request-50" in log.stored())
    observer.stop(30)
    sent = log.stored()
    assert sent == sorted(sent, key=lambda name: int(name.split("-")[1]))
    assert len(sent) <= 11
    assert fates(metrics) == {"sent": len(sent), "dropped": 51 - len(sent), "failed": 0}
    outages = [record for record in caplog.records if "does not answer" in record.getMessage()]
    assert len(outages) == 1


def test_one_record_too_long_costs_only_itself(observation: Observation) -> None:
    log, metrics = FailingLog(None), ReplicaMetrics()
    observer = Observer(log, max_queued_records=10, metrics=metrics)
    observer.offer(named(observation, 1))
    observer.offer(msgspec.structs.replace(observation, prompt_ids=b"\0" * (4 * MAX_RECORD_BYTES)))
    observer.offer(named(observation, 2))
    observer.start()
    observer.stop(30)
    assert log.stored() == ["request-1", "request-2"]
    assert fates(metrics) == {"sent": 2, "dropped": 0, "failed": 1}


def test_an_error_nobody_foresaw_is_counted_and_the_thread_goes_on(observation: Observation) -> None:
    log, metrics = FailingLog(OverflowError("integer out of range")), ReplicaMetrics()
    observer = Observer(log, max_queued_records=10, metrics=metrics)
    observer.start()
    observer.offer(named(observation, 1))
    eventually(lambda: fates(metrics)["failed"] == 1)
    log.failure = None
    observer.offer(named(observation, 2))
    eventually(lambda: log.stored() == ["request-2"])
    observer.stop(30)
    assert metrics.registry.get_sample_value("slipstream_unexpected_errors_total") == 1


def test_what_cannot_be_sent_before_the_stop_is_counted_as_dropped(observation: Observation) -> None:
    log, metrics = FailingLog(StoreUnavailable("connection refused")), ReplicaMetrics()
    observer = Observer(log, max_queued_records=10, metrics=metrics)
    observer.start()
    for number in range(5):
        observer.offer(named(observation, number))
    assert log.asked.wait(30)
    observer.stop(30)
    assert fates(metrics) == {"sent": 0, "dropped": 5, "failed": 0}
