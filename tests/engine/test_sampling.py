"""The noise is Philox, the choice is an exact draw from the target, and a biased rule is caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import chi2, ncx2
from torch import Tensor

from slipstream.engine.request import SamplingParams
from slipstream.engine.sampling import draft_tokens, filtered, gumbel_noise, philox, target_tokens


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.int64) for value in values)


# Known answers published with Random123 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    outputs = philox(words(*counter), words(*key))  # type: ignore[arg-type]
    assert tuple(int(one) for one in outputs) == expected


def test_noise_depends_on_each_part_of_its_key_and_on_nothing_else() -> None:
    def noise_of(seed: int = 2**40 + 3, positions: tuple[int, ...] = (5, 6), vocab: int = 10, **key: int) -> Tensor:
        key = {"sample_index": 0} | key
        return gumbel_noise(seed=seed, positions_T=torch.tensor(positions), vocab_size=vocab, **key)

    noise = noise_of()
    assert torch.equal(noise[1:], noise_of(positions=(6,)))
    assert torch.equal(noise[:, :7], noise_of(vocab=7))
    others = [noise_of(seed=3), noise_of(sample_index=1), noise_of(positions=(7, 8)), noise_of(redraw=1)]
    assert all(not torch.equal(noise, other) for other in others)


# The chi-square test below: n = 200,000 draws, alpha = 1e-4, fixed seeds. Its power against the smallest total
# variation it must see is computed, not assumed.
NUM_DRAWS = 200_000
ALPHA = 1e-4
SMALLEST_TOTAL_VARIATION = 0.01
LOGITS = torch.tensor([1.2, -0.3, 0.0, 2.1, -1.5, 0.7, -0.2, 0.4])
PROBS = LOGITS.double().softmax(-1)


def statistic(tokens: Tensor) -> float:
    counts = torch.bincount(tokens, minlength=len(PROBS)).double()
    expected = PROBS * len(tokens)
    return float(((counts - expected) ** 2 / expected).sum())


def draw(choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Tokens of NUM_DRAWS positions whose logits are all LOGITS."""
    positions = torch.arange(NUM_DRAWS)
    return choose(LOGITS.expand(NUM_DRAWS, -1), positions)


def sampled(logits: Tensor, positions: Tensor) -> Tensor:
    return target_tokens(logits, SamplingParams(seed=11, max_tokens=1), positions)


def test_the_test_has_the_power_it_claims() -> None:
    critical = chi2.isf(ALPHA, len(PROBS) - 1)
    # The least favourable shift of total variation t moves mass t between the two most likely tokens.
    top = PROBS.sort(descending=True).values[:2]
    noncentrality = NUM_DRAWS * SMALLEST_TOTAL_VARIATION**2 * float((1 / top).sum())
    assert ncx2.sf(critical, len(PROBS) - 1, noncentrality) > 0.99


def test_the_sampler_draws_from_the_target() -> None:
    assert statistic(draw(sampled)) < chi2.isf(ALPHA, len(PROBS) - 1)


def test_pairs_of_neighbouring_positions_are_independent() -> None:
    tokens = draw(sampled)
    pairs = tokens[0::2] * len(PROBS) + tokens[1::2]
    expected = torch.outer(PROBS, PROBS).flatten() * len(pairs)
    counts = torch.bincount(pairs, minlength=len(expected)).double()
    assert float(((counts - expected) ** 2 / expected).sum()) < chi2.isf(ALPHA, len(expected) - 1)


def biased_keep_the_draft(logits: Tensor, positions: Tensor) -> Tensor:
    """Wrong: takes the draft's token whenever the target gives it a fair chance."""
    draft = (logits * 0.8).roll(1, -1)
    proposals = draft_tokens(draft, temperature=1.0, seed=11, sample_index=0, positions_T=positions)
    is_likely = logits.softmax(-1).gather(1, proposals.unsqueeze(1)).squeeze(1) > 0.15
    return torch.where(is_likely, proposals, sampled(logits, positions))


def biased_temperature(logits: Tensor, positions: Tensor) -> Tensor:
    """Wrong: noise a little too small, as a bug in the noise's scale would be."""
    noise = gumbel_noise(seed=11, sample_index=0, positions_T=positions, vocab_size=logits.shape[1])
    return (logits + 0.95 * noise).argmax(-1)


@pytest.mark.parametrize("rule", [biased_keep_the_draft, biased_temperature])
def test_a_biased_rule_fails_the_same_test(rule: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert statistic(draw(rule)) > chi2.isf(ALPHA, len(PROBS) - 1)


def test_filters_keep_what_their_definition_says() -> None:
    scaled = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    assert (filtered(scaled, top_k=1, top_p=1.0) > -torch.inf).tolist() == [[True, False, False, False]]
    assert (filtered(scaled, top_k=2, top_p=1.0) > -torch.inf).tolist() == [[True, True, True, False]]
    assert (filtered(scaled, top_k=0, top_p=0.6) > -torch.inf).tolist() == [[True, True, False, False]]
    assert (filtered(scaled, top_k=0, top_p=0.01) > -torch.inf).tolist() == [[True, False, False, False]]


def test_a_draft_equal_to_the_target_proposes_the_targets_tokens() -> None:
    positions = torch.arange(500)
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    proposals = draft_tokens(logits, temperature=0.7, seed=5, sample_index=0, positions_T=positions)
    chosen = target_tokens(logits, SamplingParams(seed=5, max_tokens=1, temperature=0.7), positions)
    assert torch.equal(proposals, chosen)
