"""Decoding pass by pass with the code that serves: keyed draws, keyed chance, tables in place of models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slipstream.drafting.rsd_draws import first_beams, gumbel_top_k, independent_row, next_beams
from slipstream.drafting.tree import ROOT
from slipstream.engine.request import SamplingParams
from slipstream.verification import KeyedChance, ScoredTree, VerificationRule
from slipstream.verification.chance import noise_of
from slipstream_kernels.sampling import sample_rows
from tests.unit.enumeration import Drawn, Tokens, tree_of

Floats = NDArray[np.float64]
Table = Floats
"""[V + 1, V]: the distribution of the first token, then of the token behind each token."""

DrawTree = Callable[["Pass"], Drawn]


class Pass:
    """One pass: the request's key, where it stands, and what the draft says behind a path."""

    def __init__(self, table: Table, *, seed: int, start: Tokens, redraw: int) -> None:
        self.start = start
        self._table = table
        self._draw = SamplingParams(seed=seed, max_tokens=1)
        self._redraw = redraw

    def draft_probs(self, path: Tokens) -> Floats:
        return row_behind(self._table, (*self.start, *path))

    def noise(self, nodes: Iterable[int], *, depth: int) -> torch.Tensor:
        """Of the children of these nodes, one row each."""
        rows = [independent_row(self._draw, redraw=self._redraw, parent=node) for node in nodes]
        positions = [len(self.start) + depth] * len(rows)
        return noise_of(sample_rows(rows, positions), vocab_size=self._table.shape[1])


def row_behind(table: Table, path: Tokens) -> Floats:
    row: Floats = table[path[-1] + 1 if path else 0]
    return row


def logs(rows: list[Floats]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows)).log()


def branching(*widths: int) -> DrawTree:
    """Gumbel-Top-k behind every node, `widths[level]` siblings."""

    def draw(one: Pass) -> Drawn:
        drawn: Drawn = {}
        level: list[tuple[int, Tokens]] = [(ROOT, ())]
        num_nodes = 0
        for depth, width in enumerate(widths):
            noise_XV = one.noise([node for node, _ in level], depth=depth)
            tokens_XW = gumbel_top_k(logs([one.draft_probs(path) for _, path in level]), noise_XV, num_draws=width)[0]
            below: list[tuple[int, Tokens]] = []
            for (_, path), tokens in zip(level, tokens_XW.tolist(), strict=True):
                drawn[path] = tokens
                below += [(num_nodes + rank, (*path, token)) for rank, token in enumerate(tokens)]
                num_nodes += len(tokens)
            level = below
        return drawn

    return draw


def beams(width: int, num_levels: int) -> DrawTree:
    """Stochastic beam search."""

    def draw(one: Pass) -> Drawn:
        drawn: Drawn = {}
        paths: list[Tokens] = [()]
        logprobs_BW, scores_BW = first_beams(1)
        nodes = [ROOT]
        for depth in range(num_levels):
            logprobs_BWV = logs([one.draft_probs(path) for path in paths]).unsqueeze(0)
            noise_BWV = one.noise(nodes, depth=depth).unsqueeze(0)
            level = next_beams(logprobs_BW, scores_BW, logprobs_BWV=logprobs_BWV, noise_BWV=noise_BWV, width=width)
            logprobs_BW, scores_BW = level.path_logprobs_BW, level.scores_BW
            edges = zip(level.parents_BW[0].tolist(), level.token_ids_BW[0].tolist(), strict=True)
            edges_of_level = [(paths[parent], token) for parent, token in edges]
            for path, token in edges_of_level:
                drawn.setdefault(path, []).append(token)
            nodes = [depth * width + rank for rank in range(len(edges_of_level))]
            paths = [(*path, token) for path, token in edges_of_level]
        return drawn

    return draw


