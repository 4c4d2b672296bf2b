"""What a verification rule gets and gives."""

from __future__ import annotations

from typing import Any, Generic, Protocol

import msgspec

from slipstream.drafting.tree import ROOT, DraftTree, checked
from slipstream.verification.chance import Chance, Row

_SUM_TOLERANCE = 1e-6


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """`path` holds the accepted nodes from the root down, `token_ids` their tokens and the bonus."""

    path: tuple[int, ...]
    token_ids: tuple[int, ...]


class ScoredTree(msgspec.Struct, Generic[Row], frozen=True, kw_only=True):
    """A tree and the distributions around it; siblings stand in the order in which they were drawn.

    `target_probs_XV` [1 + X, V]: what the target gives the next token behind the root and behind each node, after
    temperature, penalties and filters. `draft_probs_PV` [P, V]: what the children of each of `drafting_nodes(tree)`
    were drawn from, exactly: same temperature, same filters. Rows sum to one; they are float64 tensors of any device,
    or arrays, of fractions too. A rule that needs no draft probabilities does not read them.
    """

    tree: DraftTree
    target_probs_XV: Row
    draft_probs_PV: Row


class VerificationRule(Protocol):
    """Decides how far a tree is accepted and which token follows."""

    def __call__(self, scored: ScoredTree[Row], chance: Chance, /) -> Verification:
        """The accepted path and the bonus token; inputs are not changed.

        Raises ValueError if the tree is none, or not of the rule's kind, or probabilities are not what `ScoredTree`
        says.
        """


def drafting_nodes(tree: DraftTree) -> list[int]:
    """The nodes that have children, ROOT first, in the order of the rows of `ScoredTree.draft_probs_PV`."""
    return sorted(set(tree.parents))


def check(scored: ScoredTree[Row]) -> None:
    """Raise ValueError if there is not one row of the same vocabulary for each that a rejection rule needs."""
    num_target, num_draft = len(scored.target_probs_XV), len(scored.draft_probs_PV)
    expected = 1 + len(scored.tree.token_ids), len(drafting_nodes(scored.tree))
    if (num_target, num_draft) != expected:
        raise ValueError(
            f"{num_target} rows of target and {num_draft} of draft probabilities; "
            f"the tree needs {expected[0]} (root and nodes) and {expected[1]} (nodes with children)"
        )
    vocab_size = scored.target_probs_XV.shape[1]
    if num_draft and scored.draft_probs_PV.shape[1] != vocab_size:
        raise ValueError(
            f"the draft's vocabulary has {scored.draft_probs_PV.shape[1]} tokens, the target's {vocab_size}; "
            "draft with a model of the target's vocabulary"
        )
    checked(scored.tree, vocab_size=vocab_size)


def distribution(probs_V: Row, *, of: str, node: int) -> Row:
    """The row itself, if it is a distribution; ValueError if not (a NaN included)."""
    total: Any = probs_V.sum()
    if probs_V.min() >= 0 and abs(total - 1) <= _SUM_TOLERANCE:
        return probs_V
    place = "root" if node == ROOT else f"node {node}"
    raise ValueError(
        f"{of} probabilities behind the {place} sum to {float(total)}, the smallest is {float(probs_V.min())}; "
        "expected a distribution: decode this request without a draft"
    )
