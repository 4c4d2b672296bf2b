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
