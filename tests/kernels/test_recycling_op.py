"""Token Recycling's operations: the compiled ones equal their definition bit for bit; trees are the likeliest."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slipstream_kernels.adjacency import (
    WIDTH,
    Adjacency,
    empty_adjacency,
    remember,
    remember_logits,
    remember_reference,
    vocab_size_of,
)
from slipstream_kernels.logprobs import host_logprobs, top_logprobs
from slipstream_kernels.noise import gumbel_noise
from slipstream_kernels.recycling import NO_PARENT, Grown, GrowthRule, Template, grow, grow_reference, noise_of_tokens
from slipstream_kernels.sampling import SampleRows, row_bytes, sample_rows

PLAIN_RULE = GrowthRule(depth_penalty=0.0, rank_share=0.0)
BINARY = Template(
    *(np.array(column, np.int32) for column in ([-1, -1, 0, 0, 1, 2], [0, 3, 0, 1, 7, 0], [1, 1, 2, 2, 2, 3]))
)
VOCAB_SIZES = [1, 2, 9, 64, 4096, 65_536, 65_537, 150_000]


def random_matrix(vocab_size: int, seed: int, *, share_filled: float = 0.8) -> Adjacency:
    """Rows of different lengths, as the target might have said them, some never seen; many equal numbers."""
    rng = np.random.default_rng(seed)
    matrix = empty_adjacency(vocab_size)
    tokens_T = rng.permutation(vocab_size)[: max(1, int(vocab_size * share_filled))].astype(np.int32)
    ids_TN = rng.integers(0, vocab_size, (len(tokens_T), WIDTH)).astype(np.int32)
    logprobs_TN = -rng.exponential(2.0, ids_TN.shape).round(1)
    logprobs_TN[rng.random(ids_TN.shape) < 0.1] = -np.inf
    remember(matrix, tokens_T, ids_TN, logprobs_TN)
    return matrix


def random_requests(
    matrices: Sequence[Adjacency], number: int, seed: int, *, temperatures: Sequence[float] = (0.0, 0.3, 1.0, 2.0)
) -> tuple[SampleRows, NDArray[np.int32]]:
    chance = random.Random(seed)
    rows = [
        row_bytes(
            seed=chance.getrandbits(63),
            sample_index=chance.randrange(4),
            redraw=chance.randrange(3),
            temperature=chance.choice(temperatures),
        )
        for _ in range(number)
    ]
    limits = [
        (
            chance.randrange(len(matrices)),
            chance.randrange(vocab_size_of(matrices[0])),
            chance.choice([0, 1, 2, 9, 33]),
            chance.choice([1, 2, 5, 40]),
        )
        for _ in range(number)
    ]
    return sample_rows(rows, [chance.randrange(2**20) for _ in range(number)]), np.array(limits, np.int32)


def trees_of(grown: Grown) -> list[list[tuple[int, int, float]]]:
    """(token, parent, score) of each node, per request."""
    nodes = list(zip(*(column.tolist() for column in grown[:3]), strict=True))
    ends = [0, *grown.ends_B.tolist()]
    return [nodes[start:end] for start, end in itertools.pairwise(ends)]


def paths_of(tree: Sequence[tuple[int, int, float]]) -> list[tuple[int, ...]]:
    """The tokens from the root's child down to each node."""
    paths: list[tuple[int, ...]] = []
    for token, parent, _ in tree:
        paths.append((*(paths[parent] if parent != NO_PARENT else ()), token))
    return paths


@pytest.mark.parametrize("template", [None, BINARY], ids=["best first", "template"])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_trees_equal_their_definition(isa: str, vocab_size: int, template: Template | None) -> None:
    matrices = [random_matrix(vocab_size, seed) for seed in (1, 2)]
    draws, limits = random_requests(matrices, 40, vocab_size)
    for rule in (GrowthRule(), GrowthRule(error_scale=1.3, depth_penalty=0.0)):
        out = grow(matrices, draws, limits, rule=rule, template=template)
        expected = grow_reference(matrices, draws, limits, rule=rule, template=template)
        assert all(np.array_equal(one, other) for one, other in zip(out, expected, strict=True))
        assert len(out.token_ids_X) > 30


