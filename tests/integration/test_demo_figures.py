"""The demo's figures: counters read from a real page, streams that settle, and the verdict's inputs."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import generate_latest

from deploy.local import verdict
from deploy.local.demo import SETTLE_QUERIES, is_settled
from deploy.local.demo_screen import StreamRow, curve
from deploy.local.supervisor import embedded_socket
from deploy.local.watch import Reading, Swap, Watch, between, read_metrics
from slipstream.acceptance import AcceptanceCounts, acceptance_rate
from slipstream.stores.memory import MemoryLog
from slipstream.telemetry import ReplicaMetrics
from slipstream.versions import ServingPointer


def reading(at: float, *, passes: int, accepted: int) -> Reading:
    counts = AcceptanceCounts(num_passes=passes, num_proposed=2 * passes, num_accepted=accepted)
    return Reading(at=at, counts={"sql": counts}, num_swaps=0, num_refusals=0, draft_version=1)


def watched(readings: list[Reading], swaps: list[Swap]) -> Watch:
    """A watch that has seen these."""
    watch = Watch.__new__(Watch)
    watch.readings, watch.swaps = readings, swaps
    return watch


def test_a_page_of_the_service_gives_its_counters_by_domain() -> None:
    metrics = ReplicaMetrics()
    metrics.verification_passes.labels("sql").inc(10)
    metrics.proposed_tokens.labels("sql").inc(40)
    metrics.accepted_tokens.labels("sql").inc(12)
    metrics.verification_passes.labels("math").inc(3)
    metrics.swaps.inc(2)
    metrics.swap_refusals.labels("digest").inc()
    metrics.draft_info.labels("4").set(0)
    metrics.draft_info.labels("5").set(1)
    seen = read_metrics(generate_latest(metrics.registry).decode(), at=1.0)
    assert seen.counts["sql"] == AcceptanceCounts(num_passes=10, num_proposed=40, num_accepted=12)
    assert seen.counts["math"] == AcceptanceCounts(num_passes=3)
    assert (seen.num_swaps, seen.num_refusals, seen.draft_version) == (2, 1, 5)


def test_between_two_readings_only_what_was_counted_there_and_nothing_after_a_restart() -> None:
    early, late = reading(0, passes=100, accepted=50), reading(1, passes=300, accepted=150)
    assert acceptance_rate(between(early, late, "sql")) == 100 / 400
    assert between(late, early, "sql") == AcceptanceCounts()
    assert between(early, late, "code") == AcceptanceCounts()


def row(num_queries: int) -> StreamRow:
    one = StreamRow(1, "sql")
    one.began_at, one.num_queries = 10.0, num_queries
    return one


LEVEL = [reading(20 + i, passes=1000 * i, accepted=600 * i) for i in range(5)]
RISING = [reading(20 + i, passes=1000 * i, accepted=100 * i * i) for i in range(5)]
SWAP = Swap(at=19.5, generation=1, version=1)


def test_a_stream_settles_once_acceptance_is_level_after_a_swap_of_its_own() -> None:
    assert is_settled(row(SETTLE_QUERIES), watched(LEVEL, [SWAP]))


@pytest.mark.parametrize(
    ("num_queries", "readings", "swaps"),
    [
        (SETTLE_QUERIES - 1, LEVEL, [SWAP]),
        (SETTLE_QUERIES, LEVEL, []),
        (SETTLE_QUERIES, LEVEL, [Swap(at=9.0, generation=1, version=1)]),
        (SETTLE_QUERIES, RISING, [SWAP]),
        (SETTLE_QUERIES, LEVEL[:2], [SWAP]),
    ],
    ids=["too few queries", "no swap", "a swap before it", "still rising", "too few readings"],
)
def test_a_stream_does_not_settle(num_queries: int, readings: list[Reading], swaps: list[Swap]) -> None:
    assert not is_settled(row(num_queries), watched(readings, swaps))


def test_a_curve_counts_its_own_stream_only() -> None:
    points = curve(LEVEL, "sql", began_at=21.0, ended_at=23.0)
    assert [point.rate for point in points] == [pytest.approx(0.3)] * 3
    assert [point.at_s for point in points] == [2.0, 3.0, 4.0]


def pointer(generation: int, version: int, reason: str) -> ServingPointer:
    return ServingPointer(
        role="draft",
        domain="default",
        version=version,
        artifact_uri=f"file:///versions/{version}",
        digest="d",
        target_digest="t",
        generation=generation,
        fencing_token=1,
        reason=reason,
        set_at=0.0,
    )


def test_an_initial_draft_and_rollbacks_are_no_promotions() -> None:
    moves = [
        pointer(1, 1, "initial draft"),
        pointer(2, 2, "gain +0.2"),
        pointer(3, 1, "rollback: version 2 to 1"),
        pointer(4, 0, "rollback: version 1 to 0"),
        pointer(5, 3, "gain +0.1"),
    ]
    assert [one.version for one in verdict.promoted(list(reversed(moves)))] == [2, 3]


def test_bytes_that_are_no_observation_do_not_stop_the_verdict() -> None:
    log = MemoryLog()
    log.append([("a", b"broken"), ("b", msgspec.msgpack.encode({"request_id": "b"}))])
    assert verdict.held_out(log, group="demo") == []


def test_only_a_unix_url_names_an_embedded_server() -> None:
    assert embedded_socket("unix://:secret@/somewhere/valkey.sock") == "/somewhere/valkey.sock"
    assert embedded_socket("redis://host:6379/0") == ""
