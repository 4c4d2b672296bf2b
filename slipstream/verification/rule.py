"""What a verification rule gets and gives."""

from __future__ import annotations

from typing import Any, Generic, Protocol

import msgspec

from slipstream.drafting.tree import ROOT, DraftTree, checked, drafting_nodes
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


def sound_nodes(tree: DraftTree, *, vocab_size: int) -> list[int]:
    """The nodes that a rejection rule can trust: all of them, unless some were drawn from no distribution.

    Where a row of `draft_probs_PV` is none (NaN, negative, a wrong sum) the children of its node go, with what is below
    them. The node itself stays: whether its row is sound depends on the path to it, and leaving out what was already
    drawn would bias the tokens. Rows of another number or vocabulary than the tree's leave nothing.
    """
    drafting, probs_PV = drafting_nodes(tree), tree.draft_probs_PV
    if probs_PV is None or probs_PV.shape != (len(drafting), vocab_size):
        return []
    is_sound_P = (probs_PV >= 0).all(dim=1) & ((probs_PV.sum(dim=1) - 1).abs() <= _SUM_TOLERANCE)
    if bool(is_sound_P.all()):
        return list(range(len(tree.token_ids)))
    sound = {node for node, is_sound in zip(drafting, is_sound_P.tolist(), strict=True) if is_sound}
    kept: set[int] = {ROOT}
    for node, parent in enumerate(tree.parents):
        if parent in kept and parent in sound:
            kept.add(node)
    return sorted(kept - {ROOT})


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