def test_a_tree_is_the_same_alone_and_in_a_batch(isa: str) -> None:
    matrices = [random_matrix(500, seed) for seed in (1, 2, 3)]
    draws, limits = random_requests(matrices, 30, 7)
    alone = [trees_of(grow(matrices, draws[b : b + 1], limits[b : b + 1]))[0] for b in range(30)]
    assert trees_of(grow(matrices, draws, limits)) == alone


def test_every_negative_half_is_read_exactly(isa: str) -> None:
    halves = np.arange(0x8000, 0xFC00, dtype=np.uint16).view(np.float16).reshape(-1, WIDTH)  # 0 down to the lowest
    matrix = empty_adjacency(len(halves))
    remember(
        matrix,
        np.arange(len(halves), dtype=np.int32),
        np.tile(np.arange(WIDTH, dtype=np.int32), (len(halves), 1)),
        halves,
    )
    limits = np.array([(0, row, WIDTH, 1) for row in range(len(halves))], np.int32)
    draws = sample_rows([row_bytes(seed=0, temperature=0.0)] * len(halves), [0] * len(halves))
    grown = grow([matrix], draws, limits, rule=PLAIN_RULE)
    scores = grown.scores_X.reshape(-1, WIDTH)
    assert np.array_equal(grown.token_ids_X, np.tile(np.arange(WIDTH), len(halves)))  # best first, as stored
    differences = (scores - scores[:, :1]) - (halves - halves[:, :1].astype(np.float64))
    assert (np.abs(differences) <= 4e-15 * (1 - halves.astype(np.float64))).all()


def test_the_noise_of_a_few_tokens_is_that_of_the_whole_row() -> None:
    row = sample_rows([row_bytes(seed=2**62 + 7, temperature=1.0, sample_index=3, redraw=1)], [77])
    key = {"seeds_X": 2**62 + 7, "sample_indices_X": 3, "redraws_X": 1, "positions_X": 80}
    whole = gumbel_noise(**{name: torch.tensor([value]) for name, value in key.items()}, vocab_size=5000)[0]
    tokens = torch.tensor([0, 1, 2, 3, 4999, 17, 4998, 2501])
    assert torch.equal(noise_of_tokens(tokens, row[0], 80), whole[tokens])


