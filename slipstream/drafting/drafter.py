"""What the engine asks of a drafter, whatever it drafts with, and what one that learns is told of every pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.drafting.tree import DraftTree
from slipstream.engine.plan import ExpertIds
from slipstream.engine.request import SamplingParams
from slipstream.versions import DEFAULT_DOMAIN


class DraftContext(msgspec.Struct, frozen=True):
    """A request that wants a draft: its slot, all its tokens so far, and how large a tree it can take.

    A tree has at most `max_nodes` nodes and is at most `max_depth` deep; both are at least 1. `tenant` says whose text
    it is, for drafters that keep tenants apart, `domain` which draft knows it best; `num_passes` is how many passes of
    the request were verified before this one.
    """

    slot: int
    token_ids: Sequence[int]
    sampling: SamplingParams
    max_nodes: int
    max_depth: int
    tenant: str = ""
    domain: str = DEFAULT_DOMAIN
    num_passes: int = 0


class StepLoad(msgspec.Struct, frozen=True):
    """The coming pass before anything is drafted for it.

    `num_rows` rows are computed in any case, that attend to `context_tokens` positions in the mean; `num_choosing`
    requests get their next token from it.
    """

    num_rows: int
    num_choosing: int
    context_tokens: float


class LearnedRequest(msgspec.Struct, frozen=True):
    """A request that got tokens in a pass, over `num_rows` of the lesson's rows.

    It has `num_tokens` tokens now; `output_ids` is its whole output if it ended there. Without `may_train` nothing of
    its text may be kept for other requests.
    """

    slot: int
    tenant: str
    may_train: bool
    num_rows: int
    num_tokens: int
    output_ids: Sequence[int] | None = None


class Lesson(msgspec.Struct, frozen=True):
    """What a pass of the target taught: X rows of logits, and the requests that got tokens from them.

    `row_ids_X` int32 is the token whose next one each row predicts, request by request; `logits_XV` fp32 is valid until
    the next pass. The pass was over `num_rows` rows, nodes among them, and took `seconds`; `expert_ids_TLK` are
    the experts that its rows chose, None for a dense target.
    """

    row_ids_X: NDArray[np.int32]
    logits_XV: Tensor
    requests: Sequence[LearnedRequest]
    num_rows: int
    seconds: float
    expert_ids_TLK: ExpertIds | None


class Drafter(Protocol):
    """Proposes trees for the requests of a batch; output does not depend on what it proposes."""

    @property
    def version(self) -> int:
        """The version of the weights it drafts with."""

    @property
    def digest(self) -> str:
        """Their digest."""

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        """One tree per context, in order; NO_DRAFT where it has nothing to propose.

        What became of the last trees shows in the tokens of the contexts.
        """

    def release(self, slot: int) -> None:
        """The sequence in this slot has left; another one may take the slot."""
