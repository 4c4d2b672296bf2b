"""The sampling contract: which token the target emits at a position, as a function of logits and keyed noise.

The token at a position is argmax(logits / temperature + G) over the tokens that the filters keep, where G is Gumbel
noise keyed by (seed, sample index, absolute position, token, redraw): an exact draw from the target's distribution
(the Gumbel-max trick), and one that does not depend on drafts, batches or preemption. At temperature 0 it is
argmax(logits). A drafter draws its candidates with the same noise, which is what makes them likely to be equal.

Random bits are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.engine.request import SamplingParams

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_TOKENS_PER_COUNTER = 4


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four outputs in [0, 2**32) per counter; all tensors int64 holding unsigned 32-bit values."""
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


def gumbel_noise(
    *, seed: int | Tensor, sample_index: int | Tensor, positions_T: Tensor, vocab_size: int, redraw: int = 0
) -> Tensor:
    """Standard Gumbel noise float64 [T, V] of the tokens at absolute positions `positions_T` (int64).

    `seed` in [0, 2**63) and `sample_index` are numbers or int64 tensors [T]. `redraw` is 0 under the equality rule.
    """
    seeds = torch.as_tensor(seed, dtype=torch.int64).expand(len(positions_T)).unsqueeze(1)
    samples = torch.as_tensor(sample_index, dtype=torch.int64).expand(len(positions_T)).unsqueeze(1)
    num_counters = -(-vocab_size // _TOKENS_PER_COUNTER)
    blocks = torch.arange(num_counters).expand(len(positions_T), -1)
    zeros = torch.zeros_like(blocks)
    counter = (blocks, positions_T.unsqueeze(1) + zeros, samples + zeros, redraw + zeros)
    key = (seeds & _MASK, (seeds >> 32) & _MASK)
    bits = torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :vocab_size]
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


def draft_tokens(
    logits_TV: Tensor, *, temperature: float, seed: int | Tensor, sample_index: int | Tensor, positions_T: Tensor
) -> Tensor:
    """The draft's candidate int64 [T] for each absolute position, drawn with the request's own noise."""
    if temperature == 0:
        return logits_TV.argmax(dim=-1)
    noise_TV = gumbel_noise(
        seed=seed, sample_index=sample_index, positions_T=positions_T, vocab_size=logits_TV.shape[1]
    )
    return (logits_TV.double() / temperature + noise_TV).argmax(dim=-1)


def target_tokens(logits_TV: Tensor, sampling: SamplingParams, positions_T: Tensor) -> Tensor:
    """The target's token int64 [T] at each absolute position of one request."""
    if sampling.temperature == 0:
        return logits_TV.argmax(dim=-1)
    scaled_TV = filtered(logits_TV.double() / sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    noise_TV = gumbel_noise(
        seed=sampling.seed,
        sample_index=sampling.sample_index,
        positions_T=positions_T,
        vocab_size=logits_TV.shape[1],
    )
    return (scaled_TV + noise_TV).argmax(dim=-1)


def filtered(scaled_TV: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Scaled logits with the tokens that top-k, then top-p remove set to -inf.

    Top-p keeps the fewest most likely tokens whose probability reaches `top_p`, at least one. Equals at the border of
    top-k are all kept, so that the result does not depend on a sort's order.
    """
    if 0 < top_k < scaled_TV.shape[1]:
        smallest_kept = scaled_TV.topk(top_k, dim=-1).values[:, -1:]
        scaled_TV = scaled_TV.masked_fill(scaled_TV < smallest_kept, -torch.inf)
    if top_p < 1:
        probs, order = scaled_TV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        is_beyond = probs.cumsum(dim=-1) - probs >= top_p
        scaled_TV = scaled_TV.masked_fill(torch.zeros_like(is_beyond).scatter(1, order, is_beyond), -torch.inf)
    return scaled_TV