def naive_tree(
    matrix: Adjacency, draws: SampleRows, limits: Sequence[int], rule: GrowthRule
) -> dict[tuple[int, ...], float]:
    """The most likely of all paths up to a depth, from scores written out with `math`."""
    _, root, max_nodes, max_depth = limits
    draw = draws[0]
    key = {"seeds_X": draw["seed"], "sample_indices_X": draw["sample_index"], "redraws_X": draw["redraw"]}
    temperature = float(draw["temperature"])
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    level = [()]
    for depth in range(max_depth):
        position = {"positions_X": int(draw["position"]) + depth}
        noise = gumbel_noise(
            **{name: torch.tensor([int(value)]) for name, value in (key | position).items()},
            vocab_size=vocab_size_of(matrix),
        )[0].tolist()
        deeper: list[tuple[int, ...]] = []
        for path in level:
            token, penalty = path[-1] if path else root, rule.depth_penalty
            if np.isneginf(matrix.logprobs_VN[token]).all():
                token, penalty = -1, penalty + rule.unknown_penalty  # the stand-in
            values: dict[int, float] = {}
            for rank, (each, logprob) in enumerate(zip(matrix.ids_VN[token], matrix.logprobs_VN[token], strict=True)):
                if logprob > -math.inf:
                    prob = (1 - rule.rank_share) * math.exp(logprob) + rule.rank_share * rule.rank_probs[rank]
                    values[int(each)] = (math.log(prob) + temperature * noise[each]) / rule.error_scale
            total = math.log(sum(math.exp(value) for value in values.values()))
            for each, value in values.items():
                scores[(*path, each)] = scores[path] + value - total - penalty
                deeper.append((*path, each))
        level = deeper
    del scores[()]
    best = sorted(scores, key=lambda path: -scores[path])[:max_nodes]
    return {path: scores[path] for path in best}


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rule", [GrowthRule(), GrowthRule(0.7, 0.3, 0.0), GrowthRule(1.5, 0.0, 1.0, 2.0)])
@pytest.mark.parametrize("seed", range(4))
def test_best_first_finds_the_most_likely_paths_of_all(
    isa: str, seed: int, rule: GrowthRule, temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    matrix = empty_adjacency(7)
    logprobs = np.log(rng.dirichlet(np.full(4, 0.8), 7))
    remember(
        matrix, np.arange(7, dtype=np.int32), np.argsort(rng.random((7, 7)), axis=1)[:, :4].astype(np.int32), logprobs
    )
    draws = sample_rows([row_bytes(seed=seed, temperature=temperature)], [11])
    for max_nodes in (1, 5, 20, 60):
        limits = (0, 3, max_nodes, 3)
        tree = trees_of(grow([matrix], draws, np.array([limits], np.int32), rule=rule))[0]
        expected = naive_tree(matrix, draws, limits, rule)
        found = dict(zip(paths_of(tree), (score for _, _, score in tree), strict=True))
        assert len(found) == max_nodes
        assert found == pytest.approx(expected, rel=1e-9)  # the same paths, and their scores


@pytest.mark.parametrize("template", [None, BINARY], ids=["best first", "template"])
@pytest.mark.parametrize("seed", range(20))
def test_a_tree_is_one_that_can_be_verified(isa: str, seed: int, template: Template | None) -> None:
    matrices = [random_matrix(30, seed)]
    draws, limits = random_requests(matrices, 20, seed)
    for tree, (_, _, max_nodes, max_depth) in zip(
        trees_of(grow(matrices, draws, limits, template=template)), limits.tolist(), strict=True
    ):
        assert len(tree) <= max_nodes
        edges = [(parent, token) for token, parent, _ in tree]
        assert len(set(edges)) == len(edges)  # no equal siblings
        assert all(len(path) <= max_depth for path in paths_of(tree))
        for node, (_, parent, score) in enumerate(tree):
            assert NO_PARENT <= parent < node
            assert score < (tree[parent][2] if parent != NO_PARENT else 0.0)


def test_candidates_of_equal_score_are_taken_in_order_of_rank(isa: str) -> None:
    matrix = empty_adjacency(20)
    remember(matrix, np.zeros(1, np.int32), np.array([[9, 3, 17, 5]], np.int32), np.full((1, 4), -1.0))
    draws = sample_rows([row_bytes(seed=0, temperature=0.0)], [0])
    assert grow([matrix], draws, np.array([(0, 0, 3, 9)], np.int32)).token_ids_X.tolist() == [9, 3, 17]


# ------------------------------------------------------------------------------------------------------- remembering


def random_rows(
    vocab_size: int, number: int, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    ids_TN = rng.integers(0, vocab_size, (number, int(rng.integers(1, 12)))).astype(np.int32)
    logprobs_TN = rng.choice([0.5, 0.0, -1e-9, -0.3, -2.0, -1e9, np.nan, np.inf, -np.inf], ids_TN.shape).astype(
        np.float32
    )
    return rng.integers(0, vocab_size, number).astype(np.int32), ids_TN, logprobs_TN


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_remembered_rows_equal_their_definition(isa: str, vocab_size: int) -> None:
    for seed in range(10):
        rows = random_rows(vocab_size, 50, seed)
        matrix, expected = empty_adjacency(vocab_size), empty_adjacency(vocab_size)
        remember(matrix, *rows)
        remember_reference(expected, *rows)
        assert np.array_equal(matrix.ids_VN, expected.ids_VN)
        assert np.array_equal(matrix.logprobs_VN, expected.logprobs_VN)


@given(seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, 30), max_size=4))
def test_it_does_not_matter_how_rows_are_divided_among_calls(seed: int, cuts: list[int]) -> None:
    rows = random_rows(6, 30, seed)
    whole, divided = empty_adjacency(6), empty_adjacency(6)
    remember(whole, *rows)
    bounds = [0, *sorted(cuts), 30]
    for start, end in itertools.pairwise(bounds):
        remember(divided, *(column[start:end] for column in rows))
    assert np.array_equal(whole.ids_VN, divided.ids_VN)
    assert np.array_equal(whole.logprobs_VN, divided.logprobs_VN)


