"""Recursive rejection sampling without replacement: the rule of Recursive Speculative Decoding.

Jeon et al., arXiv 2402.14160; the same step is in Sequoia (Chen et al., arXiv 2402.12374). At a node, with target t and
draft d, siblings are tried in the order of their draws:

    accept x with probability min(1, t(x) / d(x)), and go on below it
    else   t <- Norm[(t - d)+]     what the target still has to give
           d <- Norm[d without x]  what the next sibling was drawn from

After the last rejection the bonus token is drawn from what is left of t; behind an accepted leaf, from the target.

Why it is exact: claim, by induction from the last sibling back, that if x is a draw from d given the past, then the
token emitted from here on is a draw from t. Acceptance emits z with mass min(t, d)(z). Rejection has mass
sum((d - t)+) = sum((t - d)+), and the rest then emits Norm[(t - d)+], which does not depend on the x rejected. The sum
is min(t, d)(z) + (t - d)+(z) = t(z). Below an accepted child the same argument holds anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slipstream.drafting.tree import ROOT, drafting_nodes
from slipstream.verification.chance import Chance, Purpose, Row
from slipstream.verification.rule import ScoredTree, Verification, check, distribution


def recursive_rejection(scored: ScoredTree[Row], chance: Chance) -> Verification:
    """Accept a path of sampled siblings; see the module for the rule.

    A sibling to which the draft gives no probability was not drawn: it is passed over as if it were absent.
    """
    check(scored)
    draft_rows = {node: row for row, node in enumerate(drafting_nodes(scored.tree))}
    path: list[int] = []
    node = ROOT
    while True:
        left_V = distribution(scored.target_probs_XV[node + 1], of="target", node=node)
        accepted: int | None = None
        if node in draft_rows:
            draft_probs_V = distribution(scored.draft_probs_PV[draft_rows[node]], of="draft", node=node)
            siblings = [child for child, parent in enumerate(scored.tree.parents) if parent == node]
            tokens = [scored.tree.token_ids[child] for child in siblings]
            rank, left_V = first_accepted(left_V, draft_probs_V, tokens, depth=len(path), chance=chance)
            accepted = None if rank is None else siblings[rank]
        if accepted is None:
            bonus = chance.draws(left_V, depth=len(path), purpose=Purpose.RESIDUAL)
            return Verification(path=tuple(path), token_ids=(*(scored.tree.token_ids[each] for each in path), bonus))
        path.append(accepted)
        node = accepted


def first_accepted(
    target_probs_V: Row, draft_probs_V: Row, token_ids: Sequence[int], *, depth: int, chance: Chance
) -> tuple[int | None, Row]:
    """The rank of the accepted sibling, None if there is none, and what is left of the target before it."""
    for attempt, token in enumerate(token_ids):
        if not draft_probs_V[token] > 0:
            continue
        if chance.accepts(target_probs_V[token], out_of=draft_probs_V[token], depth=depth, attempt=attempt):
            return attempt, target_probs_V
        target_probs_V = residual(target_probs_V, draft_probs_V)
        draft_probs_V = without(draft_probs_V, token)
    return None, target_probs_V


def residual(target_probs_V: Row, draft_probs_V: Row, *, share: Any = 1) -> Row:
    """Norm[(share * target - draft)+].

    Where nothing is left the two are equal but for rounding, and a rejection was rounding too: the target itself.
    """
    excess_V = (share * target_probs_V - draft_probs_V).clip(min=0)
    total: Any = excess_V.sum()
    return excess_V / total if total > 0 else target_probs_V


def without(probs_V: Row, token: int) -> Row:
    """Norm[probs with this token's entry set to 0]; all 0 if there was no other."""
    rest_V = probs_V * 1  # a copy, of tensors and arrays alike
    rest_V[token] = 0
    # Summed anew: 1 - probs[token] would have lost the digits of a small rest.
    total: Any = rest_V.sum()
    return rest_V / total if total > 0 else rest_V
