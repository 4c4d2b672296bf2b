"""Ways to spoil a sampled draft that look like optimisations, and rules with one step wrong. Every one is biased.

A spoiled draft is verified by the right rule: what breaks is its promise that a candidate is a draw, tried whatever it
is. The comments give the reason in one line each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.drafting.tree import ROOT
from slipstream.verification import Chance, Purpose, ScoredTree, Verification, drafting_nodes
from slipstream.verification.rejection import residual, without
from tests.unit.enumeration import Drawn, Model, Row, Tokens

Spoil = Callable[[Drawn, Model], Drawn]

SMALL = 0.25
"""Below it a candidate's own probability counts as small."""


def _by_row(drawn: Drawn, draft: Model, change: Callable[[list[int], Row], list[int]]) -> Drawn:
    return {path: change(tokens, draft(path)) for path, tokens in drawn.items()}


def deterministic_top_k(drawn: Drawn, draft: Model) -> Drawn:
    """The most likely tokens are no draw; verified as one-hot they would be exact."""
    return _by_row(drawn, draft, lambda tokens, row: [int(token) for token in np.argsort(-row)[: len(tokens)]])


def unlikely_draw_dropped(drawn: Drawn, draft: Model) -> Drawn:
    """A first draw that is tried only if it is likely is no draw from the distribution it is scored with."""
    return _by_row(drawn, draft, lambda tokens, row: tokens if row[tokens[0]] >= SMALL else [])


def sorted_by_draft(drawn: Drawn, draft: Model) -> Drawn:
    """The second of two sorted draws is not what the first one left."""
    return _by_row(drawn, draft, lambda tokens, row: sorted(tokens, key=lambda token: -row[token]))


def siblings_above_threshold(drawn: Drawn, draft: Model) -> Drawn:
    """Whether a later sibling is tried depends on which token it is."""
    return _by_row(drawn, draft, lambda tokens, row: tokens[:1] + [one for one in tokens[1:] if row[one] >= SMALL])


def pruned_by_path(drawn: Drawn, draft: Model) -> Drawn:
    """Keeps the better half of the sampled nodes, by the probability of their own paths."""
    nodes = [(*path, token) for path, tokens in drawn.items() for token in tokens]
    worth: dict[Tokens, Any] = {(): 1}
    for node in sorted(nodes, key=len):
        worth[node] = worth[node[:-1]] * draft(node[:-1])[node[-1]]
    kept = set(sorted(nodes, key=lambda node: (-worth[node], node))[: (len(nodes) + 1) // 2])
    return {path: [token for token in tokens if (*path, token) in kept] for path, tokens in drawn.items()}


BIASED_DRAFTS: tuple[Spoil, ...] = (
    deterministic_top_k,
    unlikely_draw_dropped,
    sorted_by_draft,
    siblings_above_threshold,
    pruned_by_path,
)


def _recursion(
    step: Callable[[Row, Row, int], tuple[Row, Row]], scored: ScoredTree[NDArray[Any]], chance: Chance
) -> Verification:
    """Recursive rejection with another step from one sibling to the next."""
    rows = dict(zip(drafting_nodes(scored.tree), scored.draft_probs_PV, strict=True))
    path: list[int] = []
    node, is_moving = ROOT, True
    while is_moving:
        is_moving, target_V = False, scored.target_probs_XV[node + 1]
        siblings = [child for child, parent in enumerate(scored.tree.parents) if parent == node]
        draft_V = rows.get(node, target_V)
        for attempt, child in enumerate(siblings):
            token = scored.tree.token_ids[child]
            if not draft_V[token] > 0:
                continue
            if chance.accepts(target_V[token], out_of=draft_V[token], depth=len(path), attempt=attempt):
                path.append(child)
                node, is_moving = child, True
                break
            target_V, draft_V = step(target_V, draft_V, token)
    return _verdict(scored, path, chance.draws(target_V, depth=len(path), purpose=Purpose.RESIDUAL))


def _verdict(scored: ScoredTree[NDArray[Any]], path: Sequence[int], bonus: int) -> Verification:
    return Verification(path=tuple(path), token_ids=(*(scored.tree.token_ids[node] for node in path), bonus))


def keeps_the_draft(scored: ScoredTree[NDArray[Any]], chance: Chance) -> Verification:
    """Siblings drawn without replacement, verified as if with."""
    return _recursion(lambda target_V, draft_V, _: (residual(target_V, draft_V), draft_V), scored, chance)


def forgets_to_renormalise(scored: ScoredTree[NDArray[Any]], chance: Chance) -> Verification:
    """The rest of the draft is taken out of what was there before."""

    def step(target_V: Row, draft_V: Row, token: int) -> tuple[Row, Row]:
        return residual(target_V, draft_V), without(draft_V, token) * (1 - draft_V[token])

    return _recursion(step, scored, chance)


def keeps_the_target(scored: ScoredTree[NDArray[Any]], chance: Chance) -> Verification:
    """A rejection leaves the target as it was."""
    return _recursion(lambda target_V, draft_V, token: (target_V, without(draft_V, token)), scored, chance)


def residual_of_the_next_draft(scored: ScoredTree[NDArray[Any]], chance: Chance) -> Verification:
    """Takes the rejected token out of the draft first, and the draft out of the target then."""

    def step(target_V: Row, draft_V: Row, token: int) -> tuple[Row, Row]:
        rest_V = without(draft_V, token)
        return residual(target_V, rest_V), rest_V

    return _recursion(step, scored, chance)


BIASED_RECURSIONS = (keeps_the_draft, forgets_to_renormalise, keeps_the_target, residual_of_the_next_draft)


def block_of_ratios(scored: ScoredTree[NDArray[Any]], chance: Chance) -> Verification:
    """Keeps a length with the share itself, the ratio of the block's probabilities."""
    return _block(scored, chance, lambda share, mass: (share, 1), lambda share: share)


def block_with_a_tokens_residual(scored: ScoredTree[NDArray[Any]], chance: Chance) -> Verification:
    """Decides by the block, and draws the bonus as if one token had been rejected."""
    return _block(scored, chance, lambda share, mass: (mass, mass + 1 - share), lambda share: 1)


def _block(
    scored: ScoredTree[NDArray[Any]],
    chance: Chance,
    odds: Callable[[Any, Any], tuple[Any, Any]],
    bonus_share: Callable[[Any], Any],
) -> Verification:
    shares: list[Any] = [1]
    for node, token in enumerate(scored.tree.token_ids):
        ratio = scored.target_probs_XV[node][token] / scored.draft_probs_PV[node][token]
        shares.append(min(1, shares[-1] * ratio))
    last = len(shares) - 1
    for length in range(last, -1, -1):
        target_V = scored.target_probs_XV[length]
        part, out_of = shares[length], 1
        if length < last:
            excess = (shares[length] * target_V - scored.draft_probs_PV[length]).clip(min=0).sum()
            part, out_of = odds(shares[length], excess)
            target_V = residual(target_V, scored.draft_probs_PV[length], share=bonus_share(shares[length]))
        if length == 0 or chance.accepts(part, out_of=out_of, depth=length - 1):
            break
    return _verdict(scored, range(length), chance.draws(target_V, depth=length, purpose=Purpose.RESIDUAL))


BIASED_BLOCKS = (block_of_ratios, block_with_a_tokens_residual)
