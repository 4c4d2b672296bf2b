"""Choosing tokens from logits: filters, keyed noise and the argmax, for many rows at once.

With x = (logit - largest logit) / temperature in double precision, the choice is argmax(x + G) over the tokens that the
filters keep, ties to the lowest id; G is the noise of `noise.gumbel_noise`. At temperature 0 it is argmax(logit), ties
to the lowest id.

    top-k   keeps logits not below the k-th largest; equals at the border are all kept
    top-p   keeps the fewest most likely tokens whose probability reaches `top_p`, at least one; ties by lowest id.
            Probabilities are compared and summed in units of 2**-42 of the largest one
    min-p   keeps tokens whose probability, in the same units, is at least `min_p` times the largest

A NaN logit counts as -inf. Tokens that equal the largest logit have x = 0 even if that is an infinity: a row without
any finite logit is a row of equals. So the choice is a token of the vocabulary whatever the logits hold.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from slipstream_kernels.address import address_of
from slipstream_kernels.isa import instruction_set, is_available, typed
from slipstream_kernels.noise import WEIGHT_BITS, fixed_weights, gumbel_noise

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
_POSITION = struct.Struct("<i")

_NO_TOKEN = -1


NUM_CHOICES = 2
"""Tokens of a row that `best_choices` names."""

_NUM_COMPARED = 8
"""Tokens of a row among which it says how sure they are."""


class StopTokens(NamedTuple):
    """The tokens that end the outputs of B requests: those of request b end before `ends_B[b]`; both int32."""

    ids_X: NDArray[np.int32]
    ends_B: NDArray[np.int32]


@functools.lru_cache(maxsize=256)
def stop_tokens(ids_of: tuple[tuple[int, ...], ...]) -> StopTokens:
    """Those of every request, in order; not to be changed, as the next step most likely asks for the same."""
    ids = [token for ids in ids_of for token in ids]
    return StopTokens(np.array(ids, np.int32), np.cumsum([len(ids) for ids in ids_of], dtype=np.int32))


_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64
_compiled = typed(
    {
        "best_choices": (None, (_ADDRESS, _COUNT, _COUNT, _COUNT, *[_ADDRESS] * 3)),
        "choose": (None, (_ADDRESS, _COUNT, _COUNT, _COUNT, _ADDRESS, _ADDRESS)),
        "gumbel_noise": (None, (_ADDRESS, _COUNT, _ADDRESS)),
    }
)


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
    """A ROW at position 0; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 filter nothing.

    `seed` in [0, 2**63), `sample_index` and `redraw` in [0, 2**31). Raises ValueError for another temperature than a
    finite one from 0 up: anything else gives no distribution.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a finite number from 0 up")
    return _ROW.pack(seed, temperature, top_p, min_p, top_k, sample_index, redraw, 0)


def at_position(row: bytes, position: int) -> bytes:
    """A ROW of `row_bytes` at this absolute position, in [0, 2**31)."""
    return row[: -_POSITION.size] + _POSITION.pack(position)


def sample_rows(rows: Sequence[bytes], positions: Sequence[int]) -> SampleRows:
    """ROWs of `row_bytes` (a part may hold several, put together), with the absolute position of each set."""
    packed = np.frombuffer(bytearray().join(rows), ROW)
    packed["position"] = positions
    return packed


def choose(logits_XV: Tensor, rows_X: SampleRows) -> Tensor:
    """The token int32 [X] chosen in each row of fp32 logits, on their device; no synchronisation with it."""
    chosen_X = _choice(logits_XV, rows_X)
    return chosen_X if isinstance(chosen_X, Tensor) else torch.tensor(chosen_X, dtype=torch.int32)


def chosen_ids(logits_XV: Tensor, rows_X: SampleRows) -> list[int]:
    """`choose`, read from the device."""
    return _choice(logits_XV, rows_X).tolist()  # type: ignore[no-any-return]


def _choice(logits_XV: Tensor, rows_X: SampleRows) -> Tensor | array[int]:
    rows = kernel_rows(logits_XV)
    num_rows = len(logits_XV) if rows is None else rows.number
    if len(rows_X) != num_rows:
        raise ValueError(f"{len(rows_X)} sample rows for {num_rows} rows of logits; give one each")
    if rows is None:
        return choose_reference(logits_XV, rows_X)
    chosen_X = array("i", bytes(4 * num_rows))
    _compiled("choose", instruction_set())(
        rows.address, rows.stride, num_rows, rows.vocab_size, address_of(rows_X), chosen_X.buffer_info()[0]
    )
    return chosen_X


class KernelRows(NamedTuple):
    """Where the compiled kernels find fp32 logits [number, vocab_size], rows `stride` floats apart."""

    address: int
    stride: int
    number: int
    vocab_size: int


def kernel_rows(logits_XV: Tensor) -> KernelRows | None:
    """Where the compiled kernels find these logits; None if they cannot read them.

    Kept with the tensor, whose storage must stay its own: behind a pass of the target every first look at something
    costs misses of all caches, and asking a tensor five questions took as long as choosing a hundred tokens.
    """
    known: KernelRows | None = getattr(logits_XV, _KNOWN, None)
    if known is None and _is_for_kernels(logits_XV):
        known = KernelRows(logits_XV.data_ptr(), logits_XV.stride(0), *logits_XV.shape)
        setattr(logits_XV, _KNOWN, known)
    return known


