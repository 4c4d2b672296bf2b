"""Which drafted tokens the target accepts: one signature, several rules.

    root           the last committed token; its row of probabilities decides the next one
    siblings       children of one node, in the tree in the order in which they were drawn
    chosen token   the target's own token at a node, drawn under the sampling contract (`engine.sampling`)
    accepted path  the accepted nodes from the root down
    bonus token    the token that the target adds behind the accepted path; it ends the block
    residual       what a target still has to give after a rejection: Norm[(target - draft)+]
    chance         where a rule's random decisions come from; keyed, and apart from the target's noise

Every rule keeps the target's distribution. They differ in what they ask of the tree:

    rule                  tree                                    output
    equality              any, from any drafter, merged, pruned   depends on prompt and seed only
    recursive_rejection   sampled siblings without replacement    depends on the draft as well
    block_verification    sampled chain                           depends on the draft as well

The two rejection rules trust two promises of the drafter, and a tree that breaks one gives biased tokens:

1. A node's candidate is a draw from the distribution it is scored with, given its earlier siblings; siblings stand in
   the order of the draws.
2. What decides whether a node is drawn or tried (shape, budget, truncation) may know distributions, earlier siblings
   and the values of order statistics, never which token was drawn there. So no tree is merged, re-ranked or pruned.
"""

from __future__ import annotations

from slipstream.drafting.tree import drafting_nodes
from slipstream.verification.block import block_verification
from slipstream.verification.chance import Chance, KeyedChance, Purpose, stream
from slipstream.verification.equality import equality, verify
from slipstream.verification.rejection import recursive_rejection
from slipstream.verification.rule import ScoredTree, Verification, VerificationRule, sound_nodes

RULES: dict[str, VerificationRule] = {
    "equality": equality,
    "recursive_rejection": recursive_rejection,
    "block": block_verification,
}
"""The rules by name; `equality` is the default."""


def rule_named(name: str) -> VerificationRule:
    """The rule of this name; ValueError if there is none."""
    if name not in RULES:
        raise ValueError(f"verification rule is {name!r}; expected one of {', '.join(RULES)}")
    return RULES[name]


__all__ = [
    "RULES",
    "Chance",
    "KeyedChance",
    "Purpose",
    "ScoredTree",
    "Verification",
    "VerificationRule",
    "block_verification",
    "drafting_nodes",
    "equality",
    "recursive_rejection",
    "rule_named",
    "sound_nodes",
    "stream",
    "verify",
]
