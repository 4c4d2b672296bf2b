"""Recursive Speculative Decoding: a small causal LM draws a tree without replacement, one pass of it a level.

Jeon et al., arXiv 2402.14160. Constant branching (RSD-C) draws the same number of siblings behind every node of a
level; stochastic beam search (RSD-S) draws whole sequences, so that unlikely ones end early. A chain is either with one
node a level. How deep a tree gets is settled by counts alone, before anything is drawn.

    noise         drawn with                        carries what it was drawn from    verified by
    independent   a stream of its own, each pass    yes                               a rejection rule
    shared        the target's own noise            no                                equality

Candidates are drawn at the request's temperature and with its filters (top-k, top-p, min-p). Bias and penalties are
the target's alone: that costs acceptance, never correctness, since a rule is told what candidates were drawn from. At
temperature 0 there is no noise and the likeliest tokens are proposed, for equality.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.drafting.drafter import DraftContext
from slipstream.drafting.rsd_cache import DraftCache, GrowingTree
from slipstream.drafting.rsd_draws import (
    BeamLevel,
    first_beams,
    independent_row,
    next_beams,
    next_siblings,
)
from slipstream.drafting.tree import NO_DRAFT, ROOT, DraftTree
from slipstream.engine.sampling import row_of, shared_row
from slipstream.models.checkpoint import Checkpoint, check_draft
from slipstream.verification.chance import noise_of
from slipstream_kernels.sampling import probabilities, row_bytes, sample_rows

NoiseKind = Literal["independent", "shared"]

_DEAD = -2
"""In the place of a node that could not be drawn."""

_GREEDY_ROW = row_bytes(seed=0, temperature=1.0)


class RsdShape(msgspec.Struct, frozen=True):
    """At most `num_nodes[level]` nodes at each level: beams, or siblings, equally many behind every node."""

    num_nodes: tuple[int, ...]
    is_beams: bool


def constant_branching(*num_siblings: int) -> RsdShape:
    """RSD-C: `num_siblings[level]` children behind every node before that level. Raises ValueError below 1."""
    if not num_siblings or min(num_siblings) < 1:
        raise ValueError(f"siblings by level are {num_siblings}; expected at least one level, and 1 or more in each")
    return RsdShape(tuple(int(number) for number in np.cumprod(num_siblings)), is_beams=False)


def beam_search(width: int, num_levels: int) -> RsdShape:
    """RSD-S: `width` nodes in each of `num_levels` levels. Raises ValueError below 1."""
    if width < 1 or num_levels < 1:
        raise ValueError(f"{width} beams of {num_levels} levels; expected 1 or more of both")
    return RsdShape((width,) * num_levels, is_beams=True)


class _Frontier(NamedTuple):
    """The newest level of B trees; `nodes_BW` int64 are its nodes, ROOT, or _DEAD, rising along a row."""

    trees: list[GrowingTree]
    nodes_BW: NDArray[np.int64]
    path_logprobs_BW: Tensor
    scores_BW: Tensor

    @property
    def is_live_BW(self) -> NDArray[np.bool_]:
        is_live_BW: NDArray[np.bool_] = self.nodes_BW != _DEAD
        return is_live_BW


class RsdDrafter:
    """Draws trees of one shape with one draft version.

    `vocab_size` is the target's. A new drafter knows nothing of running requests: it catches up with their tokens, at
    most `max_catch_up_tokens` a call, and proposes nothing for a request until it has. A request that has no room for
    the whole shape gets its first levels.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        version: int,
        shape: RsdShape,
        noise: NoiseKind,
        vocab_size: int,
        num_slots: int,
        max_context_tokens: int,
        max_catch_up_tokens: int,
        device: str = "cpu",
    ) -> None:
        """Raises ArtifactRejected if the draft does not fit the target."""
        check_draft(checkpoint, vocab_size=vocab_size)
        self.version = version
        self.digest = checkpoint.digest
        self._shape = shape
        self._noise = noise
        self._vocab_size = vocab_size
        self._last_pass = [-1] * num_slots
        computed = shape.num_nodes[:-1]  # behind the last level nothing is drawn
        self._cache = DraftCache(
            checkpoint,
            num_slots=num_slots,
            num_nodes=sum(computed),
            max_level_nodes=max(computed, default=1),
            max_context_tokens=max_context_tokens,
            max_catch_up_tokens=max_catch_up_tokens,
            device=device,
        )

    def release(self, slot: int) -> None:
        """Forget what the slot held."""
        self._last_pass[slot] = -1
        self._cache.release(slot)

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        """One tree per context, in order; NO_DRAFT where there is no room or the text is not computed yet."""
        growing = [GrowingTree(one, self._num_levels(one)) for one in contexts]
        level, logits_XV = self._cache.catch_up([tree for tree in growing if tree.num_levels])
        if level:
            self._grow(level, logits_XV)
        return [self._finished(tree) for tree in growing]

    def _num_levels(self, context: DraftContext) -> int:
        """A function of sizes alone: a rejection rule forbids to look at what is drawn."""
        room = min(context.max_depth, self._cache.max_positions - len(context.token_ids))
        fits = np.cumsum(self._shape.num_nodes) <= context.max_nodes
        return max(0, min(room, int(fits.sum())))

    def _grow(self, trees: list[GrowingTree], logits_XV: Tensor) -> None:
        frontier = _Frontier(trees, np.full((len(trees), 1), ROOT), *first_beams(len(trees), logits_XV.device))
        for depth in range(len(self._shape.num_nodes)):
            frontier = self._deepened(frontier, logits_XV, depth)
            is_open_B = np.array([tree.num_levels > depth + 1 for tree in frontier.trees])
            if not is_open_B.any():
                return
            frontier = _of_requests(frontier, is_open_B)
            logits_XV = self._cache.extend(frontier.trees)

    def _deepened(self, frontier: _Frontier, logits_XV: Tensor, depth: int) -> _Frontier:
        """Draw the level behind the frontier's and append it to the trees; `logits_XV` are of its live nodes."""
        probs_BWV = self._in_places(frontier, self._probs(frontier, logits_XV))
        noise_BWV = self._in_places(frontier, self._noise_of(frontier, depth, logits_XV.device))
        drawn = self._draw(frontier, depth, probs_BWV.log(), noise_BWV)
        nodes_BW = _append(frontier, drawn)
        if self._noise == "independent":
            _note_draft_probs(frontier, drawn, probs_BWV)
        return _Frontier(frontier.trees, nodes_BW, drawn.path_logprobs_BW, drawn.scores_BW)

    def _draw(self, frontier: _Frontier, depth: int, logprobs_BWV: Tensor, noise_BWV: Tensor) -> BeamLevel:
        num_nodes = self._shape.num_nodes
        path_BW, scores_BW = frontier.path_logprobs_BW, frontier.scores_BW
        if not self._shape.is_beams:
            num_draws = num_nodes[depth] // (num_nodes[depth - 1] if depth else 1)
            return next_siblings(path_BW, logprobs_BWV=logprobs_BWV, noise_BWV=noise_BWV, num_draws=num_draws)
        greedy = [tree.context.sampling.temperature == 0 for tree in frontier.trees]
        return next_beams(
            path_BW,
            scores_BW,
            logprobs_BWV=logprobs_BWV,
            noise_BWV=noise_BWV,
            width=num_nodes[depth],
            is_greedy_B=torch.tensor(greedy, device=path_BW.device) if any(greedy) else None,
        )

    def _probs(self, frontier: _Frontier, logits_XV: Tensor) -> Tensor:
        rows = []
        for tree, num_live in zip(frontier.trees, frontier.is_live_BW.sum(axis=1).tolist(), strict=True):
            sampling = tree.context.sampling
            rows.append((row_of(sampling) if sampling.temperature else _GREEDY_ROW) * num_live)
        return probabilities(logits_XV, sample_rows(rows, [0] * len(logits_XV)))

    def _noise_of(self, frontier: _Frontier, depth: int, device: torch.device) -> Tensor:
        """Noise [X, V] for the children of the frontier's live nodes."""
        rows: list[bytes] = []
        positions: list[int] = []
        lengths: list[int] = []
        is_drawn: list[bool] = []
        for tree, nodes_W in zip(frontier.trees, frontier.nodes_BW, strict=True):
            live = nodes_W[nodes_W != _DEAD].tolist()
            own = self._noise_rows(tree, live)
            rows += own
            positions += [tree.num_tokens + depth] * len(own)
            lengths += [len(live) // len(own)] * len(own)
            is_drawn += [tree.context.sampling.temperature > 0] * len(live)
        noise_XV = noise_of(sample_rows(rows, positions), vocab_size=self._vocab_size, device=device)
        noise_XV = noise_XV.repeat_interleave(torch.tensor(lengths, device=device), dim=0)
        return noise_XV * torch.tensor(is_drawn, device=device).unsqueeze(1)

    def _noise_rows(self, tree: GrowingTree, nodes: Sequence[int]) -> list[bytes]:
        """One row for all nodes if they share the target's noise, else one each."""
        context = tree.context
        if self._noise == "shared":
            return [shared_row(context.sampling)]
        if not tree.token_ids:
            before, self._last_pass[context.slot] = self._last_pass[context.slot], context.num_passes
            assert before < context.num_passes, f"pass {context.num_passes} after pass {before}: noise used twice"
        return [independent_row(context.sampling, redraw=context.num_passes, parent=node) for node in nodes]

    def _in_places(self, frontier: _Frontier, rows_XV: Tensor) -> Tensor:
        """Rows of the live nodes as [B, W, V], 0 in the places of dead ones."""
        is_live_BW = torch.from_numpy(frontier.is_live_BW).to(rows_XV.device)
        placed_BWV = rows_XV.new_zeros((*is_live_BW.shape, self._vocab_size))
        placed_BWV[is_live_BW] = rows_XV
        return placed_BWV

    def _finished(self, tree: GrowingTree) -> DraftTree:
        if not tree.token_ids:
            return NO_DRAFT
        is_drawn = bool(tree.draft_probs) and tree.context.sampling.temperature > 0
        return DraftTree(
            token_ids=tuple(tree.token_ids),
            parents=tuple(tree.parents),
            drafter="rsd",
            version=self.version,
            draft_probs_PV=torch.cat(tree.draft_probs) if is_drawn else None,
        )


def _append(frontier: _Frontier, drawn: BeamLevel) -> NDArray[np.int64]:
    """Append what was drawn to the trees; the new level's nodes [B, W]."""
    tokens_BW, parents_BW = drawn.token_ids_BW.cpu().numpy(), drawn.parents_BW.cpu().numpy()
    is_live_BW = ~drawn.scores_BW.isneginf().cpu().numpy()
    nodes_BW = np.full(tokens_BW.shape, _DEAD)
    for row, tree in enumerate(frontier.trees):
        is_live_W = is_live_BW[row]
        first = len(tree.token_ids)
        tree.token_ids += tokens_BW[row, is_live_W].tolist()
        tree.parents += frontier.nodes_BW[row, parents_BW[row, is_live_W]].tolist()
        nodes_BW[row, is_live_W] = np.arange(first, len(tree.token_ids))
    return nodes_BW


def _note_draft_probs(frontier: _Frontier, drawn: BeamLevel, probs_BWV: Tensor) -> None:
    """Keep the rows of the frontier's nodes that have children now."""
    has_child_BW = torch.zeros(probs_BWV.shape[:2], dtype=torch.int64, device=probs_BWV.device)
    has_child_BW.scatter_add_(1, drawn.parents_BW, (~drawn.scores_BW.isneginf()).long())
    for tree, probs_WV, has_child_W in zip(frontier.trees, probs_BWV, has_child_BW > 0, strict=True):
        tree.draft_probs.append(probs_WV[has_child_W])


def _of_requests(frontier: _Frontier, is_open_B: NDArray[np.bool_]) -> _Frontier:
    if is_open_B.all():
        return frontier
    kept = torch.from_numpy(np.flatnonzero(is_open_B)).to(frontier.scores_BW.device)
    trees = [tree for tree, is_open in zip(frontier.trees, is_open_B, strict=True) if is_open]
    return _Frontier(trees, frontier.nodes_BW[is_open_B], frontier.path_logprobs_BW[kept], frontier.scores_BW[kept])