_KNOWN = "_slipstream_kernel_rows"


def _is_for_kernels(logits_XV: Tensor) -> bool:
    return (
        logits_XV.device.type == "cpu"
        and logits_XV.dtype == torch.float32
        and logits_XV.stride(1) == 1
        and is_available()
    )


def noise(row: SampleRows, vocab_size: int) -> NDArray[np.float64]:
    """The noise [V] that the compiled kernels give one sample row; they must be available."""
    out = np.empty(vocab_size)
    _compiled("gumbel_noise", instruction_set())(address_of(row), vocab_size, address_of(out))
    return out


def choose_reference(logits_XV: Tensor, rows_X: SampleRows) -> Tensor:
    """`choose` in plain torch: the definition."""
    if not rows_X["temperature"].any():
        return without_nan(logits_XV).argmax(dim=-1).int()
    has_top_k, has_shares = _filters_of(rows_X)
    rows = device_rows(rows_X, logits_XV.device)
    return choose_on_device(logits_XV, rows, has_top_k=has_top_k, has_shares=has_shares)


def _filters_of(rows_X: SampleRows) -> tuple[bool, bool]:
    """Whether any row asks for top-k, and for top-p or min-p."""
    return bool(rows_X["top_k"].any()), bool(((rows_X["top_p"] < 1) | (rows_X["min_p"] > 0)).any())


