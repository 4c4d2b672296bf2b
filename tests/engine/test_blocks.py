"""Blocks are never given out twice, never lost, and found only by exactly the prefix that they hold."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slipstream.engine.blocks import BlockPool, PrefixKey, blocks_for, prefix_key
from slipstream.engine.plan import BLOCK_TOKENS


def ids(token: int) -> tuple[int, ...]:
    return (token,) * BLOCK_TOKENS


def published_path(pool: BlockPool, root: str, tokens: list[int]) -> list[int]:
    """Blocks that hold the prefix of these blocks, computed and published by one holder."""
    table: list[int] = []
    for token in tokens:
        block = pool.allocate()
        assert block is not None
        table.append(pool.publish(block, prefix_key(table[-1] if table else root, ids(token))))
    return table


def found_path(pool: BlockPool, root: str, tokens: list[int]) -> list[int]:
    table: list[int] = []
    for token in tokens:
        block = pool.find(prefix_key(table[-1] if table else root, ids(token)))
        if block is None:
            break
        table.append(block)
    return table


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_are_rounded_up(num_tokens: int, num_blocks: int) -> None:
    assert blocks_for(num_tokens) == num_blocks


def test_a_released_prefix_is_found_again_until_its_blocks_are_needed() -> None:
    pool = BlockPool(3)
    table = published_path(pool, "anonymous", [7, 8, 9])
    pool.release(table)
    assert pool.num_free == 3
    assert found_path(pool, "anonymous", [7, 8, 5]) == table[:2]
    pool.release(table[:2])
    assert pool.allocate() == table[2]
    assert found_path(pool, "anonymous", [7, 8, 9]) == table[:2]


def test_a_prefix_of_one_tenant_is_not_found_by_another() -> None:
    pool = BlockPool(2)
    pool.release(published_path(pool, "one", [7]))
    assert found_path(pool, "two", [7]) == []
    assert len(found_path(pool, "one", [7])) == 1


def test_the_same_ids_after_another_prefix_are_another_block() -> None:
    pool = BlockPool(4)
    published_path(pool, "one", [7, 8])
    assert len(found_path(pool, "one", [7, 8])) == 2
    assert found_path(pool, "one", [8]) == []


def test_children_are_evicted_before_parents_and_the_least_recently_used_first() -> None:
    pool = BlockPool(4)
    old = published_path(pool, "one", [1, 2])
    new = published_path(pool, "one", [3, 4])
    pool.release(old)
    pool.release(new)
    assert [pool.allocate() for _ in range(4)] == [old[1], old[0], new[1], new[0]]
    assert pool.allocate() is None


def test_two_who_computed_the_same_block_share_the_first_one() -> None:
    pool = BlockPool(4)
    first = published_path(pool, "one", [1, 2])
    second = published_path(pool, "one", [1, 2])
    assert second == first
    assert pool.num_free == 2
    pool.release(first)
    assert pool.num_free == 2
    pool.release(second)
    assert pool.num_free == 4


def test_a_block_without_a_holder_cannot_be_released() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    assert block is not None
    pool.release([block])
    with pytest.raises(AssertionError, match="no holder"):
        pool.release([block])


class Pool(RuleBasedStateMachine):
    """Sequences over a tiny alphabet that find, compute, publish and give back; `contents` knows what blocks hold."""

    @initialize(num_blocks=st.integers(1, 8))
    def make(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.sequences: list[tuple[str, list[int], list[int], int]] = []  # root, tokens, table, published
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}

    @rule(root=st.sampled_from(["one", "two"]), tokens=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def join(self, root: str, tokens: list[int]) -> None:
        table = found_path(self.pool, root, tokens)
        for place, block in enumerate(table):
            assert self.contents[block] == (root, tuple(tokens[: place + 1]))
        self.sequences.append((root, tokens, table, len(table)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.sequences) - 1))
        root, tokens, table, published = self.sequences[number]
        if len(table) == len(tokens):
            return
        held = {block for _, _, other, _ in self.sequences for block in other}
        block = self.pool.allocate()
        if block is None:
            assert len(held) == self.pool.num_blocks
            return
        assert block not in held
        self.contents[block] = (root, tuple(tokens[: len(table) + 1]))
        self.sequences[number] = (root, tokens, [*table, block], published)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.sequences) - 1))
        root, tokens, table, published = self.sequences[number]
        if published < len(table):
            key: PrefixKey = prefix_key(table[published - 1] if published else root, ids(tokens[published]))
            table[published] = self.pool.publish(table[published], key)
            self.sequences[number] = (root, tokens, table, published + 1)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(number)[2])

    @invariant()
    def nothing_is_lost_or_held_twice_by_accident(self) -> None:
        held = {block for _, _, table, _ in self.sequences for block in table}
        assert self.pool.num_free == self.pool.num_blocks - len(held)
        for root, tokens, table, _ in self.sequences:
            for place, block in enumerate(table):
                assert self.contents[block] == (root, tuple(tokens[: place + 1]))

    def teardown(self) -> None:
        for _, _, table, _ in getattr(self, "sequences", []):
            self.pool.release(table)
        if hasattr(self, "pool"):
            assert self.pool.num_free == self.pool.num_blocks
            blocks = [self.pool.allocate() for _ in range(self.pool.num_blocks)]
            assert sorted(block for block in blocks if block is not None) == list(range(self.pool.num_blocks))
            assert not self.pool.is_published(prefix_key("one", ids(0)))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
