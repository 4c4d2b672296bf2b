"""Choosing and log-probabilities: the compiled ops equal plain torch bit for bit, and survive whatever logits hold."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

import slipstream_kernels
from slipstream_kernels.logprobs import HostLogprobs, TopLogprobs, top_logprobs, top_logprobs_reference
from slipstream_kernels.noise import gumbel_noise
from slipstream_kernels.sampling import (
    SampleRows,
    best_choices,
    best_choices_reference,
    choose,
    choose_reference,
    noise,
    row_bytes,
    sample_rows,
)

VOCAB_SIZES = [1, 2, 7, 63, 64, 65, 4096, 32000]
TEMPERATURES = [0.0, 1e-3, 0.3, 1.0, 2.0]
TOP_KS = [0, 1, 3, 50, 40_000]
TOP_PS = [1.0, 0.999, 0.9, 0.5, 0.0]
MIN_PS = [0.0, 0.02, 0.5, 1.0]
SCALES = [0.0, 0.01, 1.0, 5.0, 1e30]


def random_rows(number: int, seed: int) -> SampleRows:
    """Rows over the whole grid of temperatures and filters, each with a seed of its own."""
    chance = random.Random(seed)
    grid = list(itertools.product(TEMPERATURES, TOP_KS, TOP_PS, MIN_PS))
    rows = [
        row_bytes(
            seed=chance.getrandbits(63),
            sample_index=chance.randrange(4),
            redraw=chance.randrange(2),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        for temperature, top_k, top_p, min_p in chance.choices(grid, k=number)
    ]
    return sample_rows(rows, [chance.randrange(2**20) for _ in range(number)])


def random_logits(num_rows: int, vocab_size: int, scale: float) -> Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale
    return logits.round() if scale == 5.0 else logits  # whole numbers: equals everywhere


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_choices_equal_plain_torch(isa: str, vocab_size: int, scale: float) -> None:
    num_rows = 8 if vocab_size > 5000 else 60
    logits, rows = random_logits(num_rows, vocab_size, scale), random_rows(num_rows, vocab_size)
    assert torch.equal(choose(logits, rows), choose_reference(logits, rows))


def agree_on_choices(logits: Tensor, rows: SampleRows) -> bool:
    """Whether the compiled kernels and plain torch name the same tokens, as sure of them but for rounding."""
    out, expected = best_choices(logits, rows), best_choices_reference(logits, rows)
    assert (out.token_ids_XR[:, 0] == choose(logits, rows).numpy()).all()
    np.testing.assert_allclose(out.shares_XR, expected.shares_XR, rtol=1e-9, atol=1e-15)
    return np.array_equal(out.token_ids_XR, expected.token_ids_XR)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_best_choices_equal_plain_torch(isa: str, vocab_size: int, scale: float) -> None:
    num_rows = 8 if vocab_size > 5000 else 60
    logits, rows = random_logits(num_rows, vocab_size, scale), random_rows(num_rows, vocab_size)
    assert agree_on_choices(logits, rows)


def test_the_second_choice_is_what_would_be_chosen_without_the_first(isa: str) -> None:
    logits, rows = random_logits(60, 4096, 1.0), random_rows(60, 4)
    rows["top_k"], rows["top_p"], rows["min_p"] = 0, 1.0, 0.0
    choices = best_choices(logits, rows)
    first, second = torch.from_numpy(choices.token_ids_XR).long().T
    assert torch.equal(choose(logits.scatter(1, first.unsqueeze(1), -math.inf), rows).long(), second)
    assert (choices.shares_XR[:, 0] >= choices.shares_XR[:, 1]).all()


def are_equal(out: TopLogprobs | HostLogprobs, expected: TopLogprobs) -> bool:
    """Bit for bit; `out` is what the compiled kernels gave."""
    assert isinstance(out, HostLogprobs)
    return all(torch.equal(torch.from_numpy(one), other) for one, other in zip(out, expected, strict=True))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_log_probabilities_equal_plain_torch(isa: str, vocab_size: int, scale: float) -> None:
    logits = random_logits(9, vocab_size, scale)
    chance = random.Random(vocab_size)
    rows, tokens = chance.choices(range(9), k=12), chance.choices(range(vocab_size), k=12)
    for num_top in {0, 1, 16, 256, 4096}:
        out = top_logprobs(logits, rows, tokens, num_top=num_top)
        expected = top_logprobs_reference(logits, rows, tokens, num_top=num_top)
        assert are_equal(out, expected)


def test_noise_has_the_same_bits_as_in_plain_torch(isa: str) -> None:
    row = sample_rows([row_bytes(seed=2**62 + 7, temperature=1.0, sample_index=3, redraw=1)], [77])
    key = {"seeds_X": 2**62 + 7, "sample_indices_X": 3, "redraws_X": 1, "positions_X": 77}
    expected = gumbel_noise(**{name: torch.tensor([value]) for name, value in key.items()}, vocab_size=1_000_003)
    assert torch.equal(torch.from_numpy(noise(row, 1_000_003)), expected[0])


def test_a_row_is_chosen_alike_alone_in_a_batch_and_on_two_threads(isa: str) -> None:
    logits, rows = random_logits(40, 4096, 1.0), random_rows(40, 0)  # enough work to be shared among threads
    together = choose(logits, rows)
    alone = torch.cat([choose(logits[x : x + 1], rows[x : x + 1].copy()) for x in range(40)])
    slipstream_kernels.set_num_threads(2)
    assert torch.equal(together, alone)
    assert torch.equal(together, choose(logits, rows))


def test_rows_may_lie_apart_in_memory(isa: str) -> None:
    wide, rows = random_logits(6, 130, 1.0), random_rows(6, 1)
    assert torch.equal(choose(wide[:, :65], rows), choose(wide[:, :65].contiguous(), rows))
    assert torch.equal(choose(wide.T.contiguous().T, rows), choose(wide, rows))


# Each row's logits, and the tokens that may come out at temperature 1 without filters.
INF, NAN = math.inf, math.nan
ODD_ROWS = {
    "not a number counts as -inf": ([0.0, NAN, 1.0, -INF, NAN], {0, 2}),
    "only not-a-numbers are equals": ([NAN] * 5, {0, 1, 2, 3, 4}),
    "only -inf are equals": ([-INF, NAN, -INF, -INF, -INF], {0, 1, 2, 3, 4}),
    "+inf wins against all that is finite": ([3e38, INF, 0.0, NAN, INF], {1, 4}),
    "huge logits do not drown the noise of equals": ([3e38, 3e38, -3e38, 0.0, NAN], {0, 1}),
}


@pytest.mark.parametrize("name", ODD_ROWS)
@pytest.mark.parametrize("num_copies", [1, 14])
def test_odd_logits_give_a_token_of_the_vocabulary(isa: str, name: str, num_copies: int) -> None:
    values, expected = ODD_ROWS[name]
    logits = torch.tensor([values * num_copies]).expand(200, -1)
    rows = sample_rows([row_bytes(seed=x, temperature=1.0) for x in range(200)], range(200))
    assert {token % 5 for token in choose(logits, rows).tolist()} == expected
    mixed = random_rows(200, 3)
    assert torch.equal(choose(logits, mixed), choose_reference(logits, mixed))
    assert agree_on_choices(logits, mixed)
    some = [0, 1], [0, 1]
    out, reference = top_logprobs(logits, *some, num_top=5), top_logprobs_reference(logits, *some, num_top=5)
    assert are_equal(out, reference)


def test_greedy_ties_go_to_the_lowest_id(isa: str) -> None:
    logits = torch.zeros(3, 200)
    logits[1, [17, 90, 199]] = 1.0
    logits[2] = -torch.inf
    assert choose(logits, sample_rows([row_bytes(seed=0, temperature=0.0)] * 3, range(3))).tolist() == [0, 17, 0]


def test_log_probabilities_are_those_of_log_softmax(isa: str) -> None:
    logits = random_logits(4, 4096, 5.0)
    out = TopLogprobs(*map(torch.as_tensor, top_logprobs(logits, range(4), [5, 6, 7, 8], num_top=16)))
    expected = logits.double().log_softmax(-1)
    assert (out.logprobs_G - expected[range(4), [5, 6, 7, 8]]).abs().max() < 2e-6
    assert (out.top_logprobs_GN - expected.gather(1, out.top_ids_GN.long())).abs().max() < 2e-6
    assert torch.equal(out.top_ids_GN.long(), logits.sort(dim=-1, descending=True, stable=True).indices[:, :16])


def test_arguments_that_would_read_outside_the_logits_are_refused() -> None:
    logits, rows = torch.zeros(2, 8), random_rows(2, 0)
    with pytest.raises(ValueError, match="2 sample rows for 1 rows"):
        choose(logits[:1], rows)
    with pytest.raises(ValueError, match="rows are"):
        top_logprobs(logits, [2], [0], num_top=1)
    with pytest.raises(ValueError, match="token ids are"):
        top_logprobs(logits, [0], [8], num_top=1)
    with pytest.raises(ValueError, match="num_top is -1"):
        top_logprobs(logits, [0], [0], num_top=-1)
    with pytest.raises(ValueError, match="temperature is nan"):
        row_bytes(seed=0, temperature=NAN)
