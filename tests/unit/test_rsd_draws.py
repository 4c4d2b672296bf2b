"""Draws without replacement: the law of the kept set in the order of its draws, through the real noise."""

from __future__ import annotations

import decimal
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafting.rsd_draws import (
    conditioned,
    first_beams,
    gumbel_top_k,
    independent_row,
    next_beams,
)
from slipstream.drafting.tree import ROOT
from slipstream.engine.request import SamplingParams
from slipstream.engine.sampling import shared_row
from slipstream.verification.chance import noise_of
from slipstream_kernels.sampling import sample_rows
from tests.unit.enumeration import Tokens, draw_two_beams, law_of, random_model
from tests.unit.keyed_decoding import Table, excess, row_behind, smallest_detectable, tables

NUM_REQUESTS = 20_000


def independent_noise(num_requests: int, parents: Sequence[int], *, position: int, vocab_size: int) -> torch.Tensor:
    """Noise [B, W, V], one request a seed."""
    draws = [SamplingParams(seed=seed, max_tokens=1) for seed in range(num_requests)]
    rows = [independent_row(draw, redraw=0, parent=parent) for draw in draws for parent in parents]
    noise = noise_of(sample_rows(rows, [position] * len(rows)), vocab_size=vocab_size)
    return noise.reshape(num_requests, len(parents), vocab_size)


def without_replacement(probs: dict[Tokens, float], num_draws: int) -> dict[tuple[Tokens, ...], float]:
    """The law of `num_draws` different draws in order."""
    law = {}
    for kept in itertools.permutations(probs, num_draws):
        mass, rest = 1.0, 1.0
        for one in kept:
            mass *= probs[one] / rest
            rest -= probs[one]
        law[kept] = mass
    return law


def test_siblings_are_drawn_without_replacement_in_order() -> None:
    draft = tables(3, 5)[1][0]
    noise_XV = independent_noise(NUM_REQUESTS, [ROOT], position=0, vocab_size=5)[:, 0]
    drawn = gumbel_top_k(torch.from_numpy(draft).log(), noise_XV, num_draws=3)
    assert bool((drawn.scores_XW.diff(dim=1) < 0).all())
    counts = Counter(tuple((token,) for token in tokens) for tokens in drawn.token_ids_XW.tolist())
    law = without_replacement({(token,): prob for token, prob in enumerate(draft.tolist())}, 3)
    assert smallest_detectable(NUM_REQUESTS, len(law)) < 0.053
    assert excess(counts, law) < 0


def test_siblings_in_another_order_are_caught() -> None:
    draft = tables(3, 5)[1][0]
    noise_XV = independent_noise(NUM_REQUESTS, [ROOT], position=0, vocab_size=5)[:, 0]
    drawn = gumbel_top_k(torch.from_numpy(draft).log(), noise_XV, num_draws=3).token_ids_XW
    counts = Counter(tuple((token,) for token in reversed(tokens)) for tokens in drawn.tolist())
    law = without_replacement({(token,): prob for token, prob in enumerate(draft.tolist())}, 3)
    assert excess(counts, law) > 0


def test_what_cannot_be_drawn_has_no_score() -> None:
    logprobs = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()
    drawn = gumbel_top_k(logprobs, torch.zeros(1, 3, dtype=torch.float64), num_draws=8)
    assert drawn.token_ids_XW.tolist() == [[0, 2, 1]]
    assert drawn.scores_XW.isneginf().tolist() == [[False, False, True]]


def beam_paths(table: Table, width: int, num_levels: int, *, noise_lanes: str = "own") -> list[list[list[Tokens]]]:
    """The paths that every request keeps at each level, best first; level by level for all requests at once."""
    vocab_size = table.shape[1]
    logprobs_BW, scores_BW = first_beams(NUM_REQUESTS)
    paths: list[list[Tokens]] = [[()]] * NUM_REQUESTS
    levels = []
    for depth in range(num_levels):
        num_beams = len(paths[0])
        lanes = [ROOT] if depth == 0 else list(range(num_beams))
        if noise_lanes == "shared":
            lanes = [ROOT] * num_beams
        rows = torch.from_numpy(np.array([[row_behind(table, path) for path in kept] for kept in paths])).log()
        noise_BWV = independent_noise(NUM_REQUESTS, lanes, position=depth, vocab_size=vocab_size)
        level = next_beams(logprobs_BW, scores_BW, logprobs_BWV=rows, noise_BWV=noise_BWV, width=width)
        edges = zip(paths, level.parents_BW.tolist(), level.token_ids_BW.tolist(), strict=True)
        paths = [
            [(*kept[parent], token) for parent, token in zip(parents, tokens, strict=True)]
            for kept, parents, tokens in edges
        ]
        levels.append(paths)
        logprobs_BW, scores_BW = level.path_logprobs_BW, level.scores_BW
    return levels


def sequences(table: Table, length: int) -> dict[Tokens, float]:
    probs: dict[Tokens, float] = {(): 1.0}
    for _ in range(length):
        probs = {
            (*path, token): mass * prob
            for path, mass in probs.items()
            for token, prob in enumerate(row_behind(table, path).tolist())
        }
    return probs


@pytest.mark.parametrize(("vocab_size", "width", "num_levels"), [(3, 2, 2), (3, 3, 2), (2, 3, 3)])
def test_beams_are_sequences_drawn_without_replacement_in_order(vocab_size: int, width: int, num_levels: int) -> None:
    draft = tables(6, vocab_size)[1]
    law = without_replacement(sequences(draft, num_levels), width)
    counts = Counter(tuple(kept) for kept in beam_paths(draft, width, num_levels)[-1])
    assert smallest_detectable(NUM_REQUESTS, len(law)) < 0.1
    assert excess(counts, law) < 0


