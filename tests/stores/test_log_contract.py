"""What every `ObservationLog` does, on every implementation and its real server."""

from __future__ import annotations

from collections import defaultdict

import pytest

from slipstream.errors import RecordError, StoreUnavailable
from slipstream.records import MAX_RECORD_BYTES
from slipstream.stores.protocols import LogEntry, Subscription
from tests.servers import eventually
from tests.stores.conftest import LogUnderTest

NUM_RECORDS = 24


def numbered(num_records: int, *, start: int = 0) -> list[tuple[str, bytes]]:
    return [(f"request-{number % 7}", b"record-%d" % number) for number in range(start, start + num_records)]


def poll_all(subscription: Subscription, num_records: int) -> list[LogEntry]:
    """Polled until that many records came."""
    entries: list[LogEntry] = []

    def has_all() -> bool:
        entries.extend(subscription.poll(max_records=100, timeout_s=1.0))
        return len(entries) >= num_records

    eventually(has_all)
    return entries


def ends_of(entries: list[LogEntry]) -> dict[int, int]:
    ends: dict[int, int] = defaultdict(int)
    for entry in entries:
        ends[entry.partition] = max(ends[entry.partition], entry.offset + 1)
    return dict(ends)


def records_of(entries: list[LogEntry]) -> list[bytes]:
    return sorted(entry.record for entry in entries)


def sorted_records(records: list[tuple[str, bytes]]) -> list[bytes]:
    return sorted(record for _, record in records)


def test_records_come_back_unchanged_in_offset_order_and_one_request_in_one_partition(
    log_under_test: LogUnderTest,
) -> None:
    log = log_under_test.open()
    records = numbered(NUM_RECORDS)
    log.append(records[:10])
    log.append(records[10:])
    entries = poll_all(log_under_test.subscribe("readers"), NUM_RECORDS)
    assert records_of(entries) == sorted_records(records)
    offsets, partitions = defaultdict(list), defaultdict(set)
    key_of = {record: key for key, record in records}
    order = defaultdict(list)
    for entry in entries:
        offsets[entry.partition].append(entry.offset)
        partitions[key_of[entry.record]].add(entry.partition)
        order[key_of[entry.record]].append(entry.record)
    assert all(kept == sorted(set(kept)) for kept in offsets.values())
    assert all(len(where) == 1 for where in partitions.values())
    assert all(order[key] == [record for one, record in records if one == key] for key in order)


def test_poll_gives_at_most_what_was_asked_for_and_nothing_from_an_empty_log(log_under_test: LogUnderTest) -> None:
    log = log_under_test.open()
    subscription = log_under_test.subscribe("readers")
    assert subscription.poll(max_records=10, timeout_s=0.05) == []
    log.append(numbered(5))
    assert 0 < len(eventually(lambda: subscription.poll(max_records=2, timeout_s=1.0))) <= 2


def test_what_was_polled_and_not_committed_comes_again_after_close(log_under_test: LogUnderTest) -> None:
    log = log_under_test.open()
    records = numbered(NUM_RECORDS)
    log.append(records)
    first = log_under_test.subscribe("readers")
    poll_all(first, NUM_RECORDS)
    first.close()
    assert records_of(poll_all(log_under_test.subscribe("readers"), NUM_RECORDS)) == sorted_records(records)


def test_what_a_killed_consumer_had_not_committed_comes_again(log_under_test: LogUnderTest) -> None:
    if log_under_test.kind == "memory":
        pytest.skip("a log in memory dies with its consumer")
    log = log_under_test.open()
    records = numbered(NUM_RECORDS)
    log.append(records)
    consumer = log_under_test.start_consumer("readers", num_records=10)
    consumer.kill()
    consumer.communicate()
    assert set(records_of(poll_all(log_under_test.subscribe("readers"), NUM_RECORDS))) == set(sorted_records(records))


def test_what_was_committed_does_not_come_again(log_under_test: LogUnderTest) -> None:
    log = log_under_test.open()
    records = numbered(NUM_RECORDS)
    log.append(records[:16])
    first = log_under_test.subscribe("readers")
    first.commit(ends_of(poll_all(first, 16)))
    log.append(records[16:])
    poll_all(first, NUM_RECORDS - 16)
    first.close()
    assert records_of(poll_all(log_under_test.subscribe("readers"), NUM_RECORDS - 16)) == sorted_records(records[16:])