def test_the_last_row_of_a_token_stays() -> None:
    matrix = empty_adjacency(10)
    ids = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    remember(matrix, np.array([7, 8, 7], np.int32), ids, np.array([[-1.0, -2.0]] * 3))
    assert matrix.ids_VN[7].tolist() == [5, 6, 0, 0, 0, 0, 0, 0]
    assert matrix.ids_VN[8].tolist() == [3, 4, 0, 0, 0, 0, 0, 0]
    assert matrix.logprobs_VN[7].tolist() == [-1.0, -2.0] + [-math.inf] * 6


def test_what_is_no_candidate_leaves_an_empty_entry() -> None:
    matrix = empty_adjacency(10)
    ids = np.array([[1, 1, 2, 3, 3, 4, 5, 6]], np.int32)
    logprobs = np.array([[-0.5, -0.6, math.nan, -math.inf, -1.0, math.inf, 0.7, -1e30]])
    remember(matrix, np.array([0], np.int32), ids, logprobs)
    assert matrix.ids_VN[0].tolist() == [1, 0, 0, 0, 3, 4, 5, 0]
    assert matrix.logprobs_VN[0].tolist() == [-0.5, -math.inf, -math.inf, -math.inf, -1.0, 0.0, 0.0, -math.inf]


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1])
def test_what_is_no_token_is_refused_with_nothing_written(bad: int) -> None:
    matrix = empty_adjacency(10)
    good, logprobs = np.zeros((2, 3), np.int32), np.full((2, 3), -1.0)
    ids = good.copy()
    ids[1, 2] = bad
    with pytest.raises(ValueError, match=r"the vocabulary is 0\.\.9"):
        remember(matrix, np.array([1, 2], np.int32), ids, logprobs)
    with pytest.raises(ValueError, match=r"the vocabulary is 0\.\.9"):
        remember(matrix, np.array([1, bad], np.int32), good, logprobs)
    draws = sample_rows([row_bytes(seed=0, temperature=0.0)], [0])
    with pytest.raises(ValueError, match=r"the vocabulary is 0\.\.9"):
        grow([matrix], draws, np.array([(0, bad, 4, 4)], np.int32))
    assert np.isneginf(matrix.logprobs_VN).all()


def test_arguments_that_do_not_belong_together_are_refused() -> None:
    matrix = empty_adjacency(10)
    with pytest.raises(ValueError, match="expected a row each"):
        remember(matrix, np.zeros(2, np.int32), np.zeros((1, 3), np.int32), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="expected a row each"):
        remember(matrix, np.zeros(1, np.int32), np.zeros((1, 3), np.int32), np.zeros((1, 2)))
    draws = sample_rows([row_bytes(seed=0, temperature=0.0)], [0])
    with pytest.raises(ValueError, match="1 draws for 2 limits"):
        grow([matrix], draws, np.zeros((2, 4), np.int32))
    with pytest.raises(ValueError, match="matrix is 1; expected 0 to 0"):
        grow([matrix], draws, np.array([(1, 0, 4, 4)], np.int32))


@pytest.mark.parametrize("vocab_size", [5, 300, 70_000])
def test_logits_are_remembered_as_their_log_probabilities(isa: str, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits_TV = torch.randn(6, vocab_size, generator=generator) * 5
    logits_TV[1, 2] = float("nan")
    logits_TV[2, :3] = -float("inf")
    logits_TV[3, 0] = float("inf")
    tokens_T = np.array([4, 0, 4, 1, 2, 3], np.int32)
    said = host_logprobs(top_logprobs(logits_TV, range(6), [0] * 6, num_top=min(8, vocab_size)))
    expected, seen = empty_adjacency(vocab_size), empty_adjacency(vocab_size)
    remember(expected, tokens_T, said.top_ids_GN, said.top_logprobs_GN)
    remember_logits(seen, tokens_T, logits_TV)
    assert (seen.ids_VN == expected.ids_VN).all()
    kept = expected.logprobs_VN > -np.inf
    assert ((seen.logprobs_VN > -np.inf) == kept).all()
    assert np.allclose(seen.logprobs_VN[kept], expected.logprobs_VN[kept], rtol=2e-3, atol=1e-6)
    with pytest.raises(ValueError, match="vocabulary is"):
        remember_logits(seen, np.full(6, vocab_size, np.int32), logits_TV)