def test_beams_that_share_their_noise_are_caught() -> None:
    """Why every node has a lane of its own."""
    draft = tables(6, 3)[1]
    counts = Counter(tuple(kept) for kept in beam_paths(draft, 2, 2, noise_lanes="shared")[-1])
    assert excess(counts, without_replacement(sequences(draft, 2), 2)) > 0


def test_two_beams_have_the_law_worked_out_by_hand() -> None:
    """Of both levels together, each in its order: what the exact proof of the rule takes for granted."""
    model = random_model(8, vocab_size=3)
    table = np.array([model(path).astype(float) for path in [(), (0,), (1,), (2,)]])
    law: dict[Tokens, float] = {
        cell: float(prob) for cell, prob in law_of(lambda chance: flat(draw_two_beams(model, chance).items())).items()
    }
    counts: Counter[Tokens] = Counter()
    for first, second in zip(*beam_paths(table, 2, 2), strict=True):
        drawn: dict[Tokens, list[int]] = {}
        for path in [*first, *second]:
            drawn.setdefault(path[:-1], []).append(path[-1])
        ordered = [((), drawn[()])] + [(path, drawn[path]) for path in first if path in drawn]
        counts[flat(ordered)] += 1
    assert smallest_detectable(NUM_REQUESTS, len(law)) < 0.07
    assert excess(counts, law) < 0


def flat(drawn: object) -> Tokens:
    """Paths and siblings as one row of numbers, -1 between them."""
    numbers: list[int] = []
    for path, tokens in drawn:  # type: ignore[attr-defined]
        numbers += [*path, -1, *tokens, -1]
    return tuple(numbers)


def test_path_log_probabilities_are_sums_and_the_best_score_is_the_parents() -> None:
    logprobs_BW, scores_BW = first_beams(1)
    rows = torch.tensor([[[0.5, 0.3, 0.2]]], dtype=torch.float64).log()
    noise = torch.tensor([[[0.0, 2.0, 0.1]]], dtype=torch.float64)
    level = next_beams(logprobs_BW, scores_BW, logprobs_BWV=rows, noise_BWV=noise, width=2)
    assert level.token_ids_BW.tolist() == [[1, 0]]
    assert level.parents_BW.tolist() == [[0, 0]]
    assert level.path_logprobs_BW.exp().tolist() == [pytest.approx([0.3, 0.5])]
    assert level.scores_BW[0, 0] == 0
    assert level.scores_BW[0, 1] < 0


def test_a_dead_beam_has_no_continuation() -> None:
    """A draft with one possible token keeps one beam alive, whatever the width."""
    logprobs_BW, scores_BW = first_beams(1)
    rows = torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64).log()
    noise = torch.zeros(1, 1, 3, dtype=torch.float64)
    first = next_beams(logprobs_BW, scores_BW, logprobs_BWV=rows, noise_BWV=noise, width=2)
    assert first.scores_BW.tolist() == [[0.0, -torch.inf]]
    second = next_beams(
        first.path_logprobs_BW,
        first.scores_BW,
        logprobs_BWV=torch.full((1, 2, 3), 1 / 3, dtype=torch.float64).log(),
        noise_BWV=torch.rand(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        width=3,
    )
    assert second.parents_BW.tolist() == [[0, 0, 0]]
    assert not second.scores_BW.isneginf().any()


def test_requests_of_a_batch_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(2)
    logprobs = torch.rand(4, 3, 7, dtype=torch.float64, generator=generator).log_softmax(-1)
    noise = torch.rand(4, 3, 7, dtype=torch.float64, generator=generator)
    scores = torch.rand(4, 3, dtype=torch.float64, generator=generator)
    together = next_beams(scores - 1, scores, logprobs_BWV=logprobs, noise_BWV=noise, width=3)
    for one in range(4):
        rows = slice(one, one + 1)
        alone = next_beams(scores[rows] - 1, scores[rows], logprobs_BWV=logprobs[rows], noise_BWV=noise[rows], width=3)
        assert all(torch.equal(whole[rows], part) for whole, part in zip(together, alone, strict=True))


@settings(deadline=None)
@given(
    largest=st.floats(-60, 60),
    scores=st.lists(st.floats(-80, 40), min_size=1, max_size=5),
    gap=st.sampled_from([1e-12, 1e-3, 1.0]),
)
def test_conditioning_equals_its_definition_in_sixty_digits(largest: float, scores: list[float], gap: float) -> None:
    ordered = sorted([*scores, max(scores) + gap], reverse=True)
    moved = conditioned(torch.tensor(ordered, dtype=torch.float64), torch.tensor([largest], dtype=torch.float64))
    with decimal.localcontext(decimal.Context(prec=120)):
        bound, free_bound = (decimal.Decimal(-number).exp() for number in (largest, ordered[0]))
        exact = [-float((bound - free_bound + decimal.Decimal(-score).exp()).ln()) for score in ordered]
    assert moved[0] == largest
    assert moved.tolist() == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_shared_and_independent_noise_differ() -> None:
    draw = SamplingParams(seed=3, max_tokens=1, temperature=0.5)
    rows = [shared_row(draw), *(independent_row(draw, redraw=redraw, parent=ROOT) for redraw in (0, 1))]
    rows.append(independent_row(draw, redraw=0, parent=0))
    noise_XV = noise_of(sample_rows(rows, [6] * 4), vocab_size=64)
    assert len(set(noise_XV[:, 0].tolist())) == 4
    assert torch.equal(noise_XV[0], noise_of(sample_rows(rows[:1], [6]), vocab_size=64)[0])
