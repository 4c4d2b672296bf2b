"""Block verification of a chain: the whole block decides, not one token after another.

Sun et al., "Block Verification Accelerates Speculative Decoding", arXiv 2403.10444, algorithm 2. With tokens
x_1 ... x_n drawn from d(. | x_1 ... x_i-1) and t the target:

    share_0 = 1,  share_i = min(1, share_i-1 * t(x_i | ...) / d(x_i | ...))
    excess_i(z) = (share_i * t(z | x_1 ... x_i) - d(z | x_1 ... x_i))+
    mass_i = sum of excess_i
    length i is kept with probability mass_i / (mass_i + 1 - share_i) for i < n, and share_n for i = n, independently
    the longest kept length counts, 0 if none
    bonus ~ Norm[excess_i] for i < n, and ~ t(. | x_1 ... x_n) for i = n

No rule for chains accepts more tokens in the mean, and an early token that would have been rejected by itself can be
saved by what follows it. The decisions are independent, so they are made from the longest length down to the first one
kept: that is the longest, and shorter ones need not be looked at.
"""

from __future__ import annotations

from typing import Any

from slipstream.drafting.tree import ROOT
from slipstream.verification.chance import Chance, Purpose, Row
from slipstream.verification.rejection import residual
from slipstream.verification.rule import ScoredTree, Verification, check, distribution


def block_verification(scored: ScoredTree[Row], chance: Chance) -> Verification:
    """Accept a prefix of a sampled chain; see the module for the rule.

    A token to which the draft gives no probability was not drawn: the chain ends before it. Raises ValueError if the
    tree has branches.
    """
    check(scored)
    if scored.tree.parents != tuple(range(ROOT, len(scored.tree.parents) - 1)):
        raise ValueError(
            f"the tree's parents are {list(scored.tree.parents)}; block verification takes a chain: "
            "verify a tree by equality or recursive rejection"
        )
    shares = _shares(scored)
    length: int = _kept_length(scored, shares, chance)
    left_V = scored.target_probs_XV[length]
    if length < len(shares) - 1:
        left_V = residual(left_V, scored.draft_probs_PV[length], share=shares[length])
    bonus = chance.draws(left_V, depth=length, purpose=Purpose.RESIDUAL)
    return Verification(path=tuple(range(length)), token_ids=(*scored.tree.token_ids[:length], bonus))


def _shares(scored: ScoredTree[Row]) -> list[Any]:
    """The share of every length from 0 up to that of the chain of drawn tokens."""
    distribution(scored.target_probs_XV[0], of="target", node=ROOT)
    shares: list[Any] = [1]
    for node, token in enumerate(scored.tree.token_ids):
        draft_prob = distribution(scored.draft_probs_PV[node], of="draft", node=node - 1)[token]
        if not draft_prob > 0:
            break
        distribution(scored.target_probs_XV[node + 1], of="target", node=node)
        shares.append(min(1, shares[-1] * scored.target_probs_XV[node][token] / draft_prob))
    return shares


def _kept_length(scored: ScoredTree[Row], shares: list[Any], chance: Chance) -> int:
    last = len(shares) - 1
    for length in range(last, 0, -1):
        part, out_of = shares[length], 1
        if length < last:
            part = (part * scored.target_probs_XV[length] - scored.draft_probs_PV[length]).clip(min=0).sum()
            out_of = part + 1 - shares[length]
        if chance.accepts(part, out_of=out_of, depth=length - 1):
            return length
    return 0
