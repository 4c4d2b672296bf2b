"""Keyed random decisions: fair, apart from one another, and the target's own where they should be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafting.tree import NO_DRAFT, chain_tree
from slipstream.verification import KeyedChance, Purpose, ScoredTree, Verification, equality, stream
from slipstream.verification.chance import NUM_LANES, NUM_REDRAWS, noise_of
from slipstream_kernels.noise import gumbel_noise
from slipstream_kernels.sampling import choose, row_bytes, sample_rows
from tests.unit.keyed_decoding import excess

SEEDS = st.integers(0, 2**63 - 1)


def test_the_targets_stream_is_the_noise_of_plain_decoding() -> None:
    assert stream(Purpose.TARGET, redraw=0) == 0


@given(
    *[st.tuples(st.sampled_from(Purpose), st.integers(0, NUM_REDRAWS - 1), st.integers(0, NUM_LANES - 1))] * 2,
)
def test_streams_are_equal_only_if_purpose_redraw_and_lane_are(
    one: tuple[Purpose, int, int], other: tuple[Purpose, int, int]
) -> None:
    words = [stream(purpose, redraw=redraw, lane=lane) for purpose, redraw, lane in (one, other)]
    assert (words[0] == words[1]) == (one == other)
    assert all(0 <= word < 2**31 for word in words)


@pytest.mark.parametrize(("redraw", "lane"), [(-1, 0), (NUM_REDRAWS, 0), (0, -1), (0, NUM_LANES)])
def test_a_stream_without_room_is_refused(redraw: int, lane: int) -> None:
    with pytest.raises(ValueError, match=r"(redraw|lane) is -?\d+; expected 0 to"):
        stream(Purpose.DRAFT, redraw=redraw, lane=lane)


@given(seed=SEEDS, depth=st.integers(0, 40), attempt=st.integers(0, 40))
def test_what_is_certain_is_not_left_to_chance(seed: int, depth: int, attempt: int) -> None:
    chance = KeyedChance(seed=seed, first_position=3)
    assert chance.accepts(0.3, out_of=0.3, depth=depth, attempt=attempt)
    assert chance.accepts(1e-300, out_of=1e-301, depth=depth, attempt=attempt)
    assert not chance.accepts(0.0, out_of=1e-300, depth=depth, attempt=attempt)
    assert not chance.accepts(0.0, out_of=0.0, depth=depth, attempt=attempt)


@pytest.mark.parametrize("probability", [0.01, 0.5, 0.9])
def test_acceptances_have_their_probability_at_every_attempt_and_depth(probability: float) -> None:
    counts: Counter[tuple[int, int, bool]] = Counter()
    for seed in range(2000):
        chance = KeyedChance(seed=seed, first_position=7, redraw=1)
        decided = {(depth, attempt): (0, 0) for depth in range(2) for attempt in range(2)}
        for depth, attempt in decided:
            accepted = chance.accepts(probability / 2, out_of=0.5, depth=depth, attempt=attempt)
            counts[depth, attempt, accepted] += 1
    expected = {
        (depth, attempt, accepted): (probability if accepted else 1 - probability) / 4
        for depth in range(2)
        for attempt in range(2)
        for accepted in (False, True)
    }
    assert excess(counts, expected) < 0


def test_decisions_are_functions_of_the_key_and_differ_with_every_part_of_it() -> None:
    base: dict[str, int] = {"seed": 5, "first_position": 9, "sample_index": 0, "redraw": 0}

    def decisions(**changed: int) -> list[Any]:
        chance = KeyedChance(**{**base, **changed})
        weights = torch.ones(1 << 16, dtype=torch.float64)
        return [chance.draws(weights, depth=depth, purpose=Purpose.RESIDUAL) for depth in range(3)]

    assert decisions() == decisions()
    others = [decisions(seed=6), decisions(seed=5 + 2**40), decisions(sample_index=1), decisions(redraw=1)]
    assert all(set(decisions()).isdisjoint(other) for other in others)
    assert decisions(first_position=10)[:2] == decisions()[1:]


@settings(deadline=None)
@given(
    seed=SEEDS,
    weights=st.lists(st.sampled_from([0.0, 1e-300, 1e-20, 0.25, 1.0, 1e20]), min_size=1, max_size=12).filter(any),
    purpose=st.sampled_from([Purpose.TARGET, Purpose.RESIDUAL]),
)
def test_a_token_without_weight_is_never_drawn(seed: int, weights: list[float], purpose: Purpose) -> None:
    token = KeyedChance(seed=seed, first_position=0).draws(np.array(weights), depth=0, purpose=purpose)
    assert weights[token] > 0


@pytest.mark.parametrize("purpose", [Purpose.TARGET, Purpose.RESIDUAL])
def test_draws_have_their_weights(purpose: Purpose) -> None:
    weights = torch.tensor([3.0, 0.0, 1.0, 0.5, 5.5], dtype=torch.float64)
    counts = Counter(
        KeyedChance(seed=seed, first_position=1).draws(weights, depth=0, purpose=purpose) for seed in range(4000)
    )
    assert excess(counts, dict(enumerate((weights / 10).tolist()))) < 0


def test_the_targets_draws_are_the_tokens_of_plain_decoding() -> None:
    logits_XV = torch.randn(200, 97, generator=torch.Generator().manual_seed(3)) * 3
    rows = [row_bytes(seed=seed, temperature=0.7, sample_index=2) for seed in range(200)]
    chosen = choose(logits_XV, sample_rows(rows, [11] * 200)).tolist()
    probs_XV = (logits_XV.double() / 0.7).softmax(-1)
    for seed, token in enumerate(chosen):
        # Neither the pass nor the way to the position matters to it.
        chance = KeyedChance(seed=seed, first_position=9, sample_index=2, redraw=seed)
        assert chance.draws(probs_XV[seed], depth=2, purpose=Purpose.TARGET) == token


def test_equality_accepts_what_the_target_would_choose() -> None:
    probs_V = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probs_V /= probs_V.sum()

    def run(*token_ids: int) -> Verification:
        tree = chain_tree(token_ids, drafter="test", version=1) if token_ids else NO_DRAFT
        no_draft_probs = torch.empty(0, 50, dtype=torch.float64)
        one = ScoredTree(
            tree=tree, target_probs_XV=probs_V.expand(len(token_ids) + 1, -1), draft_probs_PV=no_draft_probs
        )
        return equality(one, KeyedChance(seed=4, first_position=0))

    chance = KeyedChance(seed=4, first_position=0)
    own = [chance.draws(probs_V, depth=depth, purpose=Purpose.TARGET) for depth in range(4)]
    wrong = (own[1] + 1) % 50
    assert run() == Verification(path=(), token_ids=(own[0],))
    assert run(own[0], own[1], own[2]) == Verification(path=(0, 1, 2), token_ids=tuple(own))
    assert run(own[0], wrong, own[2]) == Verification(path=(0,), token_ids=(own[0], own[1]))


def test_noise_is_the_same_compiled_and_in_plain_torch() -> None:
    words = [stream(Purpose.DRAFT, redraw=3, lane=lane) for lane in (0, 1, NUM_LANES - 1)]
    rows = sample_rows([row_bytes(seed=2**62 + 5, temperature=1.0, redraw=word) for word in words], [4, 5, 6])
    plain = gumbel_noise(
        seeds_X=torch.full((3,), 2**62 + 5),
        sample_indices_X=torch.zeros(3, dtype=torch.int64),
        redraws_X=torch.tensor(words),
        positions_X=torch.tensor([4, 5, 6]),
        vocab_size=131,
    )
    assert torch.equal(noise_of(rows, vocab_size=131), plain)
    assert noise_of(rows[:0], vocab_size=131).shape == (0, 131)
