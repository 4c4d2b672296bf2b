"""Who is served when: in order of arrival, none starved, none lost, and never more blocks than there are."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from conftest import LIMITS
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafting.tree import NO_DRAFT
from slipstream.engine.batch import RunningSequence
from slipstream.engine.plan import BLOCK_TOKENS
from slipstream.engine.request import Request, SamplingParams
from slipstream.engine.scheduler import EngineLimits, Scheduler

CONTEXT = 256


def limits(**changes: object) -> EngineLimits:
    return msgspec.structs.replace(LIMITS, max_context_tokens=CONTEXT, **changes)


def sequence(
    name: str, prompt: tuple[int, ...] | list[int], *, max_tokens: int = 8, tenant: str = "one", speculate: bool = True
) -> RunningSequence:
    request = Request(
        request_id=name,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(seed=1, max_tokens=max_tokens),
        tenant=tenant,
        domain="math",
        may_train=False,
        arrived_at=0.0,
        speculate=speculate,
    )
    return RunningSequence(request, lambda block: None)


def scheduler_of(sizes: EngineLimits, *sequences: RunningSequence) -> Scheduler:
    scheduler = Scheduler(sizes, max_context_tokens=CONTEXT)
    for one in sequences:
        scheduler.enqueue(one)
    return scheduler


def finish_step(scheduler: Scheduler, working: list[RunningSequence], *, num_accepted: int = 0) -> None:
    """What the engine does after `schedule`: every choosing sequence commits a bonus and what a draft got right."""
    for one in working:
        if one.is_choosing:
            one.commit((7,) * (1 + min(num_accepted, one.max_depth)), NO_DRAFT)
        else:
            one.num_computed += one.num_step_tokens
    for one in working:
        scheduler.publish(one)
        if one.finish_reason is not None:
            scheduler.release(one)


def names(sequences: list[RunningSequence]) -> list[str]:
    return [one.request.request_id for one in sequences]


def prompt(length: int, *, start: int = 0) -> list[int]:
    return list(range(start, start + length))


def test_prefill_is_cut_into_chunks_that_share_what_decoding_leaves() -> None:
    scheduler = scheduler_of(limits(max_step_tokens=40, num_draft_tokens=4), sequence("first", prompt(30)))
    finish_step(scheduler, scheduler.schedule())
    scheduler.enqueue(sequence("second", prompt(100, start=500)))
    working = scheduler.schedule()
    assert names(working) == ["first", "second"]
    assert [one.num_step_tokens for one in working] == [1, 40 - 1], "draft nodes come on top"


def test_prefill_gets_a_block_of_rows_when_decoding_takes_the_whole_budget() -> None:
    decoding = [sequence(f"decoding-{n}", prompt(5, start=100 * n), max_tokens=50) for n in range(4)]
    scheduler = scheduler_of(limits(max_step_tokens=20, num_draft_tokens=4), *decoding)
    while not all(one.num_output for one in decoding):
        finish_step(scheduler, scheduler.schedule())
    scheduler.enqueue(sequence("late", prompt(100, start=900)))
    working = scheduler.schedule()
    assert [one.num_step_tokens for one in working] == [1, 1, 1, 1, BLOCK_TOKENS]


def test_a_prompt_seen_before_is_found_up_to_its_last_token() -> None:
    scheduler = scheduler_of(limits(), sequence("first", prompt(48), max_tokens=1))
    finish_step(scheduler, scheduler.schedule())
    second = sequence("second", prompt(48))
    scheduler.enqueue(second)
    working = scheduler.schedule()
    assert (second.num_computed, working[0].num_step_tokens) == (32, 16)
    assert scheduler.num_hit_tokens == 32


def test_a_prompt_of_another_tenant_is_computed_anew() -> None:
    scheduler = scheduler_of(limits(), sequence("first", prompt(48), max_tokens=1))
    finish_step(scheduler, scheduler.schedule())
    scheduler.enqueue(sequence("second", prompt(48), tenant="two"))
    assert scheduler.schedule()[0].num_step_tokens == 48
    assert scheduler.num_hit_tokens == 0


def test_samples_of_one_prompt_compute_it_once() -> None:
    samples = [sequence(f"sample-{n}", prompt(70)) for n in range(8)]
    scheduler = scheduler_of(limits(), *samples)
    computed: Counter[str] = Counter()
    for _ in range(3):
        working = scheduler.schedule()
        computed.update({one.request.request_id: one.num_step_tokens for one in working if not one.num_output})
        finish_step(scheduler, working)
    assert computed == {"sample-0": 70} | {f"sample-{n}": 70 - 64 for n in range(1, 8)}
    assert len({block for one in samples for block in one.blocks[:4]}) == 4


def test_a_sequence_does_not_wait_for_a_block_whose_computer_left() -> None:
    first, second = sequence("first", prompt(70)), sequence("second", prompt(70))
    scheduler = scheduler_of(limits(max_step_tokens=20), first, second)
    working = scheduler.schedule()
    assert names(working) == ["first"]
    finish_step(scheduler, working)
    scheduler.cancel("first")
    assert scheduler.take_cancelled() == [first]
    working = scheduler.schedule()
    assert names(working) == ["second"]
    assert second.num_computed == 16


def test_the_newest_is_preempted_waits_in_front_and_keeps_its_tokens() -> None:
    old = sequence("old", prompt(30), max_tokens=40)
    new = sequence("new", prompt(14, start=500), max_tokens=40)
    late = sequence("late", prompt(5, start=900))
    scheduler = scheduler_of(limits(num_blocks=5, num_draft_tokens=0, max_running_requests=2), old, new, late)
    while not scheduler.num_preemptions:
        finish_step(scheduler, scheduler.schedule())
    num_output = new.num_output
    assert num_output > 0
    assert names(scheduler.running) == ["old"]
    while old.finish_reason is None:
        finish_step(scheduler, scheduler.schedule())
    working = scheduler.schedule()
    assert names(working) == ["new", "late"]
    assert new.num_output == num_output
    assert working[0].num_step_tokens + new.num_computed == len(new.token_ids)


def test_a_draft_shrinks_before_anybody_is_preempted() -> None:
    one, two = (sequence(name, prompt(15, start=start), max_tokens=20) for name, start in (("one", 0), ("two", 500)))
    scheduler = scheduler_of(limits(num_blocks=3, num_draft_tokens=6), one, two)
    finish_step(scheduler, scheduler.schedule())
    finish_step(scheduler, scheduler.schedule())
    assert len(one.token_ids) == 17
    scheduler.schedule()
    assert one.max_depth == 6
    assert two.max_depth == 0
    assert scheduler.num_preemptions == 0


def test_blocks_meant_for_a_draft_are_given_back_before_anybody_is_preempted() -> None:
    one, two = (sequence(name, prompt(14, start=start), max_tokens=20) for name, start in (("one", 0), ("two", 500)))
    scheduler = scheduler_of(limits(num_blocks=3, num_draft_tokens=6), one, two)
    finish_step(scheduler, scheduler.schedule())
    scheduler.schedule()
    assert (len(one.blocks), len(two.blocks)) == (2, 1)
    # The older one keeps to its block, the younger one grows into the next: the spare block moves.
    two.commit((7, 7), NO_DRAFT)
    scheduler.publish(two)
    scheduler.schedule()
    assert (len(one.blocks), len(two.blocks), one.max_depth) == (1, 2, 1)
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize("reuses_prefixes", [True, False])
def test_the_pass_that_ends_a_prompt_drafts_nothing(reuses_prefixes: bool) -> None:
    scheduler = scheduler_of(limits(reuses_prefixes=reuses_prefixes), sequence("first", prompt(17), max_tokens=2))
    for _ in range(2):
        finish_step(scheduler, scheduler.schedule())
    second = sequence("second", prompt(17), max_tokens=5)
    scheduler.enqueue(second)
    assert [one.max_depth for one in scheduler.schedule()] == [0]
    finish_step(scheduler, [second])
    assert [one.max_depth for one in scheduler.schedule()] == [3]


class Arrivals(msgspec.Struct):
    """Requests of a random run: (prompt, tokens to generate) each, and when each one arrives and leaves."""

    requests: list[tuple[list[int], int]]
    arrivals: list[int]
    cancelled: dict[int, int]


@st.composite
def arrivals(draw: st.DrawFn) -> Arrivals:
    number = draw(st.integers(1, 12))
    requests = []
    for _ in range(number):
        base = draw(st.integers(0, 2))
        length = draw(st.integers(1, 90))
        requests.append(([base] * min(length, 40) + [9] * max(length - 40, 0), draw(st.integers(1, 40))))
    steps = st.integers(0, 60)
    cancelled = draw(st.dictionaries(st.integers(0, number - 1), steps, max_size=3))
    return Arrivals(requests, sorted(draw(st.lists(steps, min_size=number, max_size=number))), cancelled)


@settings(max_examples=150, deadline=None)
@given(
    plan=arrivals(),
    num_blocks=st.integers(9, 30),
    step_tokens=st.sampled_from([1, 20, 512]),
    running=st.integers(1, 8),
    seed=st.integers(0, 100),
)
def test_every_request_ends_the_oldest_always_progresses_and_no_block_is_lost(
    plan: Arrivals, num_blocks: int, step_tokens: int, running: int, seed: int
) -> None:
    sizes = limits(num_blocks=num_blocks, max_step_tokens=step_tokens, max_running_requests=running)
    scheduler = Scheduler(sizes, max_context_tokens=CONTEXT)
    sequences = [sequence(str(n), ids, max_tokens=length) for n, (ids, length) in enumerate(plan.requests)]
    rng = random.Random(seed)
    step = 0
    while step <= 60 or scheduler.running or scheduler.num_waiting:
        for n, at in enumerate(plan.arrivals):
            if at == step:
                scheduler.enqueue(sequences[n])
        for n, at in plan.cancelled.items():
            if at == step:
                scheduler.cancel(str(n))
        scheduler.take_cancelled()
        before = [(one, one.num_computed, len(one.token_ids)) for one in scheduler.running[:1]]
        working = scheduler.schedule()
        check_tables(scheduler, working)
        assert sum(one.num_step_tokens for one in working) <= max(step_tokens, running * 5) + BLOCK_TOKENS
        finish_step(scheduler, working, num_accepted=rng.randrange(5))
        for one, num_computed, num_tokens in before:
            assert one.finish_reason or one.num_computed > num_computed or len(one.token_ids) > num_tokens
        step += 1
        assert step < 20_000
    assert scheduler.pool.num_free == num_blocks
    gone = {n for n, at in plan.cancelled.items() if at >= plan.arrivals[n]}
    for n, one in enumerate(sequences):
        assert n in gone or one.num_output == plan.requests[n][1]


def check_tables(scheduler: Scheduler, working: list[RunningSequence]) -> None:
    """Every position that this step writes has a block of its own sequence alone, which the table shows."""
    holders = Counter(block for one in scheduler.running for block in one.blocks)
    for one in working:
        last = one.num_computed + one.num_step_tokens + one.max_depth
        assert last <= len(one.blocks) * BLOCK_TOKENS
        assert scheduler.block_tables_BC[one.slot, : len(one.blocks)].tolist() == one.blocks
        for block in one.blocks[one.num_computed // BLOCK_TOKENS :]:
            assert holders[block] == 1