def test_lag_is_the_number_of_uncommitted_records(log_under_test: LogUnderTest) -> None:
    log = log_under_test.open()
    subscription = log_under_test.subscribe("readers")
    assert subscription.lag() == 0
    log.append(numbered(NUM_RECORDS))
    assert subscription.lag() == NUM_RECORDS
    entries = poll_all(subscription, NUM_RECORDS)
    assert subscription.lag() == NUM_RECORDS
    one = entries[0]
    subscription.commit({one.partition: one.offset + 1})
    assert subscription.lag() == NUM_RECORDS - 1
    subscription.commit(ends_of(entries))
    assert subscription.lag() == 0
    log.append(numbered(3))
    assert subscription.lag() == 3


def test_groups_are_independent(log_under_test: LogUnderTest) -> None:
    log = log_under_test.open()
    log.append(numbered(NUM_RECORDS))
    readers, auditors = log_under_test.subscribe("readers"), log_under_test.subscribe("auditors")
    readers.commit(ends_of(poll_all(readers, NUM_RECORDS)))
    assert (readers.lag(), auditors.lag()) == (0, NUM_RECORDS)
    assert len(poll_all(auditors, NUM_RECORDS)) == NUM_RECORDS


def test_two_members_of_a_group_share_the_records_and_their_commits_add_up(log_under_test: LogUnderTest) -> None:
    log = log_under_test.open()
    records = numbered(64)
    log.append(records)
    members = [log_under_test.subscribe("readers"), log_under_test.subscribe("readers")]
    entries: list[list[LogEntry]] = [[], []]

    def have_all_between_them() -> bool:
        for member, mine in zip(members, entries, strict=True):
            mine.extend(member.poll(max_records=4, timeout_s=0.1))
        seen = {entry.record for mine in entries for entry in mine}
        return all(entries) and seen == {record for _, record in records}

    eventually(have_all_between_them)
    for member, mine in zip(members, entries, strict=True):
        member.commit(ends_of(mine))
    assert members[0].lag() == 0


def test_a_record_too_long_is_refused_and_nothing_of_its_batch_is_stored(log_under_test: LogUnderTest) -> None:
    log = log_under_test.open()
    longest = ("a", b"x" * MAX_RECORD_BYTES)
    log.append([longest])
    with pytest.raises(RecordError, match=f"{MAX_RECORD_BYTES + 1} bytes"):
        log.append([("b", b"fits"), ("a", b"x" * (MAX_RECORD_BYTES + 1))])
    assert [entry.record for entry in poll_all(log_under_test.subscribe("readers"), 1)] == [longest[1]]


def test_poison_reaches_the_consumer_undecoded(log_under_test: LogUnderTest) -> None:
    log = log_under_test.open()
    poison = [b"\xff\x00not msgpack", b"\r\n$-1\r\n"]
    log.append([("a", record) for record in poison])
    assert [entry.record for entry in poll_all(log_under_test.subscribe("readers"), 2)] == poison


def test_a_log_keeps_its_identity_for_as_long_as_its_data(log_under_test: LogUnderTest) -> None:
    log = log_under_test.open()
    identity = log.identity()
    log.append(numbered(3))
    assert log_under_test.open().identity() == log.identity() == identity
    log_under_test.lose_data()
    reborn = log_under_test.open()
    reborn.append(numbered(3))
    assert reborn.identity() not in ("", identity)


@pytest.mark.timeout(180)
def test_an_outage_is_store_unavailable_and_after_it_every_acknowledged_record_is_there(
    log_under_test: LogUnderTest,
) -> None:
    if log_under_test.server is None:
        pytest.skip("there is no server of ours to kill")
    log = log_under_test.open()
    identity = log.identity()
    records = numbered(NUM_RECORDS)
    log.append(records[:16])
    subscription = log_under_test.subscribe("readers")
    subscription.commit(ends_of(poll_all(subscription, 16)))
    log.append(records[16:20])
    log_under_test.server.kill()
    try:
        with pytest.raises(StoreUnavailable):
            log.append(records[20:])
        with pytest.raises(StoreUnavailable):
            subscription.poll(max_records=10, timeout_s=0.2)
        with pytest.raises(StoreUnavailable):
            subscription.lag()
        with pytest.raises(StoreUnavailable):
            log_under_test.subscribe("readers").lag()
    finally:
        log_under_test.server.start()
    eventually(lambda: log.append(records[20:]) is None)
    assert log.identity() == log_under_test.open().identity() == identity
    seen: set[bytes] = set()

    def has_the_rest() -> bool:
        seen.update(entry.record for entry in subscription.poll(max_records=100, timeout_s=1.0))
        return len(seen) >= NUM_RECORDS - 16

    eventually(has_the_rest)
    assert seen == {record for _, record in records[16:]}
