"""The rejection rules through the real draws and the real random numbers: chi-square against the target's law.

The enumeration of `test_rejection.py` proves the rules; this proves what feeds them: Gumbel-Top-k, stochastic beam
search, streams and redraws. Seeds are fixed, so a result never changes by chance. Each test states the smallest total
variation it detects.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.drafting.rsd_draws import gumbel_top_k, independent_row
from slipstream.drafting.tree import ROOT, DraftTree
from slipstream.engine.request import SamplingParams
from slipstream.verification import (
    KeyedChance,
    Purpose,
    ScoredTree,
    VerificationRule,
    block_verification,
    recursive_rejection,
    stream,
)
from slipstream.verification.chance import noise_of
from slipstream_kernels.sampling import sample_rows
from tests.unit.keyed_decoding import (
    DrawTree,
    beams,
    branching,
    distributions,
    excess,
    excess_of,
    smallest_detectable,
    tables,
)
from tests.unit.mutant_rules import BIASED_DRAFTS, Spoil, pruned_by_path

NUM_REQUESTS = 3000
CHUNK = 128


# --------------------------------------------------------------------------------------------- one token, many of them


def first_token_excess(vocab_size: int, num_draws: int, *, num_siblings: int, spoil: Spoil | None = None) -> float:
    """Of the first token emitted, with siblings drawn by Gumbel-Top-k and tried by recursive rejection."""
    target, draft = (rows[0] for rows in distributions(4, 1, vocab_size))
    log_draft = torch.from_numpy(draft).log()
    target_probs_XV = torch.from_numpy(target).expand(num_siblings + 1, -1)
    counts: Counter[int] = Counter()
    for start in range(0, num_draws, CHUNK):
        seeds = range(start, min(start + CHUNK, num_draws))
        keys = [independent_row(SamplingParams(seed=seed, max_tokens=1), redraw=0) for seed in seeds]
        noise_XV = noise_of(sample_rows(keys, [0] * len(keys)), vocab_size=vocab_size)
        drawn_XW = gumbel_top_k(log_draft, noise_XV, num_draws=num_siblings).token_ids_XW
        for seed, tokens in zip(seeds, drawn_XW.tolist(), strict=True):
            tried = spoil({(): tokens}, lambda _: draft)[()] if spoil else tokens
            tree = DraftTree(token_ids=tuple(tried), parents=(ROOT,) * len(tried), drafter="test", version=1)
            one = ScoredTree(
                tree=tree,
                target_probs_XV=target_probs_XV[: len(tried) + 1],
                draft_probs_PV=torch.from_numpy(draft)[None][: 1 if tried else 0],
            )
            counts[recursive_rejection(one, KeyedChance(seed=seed, first_position=0)).token_ids[0]] += 1
    return excess(counts, dict(enumerate(target.tolist())))


def test_a_vocabulary_of_4096_keeps_its_law() -> None:
    num_draws = 10 * 4096
    assert smallest_detectable(num_draws, 4096) < 0.09
    assert first_token_excess(4096, num_draws, num_siblings=2) < 0


def test_a_vocabulary_of_64_keeps_its_law() -> None:
    assert smallest_detectable(12_000, 64) < 0.07
    assert first_token_excess(64, 12_000, num_siblings=3) < 0


def test_a_vocabulary_of_4_keeps_its_law() -> None:
    assert smallest_detectable(NUM_REQUESTS, 4) < 0.09
    assert first_token_excess(4, NUM_REQUESTS, num_siblings=3) < 0


@pytest.mark.parametrize("spoil", BIASED_DRAFTS)
def test_a_draft_that_is_no_draw_is_caught(spoil: Spoil) -> None:
    num_siblings = 1 if spoil.__name__ == "unlikely_draw_dropped" else 3
    assert first_token_excess(4, NUM_REQUESTS, num_siblings=num_siblings, spoil=spoil) > 0


# -------------------------------------------------------------------------------------------------- two tokens, jointly

PAIRS = tables(1, 5, difference=1.5)
"""Two tokens of five: 25 cells."""


@pytest.mark.parametrize(
    ("rule", "draw"),
    [
        (recursive_rejection, branching(2, 2)),
        (recursive_rejection, beams(2, 2)),
        (recursive_rejection, beams(3, 2)),
        (block_verification, branching(1, 1, 1)),
    ],
    ids=["constant branching", "two beams", "three beams", "block"],
)
def test_two_tokens_keep_their_joint_law(rule: VerificationRule, draw: DrawTree) -> None:
    assert smallest_detectable(NUM_REQUESTS, 25) < 0.12
    assert excess_of(rule, draw, PAIRS, num_draws=NUM_REQUESTS, length=2) < 0


def test_pruning_sampled_nodes_by_their_paths_is_caught_jointly() -> None:
    def draw(one: Any) -> Any:
        return pruned_by_path(branching(2, 2)(one), one.draft_probs)

    assert excess_of(recursive_rejection, draw, PAIRS, num_draws=NUM_REQUESTS, length=2) > 0


# ------------------------------------------------------------------------------------------- streams that must not meet

COINS = tables(2, 2, spread=0.5, difference=2.0)
"""Three tokens of two, with a draft so poor that most passes are rejected: 8 cells."""


class OneStream(KeyedChance):
    """Mutant: accepts and replaces with the numbers that drew the draft."""

    def __init__(self, *, redraw: int, **key: Any) -> None:
        super().__init__(redraw=redraw, **key)
        self._streams = dict.fromkeys(Purpose, stream(Purpose.DRAFT, redraw=redraw))


class OneUniform(KeyedChance):
    """Mutant: replaces a rejected token with the number that rejected it."""

    def __init__(self, *, redraw: int, **key: Any) -> None:
        super().__init__(redraw=redraw, **key)
        self._streams[Purpose.RESIDUAL] = self._streams[Purpose.ACCEPTANCE]


@pytest.mark.parametrize("chance", [OneStream, OneUniform])
def test_numbers_used_for_two_purposes_are_caught(chance: type[KeyedChance]) -> None:
    assert excess_of(recursive_rejection, branching(1), PAIRS, num_draws=NUM_REQUESTS, length=2, chance=chance) > 0


def test_passes_keep_the_joint_law() -> None:
    assert smallest_detectable(NUM_REQUESTS, 8) < 0.1
    assert excess_of(block_verification, branching(1, 1, 1), COINS, num_draws=NUM_REQUESTS, length=3) < 0


def test_a_pass_that_uses_the_numbers_of_the_pass_before_is_caught() -> None:
    """Why the redraw rises: a block looks at the decisions behind the place where it stops."""
    block = branching(1, 1, 1)
    assert excess_of(block_verification, block, COINS, num_draws=NUM_REQUESTS, length=3, is_redrawn=False) > 0


def test_the_statistic_catches_the_smallest_bias_it_promises() -> None:
    """The power itself: a sampler off by the stated total variation is caught."""
    probs = np.full(64, 1 / 64)
    bias = smallest_detectable(20_000, 64)
    biased = probs + bias / 32 * np.repeat([1, -1], 32)
    counts = np.random.default_rng(1).multinomial(20_000, biased)
    assert excess(dict(enumerate(counts.tolist())), dict(enumerate(probs.tolist()))) > 0
