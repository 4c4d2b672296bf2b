"""Choosing tokens from logits: filters, keyed noise and the argmax, for many rows at once.

With x = (logit - largest logit) / temperature in double precision, the choice is argmax(x + G) over the tokens that the
filters keep, ties to the lowest id; G is the noise of `noise.gumbel_noise`. At temperature 0 it is argmax(logit), ties
to the lowest id.

    top-k   keeps logits not below the k-th largest; equals at the border are all kept
    top-p   keeps the fewest most likely tokens whose probability reaches `top_p`, at least one; ties by lowest id.
            Probabilities are compared and summed in units of 2**-42 of the largest one
    min-p   keeps tokens whose probability is at least `min_p` times the largest

A NaN logit counts as -inf. Tokens that equal the largest logit have x = 0 even if that is an infinity: a row without
any finite logit is a row of equals. So the choice is a token of the vocabulary whatever the logits hold.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream_kernels.noise import WEIGHT_BITS, fixed_log, fixed_weights, gumbel_noise

ROW = np.dtype(
    [
        ("seed", "<i8"),
        ("temperature", "<f8"),
        ("top_p", "<f8"),
        ("min_p", "<f8"),
        ("top_k", "<i4"),
        ("sample_index", "<i4"),
        ("redraw", "<i4"),
        ("position", "<i4"),
    ]
)
"""How one row's token is chosen: temperature, filters, and the key of its noise."""

SampleRows = NDArray[np.void]
"""One `ROW` per row of logits."""

_ROW = struct.Struct("<qdddiiii")


def row_bytes(
    *,
    seed: int,
    temperature: float,
    sample_index: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    redraw: int = 0,
) -> bytes:
    """A ROW at position 0, for `sample_rows`; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 filter nothing.

    `seed` in [0, 2**63), `sample_index` and `redraw` in [0, 2**31).
    """
    return _ROW.pack(seed, temperature, top_p, min_p, top_k, sample_index, redraw, 0)


def sample_rows(rows: Sequence[bytes], positions: Sequence[int]) -> SampleRows:
    """ROWs of `row_bytes` (a part may hold several, put together), with the absolute position of each set."""
    packed = np.frombuffer(bytearray().join(rows), ROW)
    packed["position"] = positions
    return packed


def choose(logits_XV: Tensor, rows_X: SampleRows) -> Tensor:
    """The token int32 [X] chosen in each row of fp32 logits, on their device; no synchronisation with it."""
    if len(rows_X) != len(logits_XV):
        raise ValueError(f"{len(rows_X)} sample rows for {len(logits_XV)} rows of logits; give one each")
    return choose_reference(logits_XV, rows_X)


def choose_reference(logits_XV: Tensor, rows_X: SampleRows) -> Tensor:
    """`choose` in plain torch: the definition."""
    device = logits_XV.device
    logits_XV = _without_nan(logits_XV)
    greedy_X = logits_XV.argmax(dim=-1)
    if not rows_X["temperature"].any():
        return greedy_X.int()
    temperatures_X = torch.from_numpy(rows_X["temperature"].copy()).to(device)
    is_greedy_X = temperatures_X == 0
    scaled_XV = _relative(logits_XV) / torch.where(is_greedy_X, 1.0, temperatures_X).unsqueeze(1)
    noise_XV = gumbel_noise(
        seeds_X=_column(rows_X, "seed", device),
        sample_indices_X=_column(rows_X, "sample_index", device),
        redraws_X=_column(rows_X, "redraw", device),
        positions_X=_column(rows_X, "position", device),
        vocab_size=logits_XV.shape[1],
    )
    is_kept_XV = _kept(logits_XV, scaled_XV, rows_X)
    chosen_X = torch.where(is_kept_XV, scaled_XV + noise_XV, -torch.inf).argmax(dim=-1)
    return torch.where(is_greedy_X, greedy_X, chosen_X).int()


def _column(rows_X: SampleRows, name: str, device: torch.device) -> Tensor:
    return torch.from_numpy(rows_X[name].astype(np.int64)).to(device)


def _without_nan(logits_XV: Tensor) -> Tensor:
    return torch.where(logits_XV.isnan(), -torch.inf, logits_XV)


def _relative(logits_XV: Tensor) -> Tensor:
    """Logits less the largest of the row, float64 [X, V]; exactly 0 where they equal it."""
    largest_X1 = logits_XV.amax(dim=-1, keepdim=True)
    return torch.where(logits_XV == largest_X1, 0.0, logits_XV.double() - largest_X1.double())


