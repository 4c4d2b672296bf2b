"""Token Recycling: what is drafted from what the target said, and for whom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.recycling import PLAIN, Setting, decode, lowest_ranks
from slipstream.drafting.drafter import DraftContext
from slipstream.drafting.recycling import RecyclingDrafter, TreeShape, paper_template
from slipstream.drafting.recycling_artifact import StoredMatrix
from slipstream.drafting.tree import NO_DRAFT, ROOT, DraftTree, checked, depths
from slipstream.engine.request import SamplingParams
from slipstream.models.checkpoint import load_checkpoint
from slipstream_kernels.adjacency import empty_adjacency
from slipstream_kernels.noise import gumbel_noise
from slipstream_kernels.recycling import GrowthRule
from slipstream_kernels.sampling import choose, row_bytes, sample_rows

MODELS = Path(__file__).parents[2] / "deploy" / "models"
PLAIN_RULE = GrowthRule(depth_penalty=0.0, rank_share=0.0)
"""Scores are those of the stored probabilities alone."""

VOCAB_SIZE = 50


def context(
    *token_ids: int, max_nodes: int = 16, max_depth: int = 16, tenant: str = "", **sampling: Any
) -> DraftContext:
    params = SamplingParams(**({"seed": 0, "max_tokens": 100, "temperature": 0.0} | sampling))
    return DraftContext(0, token_ids, params, max_nodes, max_depth, tenant)


def said(drafter: RecyclingDrafter, rows: dict[int, dict[int, float]], *, tenant: str = "") -> None:
    """The target said these probabilities behind these tokens; and last nothing, so that nothing stands in."""
    for token, probs in rows.items():
        ids = np.array([list(probs)], np.int32)
        drafter.observe(np.array([token], np.int32), ids, np.log(np.array([list(probs.values())])), tenant=tenant)
    nothing = np.zeros((1, 1))
    drafter.observe(np.array([VOCAB_SIZE - 1], np.int32), nothing.astype(np.int32), nothing - np.inf, tenant=tenant)


def drafted(drafter: RecyclingDrafter, one: DraftContext) -> list[tuple[int, ...]]:
    """The token paths of a tree's nodes, in order."""
    return paths_of(drafter.propose([one])[0])


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    """The tokens from the root's child down to each node."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.token_ids, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent != ROOT else ()), token))
    return paths


# ----------------------------------------------------------------------------------------------------------- the tree


def test_the_most_likely_path_is_drafted_first() -> None:
    drafter = RecyclingDrafter(VOCAB_SIZE, rule=PLAIN_RULE)
    said(drafter, {5: {6: 0.6, 7: 0.3, 8: 0.1}, 6: {9: 0.9, 5: 0.1}, 7: {6: 1.0}, 9: {1: 0.5, 2: 0.5}})
    # 6: .6, 6 9: .54, 7: .3, 7 6: .3, 6 9 1 and 6 9 2: .27, 7 6 9: .27
    assert drafted(drafter, context(1, 5, max_nodes=4)) == [(6,), (6, 9), (7,), (7, 6)]
    assert drafted(drafter, context(1, 5, max_nodes=3, max_depth=1)) == [(6,), (7,), (8,)]
    grown = drafter.grow([context(1, 5, max_nodes=4)])
    assert np.exp(grown.scores_X) == pytest.approx([0.6, 0.54, 0.3, 0.3], rel=2e-3)  # fp16


def test_depth_costs_and_rank_counts() -> None:
    rule = GrowthRule(depth_penalty=0.5, rank_share=0.5, rank_probs=(0.5, 0.25, 0.05, 0.05, 0.05, 0.05, 0.05, 0.0))
    drafter = RecyclingDrafter(VOCAB_SIZE, rule=rule)
    said(drafter, {5: {6: 0.1, 7: 0.65}, 6: {6: 0.5, 7: 0.25}})
    scores = drafter.grow([context(5, max_nodes=3, max_depth=2)]).scores_X
    # behind 5: (.1 + .5) / 2 and (.65 + .25) / 2, of .75; behind 6: .5 and .25, of .75
    assert drafted(drafter, context(5, max_nodes=3, max_depth=2)) == [(7,), (6,), (6, 6)]
    assert np.exp(scores) == pytest.approx([0.6 / math.e**0.5, 0.4 / math.e**0.5, 0.4 * 2 / 3 / math.e], rel=2e-3)


def test_equal_candidates_are_drafted_in_the_order_of_their_noise() -> None:
    drafter = RecyclingDrafter(VOCAB_SIZE, rule=PLAIN_RULE)
    tokens = [3, 7, 11, 20, 21, 30, 44, 48]
    said(drafter, {5: dict.fromkeys(tokens, 0.125)})
    orders = set()
    for index, length in ((0, 1), (0, 9), (2, 1)):
        key = {"seeds_X": 77, "sample_indices_X": index, "redraws_X": 0, "positions_X": length}
        noise = gumbel_noise(**{name: torch.tensor([value]) for name, value in key.items()}, vocab_size=VOCAB_SIZE)[0]
        one = context(*[5] * length, max_nodes=8, max_depth=1, seed=77, sample_index=index, temperature=1.0)
        order = [token for (token,) in drafted(drafter, one)]
        assert order == sorted(tokens, key=lambda token: -float(noise[token]))
        orders.add(tuple(order))
    assert len(orders) == 3  # position and sample index key the noise


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_a_row_that_knows_the_target_proposes_the_token_it_will_choose(temperature: float) -> None:
    drafter = RecyclingDrafter(VOCAB_SIZE, rule=PLAIN_RULE)
    probs = dict(zip([3, 7, 11, 20, 21, 30, 44, 48], [0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05], strict=True))
    said(drafter, {5: probs})
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    for token, prob in probs.items():
        logits[0, token] = float(np.float16(math.log(prob)))
    chosen = [
        int(choose(logits, sample_rows([row_bytes(seed=seed, temperature=temperature)], [4]))) for seed in range(200)
    ]
    proposed = drafter.propose(
        [context(1, 2, 3, 5, max_nodes=1, seed=seed, temperature=temperature) for seed in range(200)]
    )
    assert [tree.token_ids for tree in proposed] == [(token,) for token in chosen]
    assert len(set(chosen)) == 8


def test_tokens_never_seen_borrow_what_was_said_last_once_nothing_better_is_left() -> None:
    drafter = RecyclingDrafter(VOCAB_SIZE, rule=PLAIN_RULE)
    drafter.observe(np.array([5], np.int32), np.array([[6]], np.int32), np.array([[math.log(0.01)]]))
    drafter.observe(np.array([9], np.int32), np.array([[1, 2]], np.int32), np.log([[0.75, 0.25]]))
    assert drafted(drafter, context(9, max_nodes=3, max_depth=1)) == [(1,), (2,)]
    assert drafted(drafter, context(40, max_nodes=2)) == [(1,), (2,)]  # 40 was never seen
    assert drafted(drafter, context(5, max_nodes=4)) == [(6,), (6, 1), (6, 2), (6, 1, 1)]
    assert drafter.grow([context(40, max_nodes=1)]).scores_X == pytest.approx(math.log(0.75) - 8, rel=1e-3)


def test_nothing_is_drafted_before_anything_was_said() -> None:
    drafter = RecyclingDrafter(VOCAB_SIZE)
    assert drafter.propose([context(0), context(5, temperature=1.0)]) == [NO_DRAFT, NO_DRAFT]
    said(drafter, {})
    assert drafter.propose([context(0)]) == [NO_DRAFT]  # an empty row is not a row of zeros
    assert drafter.propose([]) == []


ROWS = st.dictionaries(
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(0, 9), st.floats(-20, 0, width=16)), min_size=1, max_size=8),
    max_size=10,
)


@given(
    rows=ROWS,
    limits=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**62),
    shape=st.sampled_from(["best_first", "template"]),
)
def test_every_tree_can_be_verified_and_keeps_its_budget(
    rows: dict[int, list[tuple[int, float]]],
    limits: list[tuple[int, int, int]],
    temperature: float,
    seed: int,
    shape: TreeShape,
) -> None:
    drafter = RecyclingDrafter(10, shape=shape)
    for token, entries in rows.items():
        ids, logprobs = zip(*entries, strict=True)
        drafter.observe(np.array([token], np.int32), np.array([ids], np.int32), np.array([logprobs]))
    contexts = [
        context(0, root, max_nodes=max_nodes, max_depth=max_depth, temperature=temperature, seed=seed)
        for root, max_nodes, max_depth in limits
    ]
    trees = drafter.propose(contexts)
    for one, tree in zip(contexts, trees, strict=True):
        checked(tree, vocab_size=10)  # parents first, no equal siblings, tokens of the vocabulary
        assert len(tree.token_ids) <= one.max_nodes
        assert max(depths(tree), default=0) <= one.max_depth
        assert bool(tree.token_ids) == bool(rows)
    assert trees == [drafter.propose([one])[0] for one in contexts]  # alone as together


# ------------------------------------------------------------------------------------------------------- the template


def rank_paths() -> list[tuple[int, ...]]:
    template = paper_template()
    tree = DraftTree(
        token_ids=tuple(template.ranks_X.tolist()), parents=tuple(template.parents_X.tolist()), drafter="", version=0
    )
    assert depths(tree) == template.depths_X.tolist()
    return paths_of(tree)


def test_the_template_is_the_papers() -> None:
    paths = rank_paths()
    assert len(paths) == len(set(paths)) == 80
    assert np.bincount([len(path) for path in paths]).tolist() == [0, 8, 21, 25, 15, 8, 3]
    assert len(set(paths) - {path[:-1] for path in paths}) == 40  # leaves
    assert {(0, 0, 0, 1, 0, 0), (0, 0, 0, 0, 0, 1), (0, 0, 4, 0), (1, 0, 0, 0, 0), (7, 0), (0, 7, 0)} <= set(paths)
    assert not {(0, 0, 0, 0, 0, 2), (1, 4), (2, 1, 0), (6, 0, 0), (0, 0, 5, 0)} & set(paths)


def test_the_template_is_filled_with_the_candidates_of_each_rank() -> None:
    drafter = RecyclingDrafter(VOCAB_SIZE, shape="template")
    ids = np.arange(400, dtype=np.int32).reshape(VOCAB_SIZE, 8) % VOCAB_SIZE
    drafter.observe(np.arange(VOCAB_SIZE, dtype=np.int32), ids, np.full(ids.shape, -2.0))

    def token_at(path: Sequence[int]) -> int:
        return (8 * token_at(path[:-1]) + path[-1]) % VOCAB_SIZE if path else 17

    expected = [tuple(token_at(path[: depth + 1]) for depth in range(len(path))) for path in rank_paths()]
    assert drafted(drafter, context(17, max_nodes=80)) == expected
    assert drafted(drafter, context(17, max_nodes=200, temperature=1.0)) == expected  # the shape does not see noise
    assert drafted(drafter, context(17, max_nodes=30)) == expected[:30]
    assert drafted(drafter, context(17, max_nodes=80, max_depth=2)) == expected[:29]


# ------------------------------------------------------------------------------------------------------------- tenants


def test_tenants_draft_from_what_they_were_told_alone() -> None:
    drafter = RecyclingDrafter(VOCAB_SIZE, max_tenants=2)
    said(drafter, {5: {6: 1.0}}, tenant="a")
    said(drafter, {5: {7: 1.0}}, tenant="b")
    contexts = [context(5, tenant=tenant, max_nodes=1) for tenant in ("a", "b", "c", "a")]
    assert [tree.token_ids for tree in drafter.propose(contexts)] == [(6,), (7,), (), (6,)]


def test_the_tenant_unused_for_longest_makes_room() -> None:
    drafter = RecyclingDrafter(VOCAB_SIZE, max_tenants=2)
    for tenant in ("a", "b"):
        said(drafter, {5: {6: 1.0}}, tenant=tenant)
    drafter.propose([context(5, tenant="a")])  # drafting is use
    num_bytes = drafter.num_bytes
    said(drafter, {5: {6: 1.0}}, tenant="c")
    known = drafter.propose([context(5, tenant=tenant, max_nodes=1) for tenant in ("a", "b", "c")])
    assert [tree.token_ids for tree in known] == [(6,), (), (6,)]
    assert drafter.num_bytes == num_bytes == 3 * RecyclingDrafter(VOCAB_SIZE).num_bytes


def test_one_matrix_serves_all_unless_tenants_are_kept_apart() -> None:
    drafter = RecyclingDrafter(VOCAB_SIZE)
    said(drafter, {5: {6: 1.0}}, tenant="a")
    assert drafted(drafter, context(5, tenant="b", max_nodes=1)) == [(6,)]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="knows 50 tokens, not 51"):
        RecyclingDrafter(51, start=StoredMatrix(empty_adjacency(50), ""))
    with pytest.raises(ValueError, match="max_tenants is 0"):
        RecyclingDrafter(VOCAB_SIZE, max_tenants=0)
    drafter = RecyclingDrafter(VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"the vocabulary is 0\.\.49"):
        drafter.propose([context(50)])


def test_ids_and_log_probabilities_fit_the_stated_memory() -> None:
    assert RecyclingDrafter(32_000).num_bytes == 32 * 32_001 <= 1.5 * 2**20
    assert RecyclingDrafter(65_536).num_bytes == 32 * 65_537
    assert RecyclingDrafter(152_000).num_bytes == 48 * 152_001


# ------------------------------------------------------------------------------------------------ through the engine


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_tokens_equal_plain_decoding_and_most_calls_at_temperature_0_give_several(temperature: float) -> None:
    target = load_checkpoint(MODELS / "mix-moe-11m")
    prompts = [tuple(range(start, start + 12)) for start in (100, 200, 300)]
    plain = decode(target, prompts, msgspec.structs.replace(PLAIN, temperature=temperature), max_tokens=60)
    for shape, num_nodes in (("best_first", 16), ("template", 80)):
        setting = Setting(shape=shape, num_nodes=num_nodes, temperature=temperature)
        decoded = decode(target, prompts, setting, max_tokens=60)
        assert decoded.token_ids == plain.token_ids
        if temperature == 0:
            assert decoded.tokens_per_call() > 1.3
    assert plain.tokens_per_call() == 1


def test_the_cut_of_the_papers_tree_is_closed_and_has_the_lowest_ranks() -> None:
    paths = [tuple(path) for path in lowest_ranks(16)]
    assert len(paths) == 16
    assert {(0,), (1,), (0, 0), (0, 1), (3,), (0, 0, 0, 0)} <= set(paths)
    assert all(path[:-1] in paths for path in paths if len(path) > 1)
    assert ROOT not in {rank for path in paths for rank in path}
