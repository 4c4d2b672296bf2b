"""The blocks of the K/V cache: who holds which, and which hold a prefix that another request may take.

    free    nothing in it that anybody could ask for
    held    in the tables of one or more sequences: its count says how many
    kept    in no table, but its prefix can still be found; evicted when blocks are short, least recently used first

A full block is published under (the block before it, its token ids), the first of a sequence under (root, its token
ids). So a path of the index is a prefix, compared by value and never by a bare hash. The root is the tenant: one
tenant's prompts must not speed up another's, since that would show in the timing. Whoever holds a published block
holds the one before it, and a sequence gives its blocks back from the last to the first; so children are evicted before
parents, and the number of a block names its prefix for as long as it is published.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from slipstream.engine.plan import BLOCK_TOKENS

PrefixKey = tuple[str | int, bytes]
"""(root or block before, token ids of one full block)."""


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold this many positions."""
    return -(-num_tokens // BLOCK_TOKENS)


def prefix_key(before: str | int, token_ids: Sequence[int]) -> PrefixKey:
    """The key of a full block with these token ids that follows `before`: a tenant, or a published block."""
    assert len(token_ids) == BLOCK_TOKENS
    # Bytes, since their hash is keyed by the process: nobody can choose prompts whose keys collide.
    return before, array("i", token_ids).tobytes()


class BlockPool:
    """A fixed number of blocks with counts of their holders; every operation costs the same however many there are."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._counts = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._index: dict[PrefixKey, int] = {}
        self._keys: list[PrefixKey | None] = [None] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give out: the free and the kept ones."""
        return len(self._free) + len(self._kept)

    def allocate(self) -> int | None:
        """A block for one holder, the least recently used kept one if none is free; None if all are held."""
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            key = self._keys[block]
            assert key is not None
            del self._index[key]
            self._keys[block] = None
        else:
            return None
        self._counts[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Take a holder off each of these blocks, which stand in the order of their positions."""
        for block in reversed(blocks):
            assert self._counts[block] > 0, f"block {block} has no holder"
            self._counts[block] -= 1
            if self._counts[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def find(self, key: PrefixKey) -> int | None:
        """The block published under this key, with one more holder; None if there is none."""
        block = self._index.get(key)
        if block is not None:
            self._kept.pop(block, None)
            self._counts[block] += 1
        return block

    def is_published(self, key: PrefixKey) -> bool:
        """Whether `find` would find a block."""
        return key in self._index

    def publish(self, block: int, key: PrefixKey) -> int:
        """Let others find a held block, whose positions are all computed and committed, under this key.

        Returns the block to stand in the holder's table: if another one is published under the key, that one, which
        it holds from now on instead of its own. So there is one block per prefix, and one path to each.
        """
        assert self._counts[block] == 1
        assert self._keys[block] is None
        found = self.find(key)
        if found is not None:
            self.release([block])
            return found
        self._index[key] = block
        self._keys[block] = key
        return block
