"""Token Recycling: candidates from what the target said the last time it saw a token.

Every verified position says which tokens are likely behind one token, whether its own token was accepted or not; most
drafters throw that away. Here it is kept, in a matrix of 8 candidates per token and their log-probabilities, from which
the next tree grows. Nothing is trained, and a replica drafts from its second step on.

Method: Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling"
(ACL 2025, arXiv 2408.08696). Ours beside theirs: log-probabilities are kept, so that the tree grows where it is likely
to be accepted, and at a temperature it grows along the request's own noise (`slipstream_kernels.recycling`). Tokens
never seen are drafted with what was seen last behind them, as long as a tree has room: that fills their rows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.drafting.drafter import DraftContext
from slipstream.drafting.recycling_artifact import StoredMatrix, save_matrix
from slipstream.drafting.tree import DraftTree, trees_of
from slipstream.engine.sampling import draft_rows
from slipstream.versions import NO_VERSION
from slipstream_kernels.adjacency import Adjacency, empty_adjacency, remember, remember_logits, vocab_size_of
from slipstream_kernels.recycling import DEFAULT_RULE, NO_PARENT, Grown, GrowthRule, Template, grow

TreeShape = Literal["best_first", "template"]

# Children of each node of the paper's tree, breadth first; they always have the lowest ranks. 8, 21, 25, 15, 8 and 3
# nodes at depths 1 to 6. The further up in rank a node is, the deeper the tree behind it.
_NUM_CHILDREN = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)


class RecyclingDrafter:
    """Drafts from an adjacency matrix and fills it from every verification; the engine's thread calls it.

    One matrix serves all requests unless `max_tenants` says how many tenants may have one of their own: a shared one
    carries what one user's text looks like into another's drafts, which changes no output but shows in its timing. A
    tenant begins with `start`, and the one unused for longest makes room. `version` and `digest` name `start`;
    NO_VERSION and "" if the matrix began empty.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        start: StoredMatrix | None = None,
        version: int = NO_VERSION,
        shape: TreeShape = "best_first",
        rule: GrowthRule = DEFAULT_RULE,
        max_tenants: int | None = None,
    ) -> None:
        if start is not None and vocab_size_of(start.matrix) != vocab_size:
            raise ValueError(f"the matrix to start from knows {vocab_size_of(start.matrix)} tokens, not {vocab_size}")
        if max_tenants is not None and max_tenants < 1:
            raise ValueError(f"max_tenants is {max_tenants}; expected at least 1, or None for one shared matrix")
        self.version = version
        self.digest = start.digest if start else ""
        self._template = paper_template() if shape == "template" else None
        self._rule = rule
        self._max_tenants = max_tenants
        # The matrix of all requests; with tenants the one that each begins with, which is only read then.
        self._first = _copy(start.matrix) if start else empty_adjacency(vocab_size)
        self._of_tenant: OrderedDict[str, Adjacency] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Memory of all matrices: 32 bytes per token of the vocabulary, 48 if there are more than 65,536."""
        return (1 + len(self._of_tenant)) * sum(array.nbytes for array in self._first)

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        """One tree per context, in order; NO_DRAFT as long as nothing was observed."""
        grown = self.grow(contexts)
        versions = [self.version] * len(contexts)
        return trees_of(grown.token_ids_X, grown.parents_X, grown.ends_B, drafter="recycling", versions=versions)

    def grow(self, contexts: Sequence[DraftContext]) -> Grown:
        """The trees of `propose` with their scores, one call for all contexts."""
        matrices, places = self.matrices_of([context.tenant for context in contexts])
        limits = [
            (place, one.token_ids[-1], one.max_nodes, one.max_depth)
            for place, one in zip(places, contexts, strict=True)
        ]
        return grow(
            matrices,
            draft_rows([one.sampling for one in contexts], [len(one.token_ids) for one in contexts]),
            np.array(limits, np.int32).reshape(-1, 4),
            rule=self._rule,
            template=self._template,
        )

    def matrices_of(self, tenants: Sequence[str]) -> tuple[list[Adjacency], list[int]]:
        """The matrices that requests of these tenants draft from, and which of them each one's is."""
        matrices = [self._first]
        if self._max_tenants is None:
            return matrices, [0] * len(tenants)
        places: dict[str, int] = {}
        for tenant in dict.fromkeys(tenants):
            places[tenant] = len(matrices)
            matrices.append(self._known(tenant))
        return matrices, [places[tenant] for tenant in tenants]

    def observe(
        self,
        token_ids_T: NDArray[np.int32],
        top_ids_TN: NDArray[np.int32],
        top_logprobs_TN: NDArray[Any],
        *,
        tenant: str = "",
    ) -> None:
        """Take over what the target said at T rows: each row's own token, and the N tokens most likely behind it.

        Give all rows: of the root, of accepted and rejected nodes, and of prompts. Where a token comes twice its last
        row stays, so rows in the order of their positions leave the latest; how they are divided among calls makes no
        difference. Raises ValueError, with nothing taken over, if anything is no token of the vocabulary.
        """
        with self._lock:  # a snapshot holds whole rows
            remember(self._to_write(tenant), token_ids_T, top_ids_TN, top_logprobs_TN)

    def observe_logits(self, token_ids_T: NDArray[np.int32], logits_TV: Tensor, *, tenant: str = "") -> None:
        """`observe` what the target's own logits, fp32, say at T rows."""
        with self._lock:
            remember_logits(self._to_write(tenant), token_ids_T, logits_TV)

    def release(self, slot: int) -> None:
        """Nothing is kept of a sequence."""

    def snapshot(self, directory: Path) -> str:
        """Write the matrix as an artifact for other replicas to start from; its digest. From any thread.

        Raises ValueError where tenants have their own: what is theirs does not leave the process.
        """
        if self._max_tenants is not None:
            raise ValueError("tenants have matrices of their own, which are not published; share one to take snapshots")
        with self._lock:
            matrix = _copy(self._first)
        return save_matrix(directory, matrix)

    def _to_write(self, tenant: str) -> Adjacency:
        return self._first if self._max_tenants is None else self._own(tenant, num_kept=self._max_tenants)

    def _known(self, tenant: str) -> Adjacency:
        """What to draft from for a tenant, which counts as use."""
        if tenant not in self._of_tenant:
            return self._first
        self._of_tenant.move_to_end(tenant)
        return self._of_tenant[tenant]

    def _own(self, tenant: str, *, num_kept: int) -> Adjacency:
        """A tenant's matrix to write to; the one unused for longest goes if there are more than `num_kept`."""
        if tenant not in self._of_tenant:
            self._of_tenant[tenant] = _copy(self._first)
            if len(self._of_tenant) > num_kept:
                self._of_tenant.popitem(last=False)
        self._of_tenant.move_to_end(tenant)
        return self._of_tenant[tenant]


def paper_template() -> Template:
    """The paper's tree of 80 nodes, breadth first."""
    parents: list[int] = []
    ranks: list[int] = []
    depths: list[int] = []
    for depth, numbers in enumerate(_NUM_CHILDREN, start=1):
        first = len(parents) - len(numbers) if depth > 1 else NO_PARENT
        for parent, number in enumerate(numbers, start=first):
            parents += [parent] * number
            ranks += range(number)
            depths += [depth] * number
    return Template(np.array(parents, np.int32), np.array(ranks, np.int32), np.array(depths, np.int32))


def _copy(matrix: Adjacency) -> Adjacency:
    return Adjacency(matrix.ids_VN.copy(), matrix.logprobs_VN.copy())
