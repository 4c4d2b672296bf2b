"""Random numbers and logarithms that come out the same on every device: the definition, in plain torch.

Random bits are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Logarithm and
exponential are fixed sequences of IEEE double additions, multiplications and divisions, each rounded on its own, so
that torch on a CPU, torch on CUDA and the C++ kernels give the same bits; a library's `log` would not. No operation
below may be fused into another, and no division may be by a Python number: on CUDA torch multiplies by its reciprocal.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_TOKENS_PER_COUNTER = 4

_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_MANTISSA_BITS = 52
_EXPONENT_BIAS = 1023
_LN2 = math.log(2)
_LOG2_E = 1 / _LN2
# ln 2 in two parts; the first has 21 trailing zero bits, so that its product with a small integer is exact.
_LN2_HIGH = 0.693147180369123816490
_LN2_LOW = 1.90821492927058770002e-10
_LOG_TERMS = tuple(1 / odd for odd in range(3, 21, 2))
_EXP_TERMS = tuple(1 / math.factorial(power) for power in range(12))

WEIGHT_BITS = 42
"""Weights are counted in units of 2**-42 of the largest, so that sums of up to 2**20 of them are exact integers."""

_SMALLEST_EXPONENT = -64.0


Word = TypeVar("Word", int, Tensor)
"""Unsigned 32-bit numbers: one, or an int64 tensor of them."""


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, ...]:
    """Philox4x32-10: four outputs in [0, 2**32) per counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # int64 products wrap, which leaves both 32-bit halves right once the high one is masked.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def fixed_log(values: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64 values, relative error below 1e-15.

    x = m 2**k with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(f) with f = (m - 1) / (m + 1), whose square is at most
    0.0295: the series is cut after f**19 / 19, and what is left out is below 3e-17 of the result.
    """
    bits = values.view(torch.int64)
    exponents = (bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS
    mantissas = (bits - (exponents << _MANTISSA_BITS)).view(torch.float64)
    ratios = (mantissas - 1.0) / (mantissas + 1.0)
    squares = ratios * ratios
    series = torch.full_like(squares, _LOG_TERMS[-1])
    for term in reversed(_LOG_TERMS[:-1]):
        series = series * squares + term
    doubled = ratios + ratios
    return exponents.double() * _LN2 + (doubled + doubled * (squares * series))


def fixed_weights(exponents: Tensor) -> Tensor:
    """exp(x) for float64 x <= 0 (-inf included), in whole units of 2**-WEIGHT_BITS: int64, half to even.

    x = n ln 2 + r with |r| <= ln 2 / 2; e**r by its Taylor polynomial of degree 11, whose remainder is below 1e-14.
    """
    bounded = exponents.clamp(min=_SMALLEST_EXPONENT)  # below it a weight rounds to 0
    powers = (bounded * _LOG2_E).round()
    rest = (bounded - powers * _LN2_HIGH) - powers * _LN2_LOW
    series = torch.full_like(rest, _EXP_TERMS[-1])
    for term in reversed(_EXP_TERMS[:-1]):
        series = series * rest + term
    scales = ((powers.long() + (_EXPONENT_BIAS + WEIGHT_BITS)) << _MANTISSA_BITS).view(torch.float64)
    return (series * scales).round().long()


def gumbel_noise(
    *, seeds_X: Tensor, sample_indices_X: Tensor, redraws_X: Tensor, positions_X: Tensor, vocab_size: int
) -> Tensor:
    """Standard Gumbel noise float64 [X, V] of the tokens at absolute positions; all inputs int64 on one device.

    Key and counter are (seed) and (token // 4, position, sample index, redraw); token % 4 picks the output.
    """
    num_counters = -(-vocab_size // _TOKENS_PER_COUNTER)
    blocks = torch.arange(num_counters, device=positions_X.device).expand(len(positions_X), -1)
    zeros = torch.zeros_like(blocks)
    counter = (
        blocks,
        positions_X.unsqueeze(1) + zeros,
        sample_indices_X.unsqueeze(1) + zeros,
        redraws_X.unsqueeze(1) + zeros,
    )
    seeds = seeds_X.unsqueeze(1)
    bits = torch.stack(philox(counter, (seeds & _MASK, (seeds >> 32) & _MASK)), dim=-1).flatten(1)[:, :vocab_size]
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -fixed_log(-fixed_log(uniform))