def _kept(logits_XV: Tensor, scaled_XV: Tensor, rows_X: SampleRows) -> Tensor:
    """Which tokens the filters keep, bool [X, V]."""
    device, vocab_size = logits_XV.device, logits_XV.shape[1]
    is_kept_XV = torch.ones_like(logits_XV, dtype=torch.bool)
    if rows_X["top_k"].any():
        top_k_X1 = _column(rows_X, "top_k", device).unsqueeze(1)
        ranks_X1 = torch.where(top_k_X1 > 0, top_k_X1, vocab_size).clamp(max=vocab_size) - 1
        is_kept_XV = logits_XV >= logits_XV.sort(dim=-1, descending=True).values.gather(1, ranks_X1)
    if (rows_X["top_p"] < 1).any():
        top_p_X1 = torch.from_numpy(rows_X["top_p"].copy()).to(device).unsqueeze(1)
        weights_XV = torch.where(is_kept_XV, fixed_weights(scaled_XV), 0)
        is_kept_XV = is_kept_XV & (_is_in_nucleus(weights_XV, top_p_X1) | (top_p_X1 >= 1))
    if (rows_X["min_p"] > 0).any():
        min_p_X1 = torch.from_numpy(rows_X["min_p"].copy()).to(device).unsqueeze(1)
        smallest_X1 = fixed_log(torch.where(min_p_X1 > 0, min_p_X1, 1.0))
        is_kept_XV = is_kept_XV & ((scaled_XV >= smallest_X1) | (min_p_X1 <= 0))
    return is_kept_XV


def _is_in_nucleus(weights_XV: Tensor, top_p_X1: Tensor) -> Tensor:
    """Whether the weights before a token, most likely first, stay short of `top_p` of the sum."""
    ordered_XV, order_XV = weights_XV.sort(dim=-1, descending=True, stable=True)
    before_XV = ordered_XV.cumsum(dim=-1) - ordered_XV
    limits_X1 = weights_XV.sum(dim=-1, keepdim=True).double() * top_p_X1
    is_within_XV = before_XV.double() < limits_X1
    is_within_XV[:, 0] = True
    return torch.zeros_like(is_within_XV).scatter(1, order_XV, is_within_XV)


class TopLogprobs(NamedTuple):
    """Log-probabilities of G rows, on the logits' device.

    `logprobs_G` fp32 of the given tokens; the N most likely tokens `top_ids_GN` int32, best first, ties by lowest id,
    and theirs, `top_logprobs_GN` fp32.
    """

    logprobs_G: Tensor
    top_ids_GN: Tensor
    top_logprobs_GN: Tensor


def top_logprobs(logits_XV: Tensor, rows: Sequence[int], token_ids: Sequence[int], *, num_top: int) -> TopLogprobs:
    """Log-probabilities of raw logits: of one token in each of the rows named, and of the `num_top` most likely.

    `num_top` is at most the size of the vocabulary. Probabilities are summed in units of 2**-42 of the largest, which
    makes a result independent of the order of the sum.
    """
    if not 0 <= num_top <= logits_XV.shape[1]:
        raise ValueError(f"num_top is {num_top}; expected 0 to the size of the vocabulary, {logits_XV.shape[1]}")
    return top_logprobs_reference(logits_XV, rows, token_ids, num_top=num_top)


def top_logprobs_reference(
    logits_XV: Tensor, rows: Sequence[int], token_ids: Sequence[int], *, num_top: int
) -> TopLogprobs:
    """`top_logprobs` in plain torch: the definition."""
    device = logits_XV.device
    logits_GV = _without_nan(logits_XV[torch.tensor(rows, dtype=torch.int64, device=device)])
    relative_GV = _relative(logits_GV)
    sums_G1 = fixed_weights(relative_GV).sum(dim=-1, keepdim=True).double() * 2.0**-WEIGHT_BITS
    logprobs_GV = (relative_GV - fixed_log(sums_G1)).float()
    tokens_G1 = torch.tensor(token_ids, dtype=torch.int64, device=device).unsqueeze(1)
    top_ids_GN = logits_GV.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    return TopLogprobs(logprobs_GV.gather(1, tokens_G1).squeeze(1), top_ids_GN.int(), logprobs_GV.gather(1, top_ids_GN))