class DeviceRows(NamedTuple):
    """Sample rows as tensors [X] of one device: the first three float64, the others int64."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor
    sample_index: Tensor
    redraw: Tensor
    top_k: Tensor


def device_rows(rows_X: SampleRows, device: torch.device) -> DeviceRows:
    """The rows on a device, in two transfers that nobody waits for."""
    reals = np.stack([rows_X[name] for name in DeviceRows._fields[:3]])
    integers = np.stack([rows_X[name].astype(np.int64) for name in DeviceRows._fields[3:]])
    return DeviceRows(
        *(row for part in (reals, integers) for row in torch.from_numpy(part).to(device, non_blocking=True))
    )


class Choices(NamedTuple):
    """The best tokens of X rows: `token_ids_XR` int32, -1 where no token is left, and `shares_XR` float64; arrays."""

    token_ids_XR: NDArray[np.int32]
    shares_XR: NDArray[np.float64]


def best_choices(logits_XV: Tensor, rows_X: SampleRows) -> Choices:
    """What `choose` chooses in each row, what it would choose if that token were not there, and how sure it is of them.

    A token's share is its part of the softmax of logits + temperature x noise, among the eight tokens that the filters
    keep where that is largest: how sure its choice is for a model whose logits differ by some and whose noise is the
    same. At temperature 0 there are neither noise nor filters.
    """
    rows = kernel_rows(logits_XV)
    if rows is None:
        return best_choices_reference(logits_XV, rows_X)
    shape = rows.number, NUM_CHOICES
    choices = Choices(np.empty(shape, np.int32), np.empty(shape))
    _compiled("best_choices", instruction_set())(
        rows.address, rows.stride, rows.number, rows.vocab_size, address_of(rows_X), *map(address_of, choices)
    )
    return choices


def best_choices_reference(logits_XV: Tensor, rows_X: SampleRows) -> Choices:
    """`best_choices` in plain torch: the definition."""
    logits_XV = without_nan(logits_XV)
    scores_XV = relative(logits_XV)
    rows = device_rows(rows_X, logits_XV.device)
    is_greedy_X1 = (rows.temperature == 0).unsqueeze(1)
    if rows_X["temperature"].any():
        has_top_k, has_shares = _filters_of(rows_X)
        perturbed_XV = _perturbed(logits_XV, rows, has_top_k=has_top_k, has_shares=has_shares)
        scores_XV = torch.where(is_greedy_X1, scores_XV, perturbed_XV)
    best = scores_XV.sort(dim=-1, descending=True, stable=True)
    values_XN = best.values[:, :_NUM_COMPARED]
    scales_X1 = torch.where(is_greedy_X1, 1.0, rows.temperature.unsqueeze(1))
    shares_XR = ((values_XN - values_XN[:, :1]) * scales_X1).softmax(dim=-1)[:, :NUM_CHOICES]
    ids_XR = best.indices[:, :NUM_CHOICES].where(values_XN[:, :NUM_CHOICES] > -torch.inf, _NO_TOKEN).int()
    missing = (0, NUM_CHOICES - ids_XR.shape[1])
    padded = (functional.pad(ids_XR, missing, value=_NO_TOKEN), functional.pad(shares_XR, missing))
    return Choices(*(one.cpu().numpy() for one in padded))


def choose_on_device(logits_XV: Tensor, rows: DeviceRows, *, has_top_k: bool, has_shares: bool) -> Tensor:
    """`choose` as operations on tensors of one device alone: no transfer, no synchronisation, shapes fixed by [X, V].

    `has_top_k` and `has_shares` say whether any row asks for top-k, and for top-p or min-p.
    """
    logits_XV = without_nan(logits_XV)
    chosen_X = _perturbed(logits_XV, rows, has_top_k=has_top_k, has_shares=has_shares).argmax(dim=-1)
    return torch.where(rows.temperature == 0, logits_XV.argmax(dim=-1), chosen_X).int()


def _perturbed(logits_XV: Tensor, rows: DeviceRows, *, has_top_k: bool, has_shares: bool) -> Tensor:
    """What the choice is the largest of, float64 [X, V]; -inf for tokens that the filters remove."""
    scaled_XV = _scaled(logits_XV, rows)
    noise_XV = gumbel_noise(
        seeds_X=rows.seed,
        sample_indices_X=rows.sample_index,
        redraws_X=rows.redraw,
        positions_X=rows.position,
        vocab_size=logits_XV.shape[1],
    )
    is_kept_XV = _is_kept(logits_XV, scaled_XV, rows, has_top_k=has_top_k, has_shares=has_shares)
    return torch.where(is_kept_XV, scaled_XV + noise_XV, -torch.inf)


def probabilities(logits_XV: Tensor, rows_X: SampleRows) -> Tensor:
    """What `choose` draws each row's token from: float64 [X, V] on the logits' device; the noise's key is not read.

    At temperature 0 all of it is on the token that is chosen.
    """
    logits_XV = without_nan(logits_XV)
    rows = device_rows(rows_X, logits_XV.device)
    scaled_XV = _scaled(logits_XV, rows)
    has_top_k, has_shares = _filters_of(rows_X)
    if has_top_k or has_shares:
        is_kept_XV = _is_kept(logits_XV, scaled_XV, rows, has_top_k=has_top_k, has_shares=has_shares)
        scaled_XV = torch.where(is_kept_XV, scaled_XV, -torch.inf)
    probs_XV = scaled_XV.softmax(dim=-1)
    if rows_X["temperature"].all():
        return probs_XV
    chosen_XV = torch.zeros_like(probs_XV).scatter(1, logits_XV.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where((rows.temperature == 0).unsqueeze(1), chosen_XV, probs_XV)


def _scaled(logits_XV: Tensor, rows: DeviceRows) -> Tensor:
    """Logits less the largest of the row, over the temperature; at temperature 0 over 1."""
    return relative(logits_XV) / torch.where(rows.temperature == 0, 1.0, rows.temperature).unsqueeze(1)


def _is_kept(logits_XV: Tensor, scaled_XV: Tensor, rows: DeviceRows, *, has_top_k: bool, has_shares: bool) -> Tensor:
    """Whether the filters keep a token."""
    is_kept_XV = torch.ones_like(logits_XV, dtype=torch.bool)
    if has_top_k:
        is_kept_XV = _is_in_top_k(logits_XV, rows.top_k.unsqueeze(1))
    if has_shares:
        weights_XV = torch.where(is_kept_XV, fixed_weights(scaled_XV), 0)
        is_likely_XV = weights_XV.double() >= rows.min_p.unsqueeze(1) * 2.0**WEIGHT_BITS
        is_kept_XV = is_kept_XV & _is_in_nucleus(weights_XV, rows.top_p.unsqueeze(1)) & is_likely_XV
    return is_kept_XV


def without_nan(logits_XV: Tensor) -> Tensor:
    """The logits, -inf in place of NaN."""
    return torch.where(logits_XV.isnan(), -torch.inf, logits_XV)


def relative(logits_XV: Tensor) -> Tensor:
    """Logits less the largest of the row, float64 [X, V]; exactly 0 where they equal it."""
    largest_X1 = logits_XV.amax(dim=-1, keepdim=True)
    return torch.where(logits_XV == largest_X1, 0.0, logits_XV.double() - largest_X1.double())


def _is_in_top_k(logits_XV: Tensor, top_k_X1: Tensor) -> Tensor:
    """Whether a logit is at least the k-th largest; 0 keeps all."""
    vocab_size = logits_XV.shape[1]
    ranks_X1 = torch.where(top_k_X1 > 0, top_k_X1, vocab_size).clamp(max=vocab_size) - 1
    return logits_XV >= logits_XV.sort(dim=-1, descending=True).values.gather(1, ranks_X1)


def _is_in_nucleus(weights_XV: Tensor, top_p_X1: Tensor) -> Tensor:
    """Whether the weights before a token, most likely first, stay short of `top_p` of the sum; 1 keeps all."""
    ordered_XV, order_XV = weights_XV.sort(dim=-1, descending=True, stable=True)
    before_XV = ordered_XV.cumsum(dim=-1) - ordered_XV
    limits_X1 = weights_XV.sum(dim=-1, keepdim=True).double() * top_p_X1
    is_within_XV = before_XV.double() < limits_X1
    is_within_XV[:, 0] = True
    return torch.zeros_like(is_within_XV).scatter(1, order_XV, is_within_XV) | (top_p_X1 >= 1)
