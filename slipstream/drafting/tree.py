"""The draft tree: what a drafter proposes for one request."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

ROOT = -1
"""Parent of the nodes that follow the last committed token."""


class DraftTree(msgspec.Struct, frozen=True, kw_only=True):
    """Candidate continuations of one request, X nodes.

    `token_ids[x]` is the candidate at node x, `parents[x]` the node before it or ROOT; parents come before their
    children. `version` is the draft version that made it, 0 for none.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    drafter: str
    version: int


NO_DRAFT = DraftTree(token_ids=(), parents=(), drafter="none", version=0)


def chain_tree(token_ids: Sequence[int], *, drafter: str, version: int) -> DraftTree:
    """The tree without branches that proposes these tokens one after another."""
    return DraftTree(
        token_ids=tuple(token_ids), parents=tuple(range(ROOT, len(token_ids) - 1)), drafter=drafter, version=version
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
