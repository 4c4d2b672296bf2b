"""The equality rule: a child is accepted if and only if it equals the target's own token at its parent.

Every emitted token is then the target's own, so output is the same for any tree, and for none (proof: induction along
the path; Daliri et al., arXiv 2408.07978, for a single draft).
"""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.drafting.tree import ROOT, DraftTree
from slipstream.verification.chance import Chance, Purpose, Row
from slipstream.verification.rule import ScoredTree, Verification


def verify(tree: DraftTree, chosen_ids: Sequence[int]) -> Verification:
    """Walk the tree with the target's choices.

    `chosen_ids` has X + 1 entries: the token chosen at the root, then the one chosen at each node.
    """
    assert len(chosen_ids) == len(tree.token_ids) + 1
    children = _children(tree)
    path: list[int] = []
    tokens = [chosen_ids[0]]
    node = children.get((ROOT, chosen_ids[0]))
    while node is not None:
        path.append(node)
        tokens.append(chosen_ids[node + 1])
        node = children.get((node, tokens[-1]))
    return Verification(path=tuple(path), token_ids=tuple(tokens))


def equality(scored: ScoredTree[Row], chance: Chance) -> Verification:
    """`verify`, with the target's choices drawn from its probabilities where the path goes; reads no draft's."""
    children = _children(scored.tree)
    path: list[int] = []
    tokens: list[int] = []
    node: int | None = ROOT
    while node is not None:
        target_probs_V = scored.target_probs_XV[node + 1]
        tokens.append(chance.draws(target_probs_V, depth=len(path), purpose=Purpose.TARGET))
        node = children.get((node, tokens[-1]))
        if node is not None:
            path.append(node)
    return Verification(path=tuple(path), token_ids=tuple(tokens))


def _children(tree: DraftTree) -> dict[tuple[int, int], int]:
    return {
        (parent, token): node for node, (parent, token) in enumerate(zip(tree.parents, tree.token_ids, strict=True))
    }
