"""What every `PointerStore` does, on every implementation and its real server."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.errors import PromotionFrozen, StaleFence, StalePointer, StoreError, StoreUnavailable
from slipstream.promotion import PromotionDecision
from slipstream.stores.memory import MemoryPointers
from slipstream.stores.protocols import PointerStore, WorkerStatus
from slipstream.stores.redis import RedisPointers
from slipstream.versions import Acknowledgement, ServingPointer
from tests.servers import ValkeyServer, eventually

# A fixture's store serves all examples of a property: each example takes a domain of its own.
PROPERTY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def new_domain() -> str:
    return f"domain-{uuid.uuid4().hex[:12]}"


def pointer_to(version: int, *, generation: int, token: int, domain: str = "default") -> ServingPointer:
    return ServingPointer(
        role="draft",
        domain=domain,
        version=version,
        artifact_uri=f"file:///versions/{version}",
        digest=f"digest-{version}",
        target_digest="target",
        generation=generation,
        fencing_token=token,
        reason=f"version {version} is better",
        set_at=1000.0 + generation,
    )


def moved(store: PointerStore, *versions: int) -> list[ServingPointer]:
    """The pointers of these moves, made one after another by one writer."""
    token = store.issue_fencing_token()
    made = [pointer_to(version, generation=i + 1, token=token) for i, version in enumerate(versions)]
    for pointer in made:
        store.advance(pointer, expected_generation=pointer.generation - 1)
    return made


def test_a_pointer_never_set_is_none_and_has_no_history(pointers: PointerStore) -> None:
    assert pointers.read("draft", "default") is None
    assert pointers.history("draft", "default", limit=5) == []
    assert pointers.frozen() is None


def test_the_pointer_reads_back_whole_and_history_is_newest_first(pointers: PointerStore) -> None:
    made = moved(pointers, 3, 7, 3)
    assert pointers.read("draft", "default") == made[-1]
    assert pointers.history("draft", "default", limit=10) == made[::-1]
    assert pointers.history("draft", "default", limit=2) == made[:0:-1]
    assert pointers.history("draft", "default", limit=0) == []


def test_roles_and_domains_have_pointers_of_their_own(pointers: PointerStore) -> None:
    made = moved(pointers, 1)
    assert pointers.read("routing", "default") is None
    assert pointers.read("draft", "sql") is None
    assert pointers.read("draft", "default") == made[0]


def test_places_are_those_with_a_pointer_or_a_word_of_a_replica(pointers: PointerStore) -> None:
    assert pointers.places() == []
    moved(pointers, 1)
    pointers.acknowledge(msgspec.structs.replace(acknowledged("replica-1", version=1), role="recycling"))
    pointers.acknowledge(acknowledged("replica-1", version=1, domain="sql"))
    assert pointers.places() == [("draft", "default"), ("draft", "sql"), ("recycling", "default")]
    with pytest.raises(StalePointer):
        pointers.advance(pointer_to(1, generation=5, token=99, domain="math"), expected_generation=4)
    assert ("draft", "math") not in pointers.places()


def test_a_generation_that_is_not_one_above_the_expected_is_the_callers_mistake(pointers: PointerStore) -> None:
    with pytest.raises(ValueError, match="pointer generation 3: expected 2"):
        pointers.advance(pointer_to(1, generation=3, token=1), expected_generation=1)


def test_a_repeated_move_whose_reply_was_lost_succeeds_and_counts_once(pointers: PointerStore) -> None:
    made = moved(pointers, 1)
    pointers.advance(made[0], expected_generation=0)
    assert pointers.history("draft", "default", limit=10) == made


@PROPERTY
@given(num_writers=st.integers(2, 5), num_rounds=st.integers(1, 4))
def test_of_writers_at_once_exactly_one_wins_each_generation(
    pointers: PointerStore, num_writers: int, num_rounds: int
) -> None:
    domain, token = new_domain(), pointers.issue_fencing_token()
    for generation in range(1, num_rounds + 1):
        candidates = [
            pointer_to(100 * generation + writer, generation=generation, token=token, domain=domain)
            for writer in range(num_writers)
        ]
        wins = at_once([advancing(pointers, candidate) for candidate in candidates])
        assert wins.count(True) == 1
        assert pointers.read("draft", domain) == candidates[wins.index(True)]
    generations = [one.generation for one in pointers.history("draft", domain, limit=100)]
    assert generations == list(range(num_rounds, 0, -1))


def advancing(store: PointerStore, pointer: ServingPointer) -> Callable[[], bool]:
    def advance() -> bool:
        try:
            store.advance(pointer, expected_generation=pointer.generation - 1)
        except StalePointer:
            return False
        return True

    return advance


def at_once(calls: list[Callable[[], bool]]) -> list[bool]:
    barrier, results = threading.Barrier(len(calls)), [False] * len(calls)

    def run(index: int) -> None:
        barrier.wait()
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_tokens_issued_at_once_are_all_different(pointers: PointerStore) -> None:
    tokens: list[int] = []
    assert all(at_once([lambda: tokens.append(pointers.issue_fencing_token()) is None] * 8))
    assert len(set(tokens)) == 8


def test_a_writer_with_an_older_token_is_refused_whatever_it_expects(pointers: PointerStore) -> None:
    old, new = pointers.issue_fencing_token(), pointers.issue_fencing_token()
    assert new > old
    with pytest.raises(StaleFence, match=f"fencing token {old} is older than {new}"):
        pointers.advance(pointer_to(1, generation=1, token=old), expected_generation=0)
    assert pointers.read("draft", "default") is None
    pointers.advance(pointer_to(1, generation=1, token=new), expected_generation=0)


def test_a_lost_compare_and_set_names_the_generation_it_found(pointers: PointerStore) -> None:
    made = moved(pointers, 1, 2)
    late = pointer_to(9, generation=1, token=made[0].fencing_token)
    with pytest.raises(StalePointer, match="is at generation 2, expected 0"):
        pointers.advance(late, expected_generation=0)
    assert pointers.read("draft", "default") == made[-1]


def test_a_frozen_store_refuses_promotions_until_unfrozen(pointers: PointerStore) -> None:
    made = moved(pointers, 1)
    following = pointer_to(2, generation=2, token=made[0].fencing_token)
    pointers.freeze("looking into a regression")
    assert pointers.frozen() == "looking into a regression"
    with pytest.raises(PromotionFrozen, match="looking into a regression"):
        pointers.advance(following, expected_generation=1)
    assert pointers.read("draft", "default") == made[0]
    pointers.unfreeze()
    assert pointers.frozen() is None
    pointers.advance(following, expected_generation=1)
    assert pointers.read("draft", "default") == following


def test_an_operators_move_passes_a_freeze_freezes_and_fences_the_promoter_out(pointers: PointerStore) -> None:
    made = moved(pointers, 1, 2)
    pointers.freeze("incident")
    rollback = pointer_to(1, generation=3, token=pointers.issue_fencing_token())
    pointers.advance(rollback, expected_generation=2, is_operator=True)
    assert pointers.read("draft", "default") == rollback
    assert pointers.frozen() == rollback.reason
    pointers.unfreeze()
    with pytest.raises(StaleFence):
        pointers.advance(pointer_to(3, generation=4, token=made[0].fencing_token), expected_generation=3)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("issue")),
        st.tuples(st.just("freeze"), st.text(max_size=4)),
        st.tuples(st.just("unfreeze")),
        st.tuples(st.just("advance"), st.integers(0, 3), st.integers(0, 2), st.booleans()),
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_redis_answers_every_sequence_of_calls_as_memory_does(valkey_url: str, steps: list[tuple[object, ...]]) -> None:
    stores = [MemoryPointers(), RedisPointers(valkey_url, namespace=f"test-{uuid.uuid4().hex[:12]}")]
    traces = [[apply(store, number, step) for number, step in enumerate(steps)] for store in stores]
    assert traces[0] == traces[1]
    stores[1].close()


@pytest.fixture(scope="module")
def valkey_url(valkey: ValkeyServer) -> str:
    return valkey.url


def apply(store: PointerStore, number: int, step: tuple[object, ...]) -> tuple[object, ...]:
    """What the store says to one step, and its state afterwards. `advance` draws the generation from -1 to +2."""
    said: object = None
    try:
        match step:
            case ("issue",):
                said = store.issue_fencing_token()
            case ("freeze", str(reason)):
                store.freeze(reason)
            case ("unfreeze",):
                store.unfreeze()
            case ("advance", int(ahead), int(token), bool(is_operator)):
                current = store.read("draft", "default")
                expected = max(0, (current.generation if current else 0) + ahead - 1)
                pointer = pointer_to(number, generation=expected + 1, token=token)
                store.advance(pointer, expected_generation=expected, is_operator=is_operator)
    except StoreError as error:
        said = f"{type(error).__name__}: {error}"
    return said, store.read("draft", "default"), store.frozen(), store.history("draft", "default", limit=100)


def test_waiting_returns_when_a_move_is_announced_and_once_per_move(pointers: PointerStore) -> None:
    assert not pointers.wait_for_move(timeout_s=0.01)
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(pointers.wait_for_move(timeout_s=60.0)))
    waiting.start()
    moved(pointers, 1)
    waiting.join(30.0)
    assert answers == [True]
    assert pointers.wait_for_move(timeout_s=0.5), "this thread has not heard of the move yet"
    assert not pointers.wait_for_move(timeout_s=0.01)


def test_a_move_made_between_two_waits_is_heard_by_the_second(pointers: PointerStore) -> None:
    pointers.wait_for_move(timeout_s=0.01)
    moved(pointers, 1)
    assert pointers.wait_for_move(timeout_s=0.01)


def acknowledged(replica_id: str, *, version: int, domain: str = "default") -> Acknowledgement:
    return Acknowledgement(
        replica_id=replica_id,
        role="draft",
        domain=domain,
        version=version,
        digest=f"digest-{version}",
        generation=version,
        state="serving",
        error="",
        at=1.0,
    )


def test_the_last_word_of_each_replica_counts_and_a_silent_replica_is_forgotten(pointers: PointerStore) -> None:
    pointers.acknowledge(acknowledged("b", version=1))
    pointers.acknowledge(acknowledged("c", version=1, domain="sql"))
    refusal = msgspec.structs.replace(acknowledged("a", version=1), state="refused", error="wrong digest")

    def speaks_again() -> bool:
        pointers.acknowledge(acknowledged("a", version=2))
        pointers.acknowledge(refusal)
        return pointers.acknowledgements("draft", "default") == [refusal]

    assert pointers.acknowledgements("draft", "default") == [acknowledged("b", version=1)]
    eventually(speaks_again)


def test_decisions_come_newest_first(pointers: PointerStore) -> None:
    decisions = [
        PromotionDecision(
            role="draft",
            domain="default",
            challenger_version=number,
            champion_version=0,
            verdict="hold",
            reason="too few",
            mean_difference=0.5,
            lower_bound=-1.0,
            num_requests=3,
            at=float(number),
        )
        for number in range(3)
    ]
    for decision in decisions:
        pointers.record_decision(decision)
    assert pointers.decisions(limit=2) == decisions[:0:-1]


def test_an_infinite_bound_survives(pointers: PointerStore) -> None:
    decision = PromotionDecision(
        role="draft",
        domain="default",
        challenger_version=1,
        champion_version=0,
        verdict="hold",
        reason="one request",
        mean_difference=0.5,
        lower_bound=float("-inf"),
        num_requests=1,
        at=1.0,
    )
    pointers.record_decision(decision)
    assert pointers.decisions(limit=1) == [decision]


def test_a_worker_has_one_status_and_workers_come_by_name(pointers: PointerStore) -> None:
    first, second = (WorkerStatus(worker="b", lag=lag, detail="training", at=1.0) for lag in (5, 2))
    other = WorkerStatus(worker="a", lag=-1, detail="", at=1.0)
    for status in (first, second, other):
        pointers.report_worker(status)
    assert pointers.workers() == [other, second]


def test_an_outage_is_store_unavailable_and_the_pointer_is_there_after_it(valkey: ValkeyServer) -> None:
    store = RedisPointers(valkey.url, namespace=f"test-{uuid.uuid4().hex[:12]}")
    made = moved(store, 1, 2)
    store.wait_for_move(timeout_s=0.01)
    valkey.kill()
    try:
        with pytest.raises(StoreUnavailable):
            store.read("draft", "default")
        with pytest.raises(StoreUnavailable):
            store.advance(pointer_to(3, generation=3, token=9), expected_generation=2)
        assert not store.wait_for_move(timeout_s=0.05)
    finally:
        valkey.start()
    assert store.history("draft", "default", limit=10) == made[::-1]
    store.advance(pointer_to(3, generation=3, token=made[0].fencing_token), expected_generation=2)
    assert store.wait_for_move(timeout_s=10.0)
    store.close()
