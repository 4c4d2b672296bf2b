"""Drafters for tests: trees of every awkward shape, some of which know what the target is going to say."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from slipstream.drafting.drafter import DraftContext
from slipstream.drafting.tree import ROOT, DraftTree

Future = Sequence[int]
"""The tokens that the target will choose next, as far as they are known."""

Shape = Callable[[random.Random, Future, DraftContext], list[tuple[int, int]]]
"""Nodes as (parent, token), parents first."""

VOCAB_SIZE = 4096


def wrong(rng: random.Random, future: Future, depth: int) -> int:
    """A token that the target will not choose at this depth below the root (1 for its children)."""
    token = rng.randrange(VOCAB_SIZE)
    right = future[depth - 1] if depth <= len(future) else -1
    return token if token != right else (token + 1) % VOCAB_SIZE


def deep(rng: random.Random, future: Future, context: DraftContext) -> list[tuple[int, int]]:
    """A chain that is right for a while."""
    length = min(context.max_nodes, context.max_depth)
    num_right = rng.randrange(length + 1)
    return [
        (depth - 2, future[depth - 1] if depth <= min(num_right, len(future)) else wrong(rng, future, depth))
        for depth in range(1, length + 1)
    ]


def all_wrong(rng: random.Random, future: Future, context: DraftContext) -> list[tuple[int, int]]:
    """A tree of which nothing can be accepted."""
    return [(ROOT, wrong(rng, future, 1)) for _ in range(context.max_nodes)]


def hidden_path(rng: random.Random, future: Future, context: DraftContext) -> list[tuple[int, int]]:
    """The right path, a wrong sibling before or behind each of its nodes, which has children that look right."""
    nodes: list[tuple[int, int]] = []
    parent = ROOT
    for depth in range(1, min(len(future), context.max_depth) + 1):
        if len(nodes) + 3 > context.max_nodes:
            break
        decoy, right = (parent, wrong(rng, future, depth)), (parent, future[depth - 1])
        first, second = (decoy, right) if rng.random() < 0.5 else (right, decoy)
        nodes += [first, second]
        place = len(nodes) - 2 + (first is decoy)
        if depth < min(len(future), context.max_depth):
            nodes.append((len(nodes) - 2 + (second is decoy), future[depth]))  # right at its depth, behind a wrong one
        parent = place
    return nodes


def anything(rng: random.Random, future: Future, context: DraftContext) -> list[tuple[int, int]]:
    """A random tree over few tokens, right ones among them: the same token at many depths, equal siblings too."""
    nodes: list[tuple[int, int]] = []
    depths: list[int] = []
    for _ in range(rng.randrange(context.max_nodes + 1)):
        parents = [ROOT, *(node for node, depth in enumerate(depths) if depth < context.max_depth)]
        parent = rng.choice(parents)
        depth = 1 if parent == ROOT else depths[parent] + 1
        pool = [*future[: context.max_depth], *future[depth - 1 : depth] * 4, rng.randrange(VOCAB_SIZE)]
        nodes.append((parent, rng.choice(pool)))
        depths.append(depth)
    return nodes


class TreeDrafter:
    """Proposes trees of one shape; `futures` holds all tokens of a request, prompt included, under its seed."""

    version = 1
    digest = "test"

    def __init__(self, shape: Shape, futures: dict[int, Sequence[int]], *, seed: int = 0) -> None:
        self._shape = shape
        self._futures = futures
        self._rng = random.Random(seed)
        self.num_proposed = 0

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        trees = []
        for context in contexts:
            future = list(self._futures.get(context.sampling.seed, ()))[len(context.token_ids) :]
            nodes = self._shape(self._rng, future, context)
            assert len(nodes) <= context.max_nodes
            self.num_proposed += len(nodes)
            parents, tokens = tuple(parent for parent, _ in nodes), tuple(token for _, token in nodes)
            trees.append(DraftTree(token_ids=tokens, parents=parents, drafter="test", version=self.version))
        return trees

    def release(self, slot: int) -> None:
        pass