def decode(
    rule: VerificationRule, draw: DrawTree, target: Table, draft: Table, *, seed: int, length: int, **variant: Any
) -> Tokens:
    """At least `length` tokens, cut there. `variant`: another `chance` class, or `is_redrawn` False."""
    chance_of = variant.get("chance", KeyedChance)
    tokens: Tokens = ()
    num_passes = 0
    while len(tokens) < length:
        redraw = num_passes if variant.get("is_redrawn", True) else 0
        one = Pass(draft, seed=seed, start=tokens, redraw=redraw)
        tree, paths = tree_of(draw(one))
        drafting = [() if node == ROOT else paths[node] for node in sorted(set(tree.parents))]
        scored = ScoredTree(
            tree=tree,
            target_probs_XV=torch.from_numpy(np.stack([row_behind(target, (*tokens, *path)) for path in [(), *paths]])),
            draft_probs_PV=torch.from_numpy(
                np.array([one.draft_probs(path) for path in drafting]).reshape(len(drafting), target.shape[1])
            ),
        )
        chance = chance_of(seed=seed, first_position=len(tokens), redraw=redraw)
        tokens += rule(scored, chance).token_ids
        num_passes += 1
    return tokens[:length]


def tables(seed: int, vocab_size: int, *, spread: float = 1.0, difference: float = 1.0) -> tuple[Table, Table]:
    """Target and draft: softmax of normal logits, the draft's moved by more of them."""
    return distributions(seed, vocab_size + 1, vocab_size, spread=spread, difference=difference)


def distributions(
    seed: int, num_rows: int, vocab_size: int, *, spread: float = 1.0, difference: float = 1.0
) -> tuple[Floats, Floats]:
    """`num_rows` rows of a target and of a draft."""
    source = np.random.default_rng(seed)
    target = spread * source.standard_normal((num_rows, vocab_size))
    draft = target + difference * source.standard_normal(target.shape)
    return softmax(target), softmax(draft)


def softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    probs: Floats = weights / weights.sum(-1, keepdims=True)
    return probs


# The bound is df + 10 sqrt(2 df), ten standard deviations above the mean of an exact sampler's statistic.


def excess(counts: Mapping[Any, int], probs: Mapping[Any, float]) -> float:
    """The chi-square statistic less its bound, above 0 for a biased sampler; cells of less than 5 are put together."""
    num_draws = sum(counts.values())
    assert set(counts) <= set(probs)
    pairs = [(counts.get(cell, 0), num_draws * prob) for cell, prob in probs.items()]
    small = [pair for pair in pairs if pair[1] < 5]
    cells = [pair for pair in pairs if pair[1] >= 5]
    if small:
        cells.append((sum(count for count, _ in small), sum(expected for _, expected in small)))
    freedom = len(cells) - 1
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells if expected > 0)
    return statistic - (freedom + 10 * math.sqrt(2 * freedom))


def smallest_detectable(num_draws: int, num_cells: int) -> float:
    """The total variation from which a bias is caught with three standard deviations to spare.

    A bias adds at least 4 n TV**2 to the statistic's mean (Cauchy-Schwarz), and makes its variance 2 df + 4 times that.
    """
    freedom = num_cells - 1
    needed = 10 * math.sqrt(2 * freedom)
    for _ in range(50):
        needed = 10 * math.sqrt(2 * freedom) + 3 * math.sqrt(2 * freedom + 4 * needed)
    return math.sqrt(needed / (4 * num_draws))


def joint_probs(table: Table, length: int) -> dict[Tokens, float]:
    law: dict[Tokens, float] = {(): 1.0}
    for _ in range(length):
        law = {
            (*path, token): mass * float(prob)
            for path, mass in law.items()
            for token, prob in enumerate(row_behind(table, path))
        }
    return law


def excess_of(
    rule: VerificationRule, draw: DrawTree, models: tuple[Table, Table], *, num_draws: int, length: int, **variant: Any
) -> float:
    """Of the joint law of the first `length` tokens, one request a seed."""
    target, draft = models
    counts = Counter(
        decode(rule, draw, target, draft, seed=seed, length=length, **variant) for seed in range(num_draws)
    )
    return excess(counts, joint_probs(target, length))
