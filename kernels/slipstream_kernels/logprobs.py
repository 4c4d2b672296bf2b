"""Log-probabilities of raw logits, for many rows at once: of one token a row, and of the most likely ones."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream_kernels.address import address_of
from slipstream_kernels.isa import instruction_set, typed
from slipstream_kernels.noise import WEIGHT_BITS, fixed_log, fixed_weights
from slipstream_kernels.sampling import kernel_rows, relative, without_nan

_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64
_compiled = typed(
    {"top_logprobs": (None, (_ADDRESS, _COUNT, _COUNT, *[_ADDRESS] * 2, _COUNT, _COUNT, *[_ADDRESS] * 3))}
)


class TopLogprobs(NamedTuple):
    """Log-probabilities of G rows, on the logits' device.

    `logprobs_G` fp32 of the given tokens; the N most likely tokens `top_ids_GN` int32, best first, ties by lowest id,
    and theirs, `top_logprobs_GN` fp32.
    """

    logprobs_G: Tensor
    top_ids_GN: Tensor
    top_logprobs_GN: Tensor


class HostLogprobs(NamedTuple):
    """The same as arrays."""

    logprobs_G: NDArray[np.float32]
    top_ids_GN: NDArray[np.int32]
    top_logprobs_GN: NDArray[np.float32]


def top_logprobs(
    logits_XV: Tensor, rows: Sequence[int], token_ids: Sequence[int], *, num_top: int
) -> TopLogprobs | HostLogprobs:
    """Log-probabilities of raw logits: of one token in each of the rows named, and of the `num_top` most likely.

    That is all tokens of a smaller vocabulary. Probabilities are summed in units of 2**-42 of the largest, which
    makes a result independent of the order of the sum. Arrays where the compiled kernels can read the logits, which is
    on the host, else tensors on their device, with no synchronisation.
    """
    found = kernel_rows(logits_XV)
    num_rows, vocab_size = logits_XV.shape if found is None else (found.number, found.vocab_size)
    if num_top < 0:
        raise ValueError(f"num_top is {num_top}; expected a number from 0 up")
    num_top = min(num_top, vocab_size)
    if len(rows) != len(token_ids):
        raise ValueError(f"{len(rows)} rows and {len(token_ids)} tokens; give one each")
    _check_range("rows", rows, num_rows)
    _check_range("token ids", token_ids, vocab_size)
    if found is None:
        return top_logprobs_reference(logits_XV, rows, token_ids, num_top=num_top)
    rows_G, tokens_G, num_wanted = np.array(rows, np.int32), np.array(token_ids, np.int32), len(rows)
    out = HostLogprobs(
        np.empty(num_wanted, np.float32),
        np.empty((num_wanted, num_top), np.int32),
        np.empty((num_wanted, num_top), np.float32),
    )
    _compiled("top_logprobs", instruction_set())(
        found.address,
        found.stride,
        vocab_size,
        address_of(rows_G),
        address_of(tokens_G),
        num_wanted,
        num_top,
        *(address_of(values) for values in out),
    )
    return out


def host_logprobs(said: TopLogprobs | HostLogprobs) -> HostLogprobs:
    """The same, read from its device."""
    if isinstance(said, HostLogprobs):
        return said
    return HostLogprobs(*(values.cpu().numpy() for values in said))


def _check_range(name: str, numbers: Sequence[int], end: int) -> None:
    if len(numbers) and (min(numbers) < 0 or max(numbers) >= end):
        raise ValueError(f"{name} are {list(numbers)}; expected each from 0 to {end - 1}")


def top_logprobs_reference(
    logits_XV: Tensor, rows: Sequence[int], token_ids: Sequence[int], *, num_top: int
) -> TopLogprobs:
    """`top_logprobs` in plain torch: the definition."""
    device = logits_XV.device
    logits_GV = without_nan(logits_XV[torch.tensor(rows, dtype=torch.int64, device=device)])
    relative_GV = relative(logits_GV)
    sums_G1 = fixed_weights(relative_GV).sum(dim=-1, keepdim=True).double() * 2.0**-WEIGHT_BITS
    logprobs_GV = (relative_GV - fixed_log(sums_G1)).float()
    tokens_G1 = torch.tensor(token_ids, dtype=torch.int64, device=device).unsqueeze(1)
    top_ids_GN = logits_GV.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    return TopLogprobs(logprobs_GV.gather(1, tokens_G1).squeeze(1), top_ids_GN.int(), logprobs_GV.gather(1, top_ids_GN))
