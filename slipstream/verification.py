"""Which drafted tokens the target accepts.

    root           the last committed token; its row of logits decides the next one
    chosen token   the target's own token at a node, drawn under the sampling contract (`engine.sampling`)
    accepted path  the nodes from the root down whose token equals the one chosen at their parent
    bonus token    the first chosen token without an equal child; it ends the block

Equality rule: a child is accepted if and only if it equals the chosen token. Every emitted token is then the target's
own, so output is the same for any tree, and for none (proof: induction along the path; Daliri et al., arXiv
2408.07978, for a single draft). A drafter may look at the noise. Other rules can stand beside it behind the same
signature; only they would ever raise the noise's redraw.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from slipstream.drafting.tree import ROOT, DraftTree


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """`path` holds the accepted nodes from the root down, `token_ids` their tokens and the bonus."""

    path: tuple[int, ...]
    token_ids: tuple[int, ...]


def verify(tree: DraftTree, chosen_ids: Sequence[int]) -> Verification:
    """Walk the tree with the target's choices.

    `chosen_ids` has X + 1 entries: the token chosen at the root, then the one chosen at each node. Entries off the
    accepted path are not looked at. Of equal siblings the last counts.
    """
    assert len(chosen_ids) == len(tree.token_ids) + 1
    children = {
        (parent, token): node for node, (parent, token) in enumerate(zip(tree.parents, tree.token_ids, strict=True))
    }
    path: list[int] = []
    tokens = [chosen_ids[0]]
    node = children.get((ROOT, chosen_ids[0]))
    while node is not None:
        path.append(node)
        tokens.append(chosen_ids[node + 1])
        node = children.get((node, tokens[-1]))
    return Verification(path=tuple(path), token_ids=tuple(tokens))
