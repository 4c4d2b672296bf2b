"""The draft tree: what a drafter proposes for one request."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

ROOT = -1
"""Parent of the nodes that follow the last committed token."""


class DraftTree(msgspec.Struct, frozen=True, kw_only=True):
    """Candidate continuations of one request, X nodes.

    `token_ids[x]` is the candidate at node x, `parents[x]` the node before it or ROOT; parents come before their
    children. `version` is the draft version that made it, 0 for none.

    `draft_probs_PV` float64 is what a rejection rule needs: the distribution that the children of each of
    `drafting_nodes` were drawn from, exactly; siblings then stand in the order of their draws. None: nothing is
    promised of how candidates were found, and the tree is verified by equality. Trees that have it do not compare.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    drafter: str
    version: int
    draft_probs_PV: Tensor | None = None


NO_DRAFT = DraftTree(token_ids=(), parents=(), drafter="none", version=0)


def chain_tree(token_ids: Sequence[int], *, drafter: str, version: int) -> DraftTree:
    """The tree without branches that proposes these tokens one after another."""
    return DraftTree(
        token_ids=tuple(token_ids), parents=tuple(range(ROOT, len(token_ids) - 1)), drafter=drafter, version=version
    )


def trees_of(
    token_ids_X: NDArray[np.int32],
    parents_X: NDArray[np.int32],
    ends_B: NDArray[np.int32],
    *,
    drafter: str,
    versions: Sequence[int],
) -> list[DraftTree]:
    """The trees that lie one behind the other, that of request b before node `ends_B[b]`; NO_DRAFT for one of no nodes.

    Parents are counted within each tree; `versions` has one for each.
    """
    tokens, parents, ends = token_ids_X.tolist(), parents_X.tolist(), ends_B.tolist()
    return [
        DraftTree(
            token_ids=tuple(tokens[start:end]), parents=tuple(parents[start:end]), drafter=drafter, version=version
        )
        if start < end
        else NO_DRAFT
        for (start, end), version in zip(pairwise([0, *ends]), versions, strict=True)
    ]


def drafting_nodes(tree: DraftTree) -> list[int]:
    """The nodes that have children, ROOT first, in the order of the rows of `draft_probs_PV`."""
    return sorted(set(tree.parents))


def part_of(tree: DraftTree, nodes: Sequence[int]) -> DraftTree:
    """The tree of these of its nodes, in rising order, with each one's parent among them."""
    place_of = {ROOT: ROOT} | {node: place for place, node in enumerate(nodes)}
    probs_PV = tree.draft_probs_PV
    if probs_PV is not None:
        left = {tree.parents[node] for node in nodes}
        probs_PV = probs_PV[[row for row, node in enumerate(drafting_nodes(tree)) if node in left]]
    return DraftTree(
        token_ids=tuple(tree.token_ids[node] for node in nodes),
        parents=tuple(place_of[tree.parents[node]] for node in nodes),
        drafter=tree.drafter,
        version=tree.version,
        draft_probs_PV=probs_PV,
    )


def depths(tree: DraftTree) -> list[int]:
    """How many nodes lie on the path from the root to each node, itself included: 1 for the root's children."""
    depth_of: list[int] = []
    for parent in tree.parents:
        depth_of.append(1 if parent == ROOT else depth_of[parent] + 1)
    return depth_of


def checked(tree: DraftTree, *, vocab_size: int) -> DraftTree:
    """The tree, if it is one that can be verified.

    Raises ValueError if a parent does not come before its child, two siblings are equal, or a token is not in the
    vocabulary.
    """
    if len(tree.token_ids) != len(tree.parents):
        raise ValueError(f"tree has {len(tree.token_ids)} tokens and {len(tree.parents)} parents; give one each")
    siblings = set()
    for node, edge in enumerate(zip(tree.parents, tree.token_ids, strict=True)):
        parent, token = edge
        if not ROOT <= parent < node:
            raise ValueError(f"node {node} has parent {parent}; expected {ROOT} <= parent < {node}: order by depth")
        if not 0 <= token < vocab_size:
            raise ValueError(f"node {node} has token {token}; the vocabulary is 0..{vocab_size - 1}")
        if edge in siblings:
            raise ValueError(f"node {node} repeats token {token} under parent {parent}; merge equal siblings")
        siblings.add(edge)
    return tree
