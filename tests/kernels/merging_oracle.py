"""Merged growth in plain Python, node by node: what the compiled one is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream.drafting.merged_survival import NUM_SOURCES, MergedSurvival
from slipstream.drafting.survival import NodeFeatures, SurvivalModel
from slipstream_kernels.adjacency import Adjacency
from slipstream_kernels.recycling import DEFAULT_RULE, candidates_reference

Float64 = NDArray[np.float64]

MATCHING = ("lookup", "pool")
SOURCES = {"chain": 0, "recycling": 1, "lookup": 2, "pool": 2}


class Continued(NamedTuple):
    """What a look-up found: the tokens that follow, going round if it is a loop."""

    drafter: str
    token_ids: Sequence[int]
    is_loop: bool
    match_length: int

    def token(self, depth: int) -> int | None:
        """The token behind `depth` tokens."""
        if self.is_loop:
            return self.token_ids[depth % len(self.token_ids)]
        return self.token_ids[depth] if depth < len(self.token_ids) else None


class Proposed(NamedTuple):
    """A drafter's candidate behind a node."""

    drafter: str
    token: int
    rank: int
    depth: int
    score: float
    match_length: int


class Node(NamedTuple):
    """A node of the grown tree; `path` are the tokens down to it."""

    path: tuple[int, ...]
    parent: int
    survival: float


class Request(NamedTuple):
    """What one tree is grown from; a place of the chain holds its choices, best first."""

    root: int
    chain: Sequence[Sequence[tuple[int, float]]]
    continued: Sequence[Continued]
    matrix: Adjacency | None
    draw: Any
    max_nodes: int
    max_depth: int
    stop_ids: Sequence[int] = ()


class Models(NamedTuple):
    """What candidates survive: by their drafters, and beside each other."""

    alone: SurvivalModel
    together: MergedSurvival


def survival_of(model: SurvivalModel, one: Proposed) -> float:
    """What the model says of a candidate."""
    numbers = [np.array([number], np.int32) for number in (one.rank, one.depth, one.match_length)]
    features = NodeFeatures(*numbers)
    if one.drafter in MATCHING:
        return float(model.forecast(one.drafter, features)[0])
    return float(model.read(one.drafter, features, np.array([one.score]))[0])


def proposals(request: Request, path: tuple[int, ...]) -> list[Proposed]:
    """All candidates behind a path, drafter by drafter."""
    depth = len(path)
    found: list[Proposed] = []
    drafted = tuple(choices[0][0] for choices in request.chain)
    if depth < len(drafted) and drafted[:depth] == path:
        for rank, (token, score) in enumerate(request.chain[depth]):
            found.append(Proposed("chain", token, rank, depth + 1, score, 0))
    for drafter in MATCHING:
        seen: list[int] = []
        for one in request.continued:
            agrees = one.drafter == drafter and all(one.token(at) == token for at, token in enumerate(path))
            token = one.token(depth) if agrees else None
            if token is not None and token not in seen:
                found.append(Proposed(drafter, token, len(seen), depth + 1, 0.0, one.match_length))
                seen.append(token)
    if request.matrix is not None:
        last = path[-1] if path else request.root
        candidates = candidates_reference(request.matrix, request.draw, DEFAULT_RULE, last, depth, 0.0)
        ordered = sorted((pair for pair in candidates if pair[1] > -np.inf), key=lambda pair: -pair[1])
        found += [
            Proposed("recycling", token, rank, depth + 1, float(np.exp(score)), 0)
            for rank, (token, score) in enumerate(ordered)
        ]
    return found


def meetings(model: SurvivalModel, found: Sequence[Proposed]) -> tuple[list[int], Float64]:
    """The tokens proposed behind one node, and what every source says of each: `MergedSurvival.shares`."""
    tokens = list(dict.fromkeys(one.token for one in found))
    survivals_CO = np.full((len(tokens), NUM_SOURCES), np.nan)
    for one in found:
        place = tokens.index(one.token), SOURCES[one.drafter]
        survivals_CO[place] = np.fmax(survivals_CO[place], survival_of(model, one))
    return tokens, survivals_CO


def grown(models: Models, request: Request, *, min_survival: float = 0.0) -> list[Node]:
    """The nodes in the order in which they join the tree."""
    nodes: list[Node] = []
    open_nodes: list[tuple[float, int, Node]] = []
    num_found = 0
    newest = Node((), -1, 1.0)
    while True:
        if len(newest.path) < request.max_depth:
            tokens, survivals_CO = meetings(models.alone, proposals(request, newest.path))
            for token, share in zip(tokens, models.together.shares(survivals_CO).tolist(), strict=True):
                num_found += 1
                if token not in request.stop_ids:
                    node = Node((*newest.path, token), len(nodes) - 1, newest.survival * share)
                    open_nodes.append((-node.survival, num_found, node))
        if not open_nodes or len(nodes) == request.max_nodes:
            return nodes
        best = min(open_nodes)
        open_nodes.remove(best)
        newest = best[2]
        if newest.survival < min_survival:
            return nodes
        nodes.append(newest)
