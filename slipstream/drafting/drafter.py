"""What the engine asks of a drafter, whatever it drafts with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from slipstream.drafting.tree import DraftTree
from slipstream.engine.request import SamplingParams


class DraftContext(msgspec.Struct, frozen=True):
    """A request that wants a draft: its slot, all its tokens so far, and how large a tree it can take.

    A tree has at most `max_nodes` nodes and is at most `max_depth` deep; both are at least 1. `tenant` says whose text
    it is, for drafters that keep tenants apart. `num_passes` of this request were verified before: what a drafter draws
    for a rejection rule is keyed by it (`verification.chance`).
    """

    slot: int
    token_ids: Sequence[int]
    sampling: SamplingParams
    max_nodes: int
    max_depth: int
    tenant: str = ""
    num_passes: int = 0


class Drafter(Protocol):
    """Proposes trees for the requests of a batch; output does not depend on what it proposes.

    `version` and `digest` name the weights it drafts with.
    """

    version: int
    digest: str

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        """One tree per context, in order; NO_DRAFT where it has nothing to propose."""

    def committed(self, slot: int, *, num_tokens: int) -> None:
        """The sequence in this slot now has `num_tokens` tokens, and what was proposed beyond them was wrong."""

    def release(self, slot: int) -> None:
        """The sequence in this slot has left; another one may take the slot."""
