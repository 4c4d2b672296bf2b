"""Random bits are Philox's, noise depends on its key alone, and our logarithm and exponential keep their bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slipstream_kernels.noise import WEIGHT_BITS, fixed_log, fixed_weights, gumbel_noise, philox


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


def noise_of(
    *, seed: int = 2**40 + 3, sample: int = 0, redraw: int = 0, positions: tuple[int, ...] = (5, 6), vocab: int = 10
) -> Tensor:
    seeds, samples, redraws = (torch.full((len(positions),), one) for one in (seed, sample, redraw))
    return gumbel_noise(
        seeds_X=seeds,
        sample_indices_X=samples,
        redraws_X=redraws,
        positions_X=torch.tensor(positions),
        vocab_size=vocab,
    )


def test_noise_depends_on_each_part_of_its_key_and_on_nothing_else() -> None:
    noise = noise_of()
    assert torch.equal(noise[1:], noise_of(positions=(6,)))
    assert torch.equal(noise[:, :7], noise_of(vocab=7))
    others = [noise_of(seed=3), noise_of(seed=2**41 + 3), noise_of(sample=1), noise_of(positions=(7, 8))]
    assert all(not torch.equal(noise, other) for other in [*others, noise_of(redraw=1)])
    assert len(noise.unique()) == noise.numel()


def uniforms() -> Tensor:
    """What the noise takes logarithms of: both ends of the range of random bits, and much of what lies between."""
    bits = torch.randint(0, 2**32, (100_000,), generator=torch.Generator().manual_seed(0))
    ends = torch.arange(10_000)
    return (torch.cat([bits, ends, 2**32 - 1 - ends]).double() + 0.5) * 2.0**-32


@pytest.mark.parametrize("power", [0, 1], ids=["of a uniform number", "of its logarithm"])
def test_the_logarithm_is_within_its_bound(power: int) -> None:
    values = uniforms() if power == 0 else -fixed_log(uniforms())
    expected = torch.tensor([math.log(value) for value in values.tolist()], dtype=torch.float64)
    errors = (fixed_log(values) - expected).abs() / expected.abs().clamp(min=1e-300)
    assert errors[expected != 0].max() < 1e-15
    assert fixed_log(torch.ones(1, dtype=torch.float64)).item() == 0


def test_weights_are_the_exponential_to_half_a_unit() -> None:
    exponents = -32 * torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.tensor([math.exp(value) for value in exponents.tolist()], dtype=torch.float64) * 2.0**WEIGHT_BITS
    # Half a unit from rounding to whole ones, the rest from a relative error below 2e-14 of up to 2**42 units.
    assert (fixed_weights(exponents) - expected).abs().max() <= 0.5 + 2e-14 * 2**WEIGHT_BITS
    ends = torch.tensor([0.0, -torch.inf, -1e6], dtype=torch.float64)
    assert fixed_weights(ends).tolist() == [2**WEIGHT_BITS, 0, 0]
