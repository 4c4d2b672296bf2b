"""Token Recycling's matrix: what the target said behind every token when it last saw it.

There is a row per token: the WIDTH most likely tokens behind it, best first, and their log-probabilities. An entry
whose log-probability is no number above -inf is empty. One more row holds what was remembered last, whatever the token:
it stands in for rows that are empty.

The matrix is that of Luo et al., "Turning Trash into Treasure" (ACL 2025, arXiv 2408.08696), which keeps no
log-probabilities.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream_kernels.address import address_of
from slipstream_kernels.isa import instruction_set, is_available, typed
from slipstream_kernels.logprobs import host_logprobs, top_logprobs
from slipstream_kernels.sampling import kernel_rows

WIDTH = 8
"""Entries of a row."""

_LARGEST_NARROW_VOCABULARY = 2**16

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int32
_compiled = typed(
    {
        "recycling_remember_logits": (
            _INT,
            (_ADDRESS, _ADDRESS, _INT, _INT, _ADDRESS, _ADDRESS, ctypes.c_int64, _INT),
        ),
        "recycling_remember": (_INT, (_ADDRESS, _ADDRESS, _INT, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _INT)),
    }
)


class Adjacency(NamedTuple):
    """A matrix, C-contiguous: `ids_VN` uint16 where that holds the vocabulary, else int32, and `logprobs_VN` fp16.

    There are V + 1 rows, the stand-in last. Every id is a token of the vocabulary, no row names one twice, and no
    log-probability is above 0; the id of an empty entry is 0.
    """

    ids_VN: NDArray[Any]
    logprobs_VN: NDArray[np.float16]


def empty_adjacency(vocab_size: int) -> Adjacency:
    """A matrix without entries."""
    dtype = np.uint16 if vocab_size <= _LARGEST_NARROW_VOCABULARY else np.int32
    shape = (vocab_size + 1, WIDTH)
    return Adjacency(np.zeros(shape, dtype), np.full(shape, -np.inf, np.float16))


def vocab_size_of(matrix: Adjacency) -> int:
    """How many tokens the matrix knows."""
    return len(matrix.ids_VN) - 1


def remember(
    matrix: Adjacency, token_ids_T: NDArray[np.int32], top_ids_TN: NDArray[np.int32], top_logprobs_TN: NDArray[Any]
) -> None:
    """Replace the rows of `token_ids_T`, in order: where a token comes twice, its last row stays.

    So two calls do what one call with all their rows does. The first WIDTH columns are kept, as fp16; log-probabilities
    that are no number, and tokens that a row has named before, leave empty entries; above 0 they count as 0. Raises
    ValueError, with nothing written, if anything is no token of the vocabulary.
    """
    tokens_T, ids_TN, logprobs_TN = _rows(token_ids_T, top_ids_TN, top_logprobs_TN)
    if not is_available():
        remember_reference(matrix, token_ids_T, top_ids_TN, top_logprobs_TN)
        return
    bad_row = _compiled("recycling_remember", instruction_set())(
        *(address_of(array) for array in matrix),
        matrix.ids_VN.itemsize,
        vocab_size_of(matrix),
        address_of(tokens_T),
        address_of(ids_TN),
        address_of(logprobs_TN),
        *ids_TN.shape,
    )
    if bad_row >= 0:
        raise no_token(matrix, [int(tokens_T[bad_row]), *ids_TN[bad_row].tolist()])


def remember_logits(matrix: Adjacency, token_ids_T: NDArray[np.int32], logits_TV: Tensor) -> None:
    """`remember` what fp32 logits say behind T tokens: their WIDTH most likely tokens and log-probabilities.

    These are `sampling.top_logprobs` but for the last bit: the compiled kernel sums in single precision.
    """
    rows = kernel_rows(logits_TV)
    if rows is None:
        number = len(token_ids_T)
        said = top_logprobs(logits_TV, range(number), [0] * number, num_top=WIDTH)
        remember(matrix, token_ids_T, *host_logprobs(said)[1:])
        return
    if len(token_ids_T) != rows.number or rows.vocab_size != vocab_size_of(matrix):
        raise ValueError(
            f"{len(token_ids_T)} tokens, logits {tuple(logits_TV.shape)}; expected a row each, of "
            f"{vocab_size_of(matrix)}"
        )
    tokens_T = np.ascontiguousarray(token_ids_T, np.int32)
    bad_row = _compiled("recycling_remember_logits", instruction_set())(
        *(address_of(array) for array in matrix),
        matrix.ids_VN.itemsize,
        rows.vocab_size,
        address_of(tokens_T),
        rows.address,
        rows.stride,
        rows.number,
    )
    if bad_row >= 0:
        raise no_token(matrix, [int(tokens_T[bad_row])])


def remember_reference(
    matrix: Adjacency, token_ids_T: NDArray[np.int32], top_ids_TN: NDArray[np.int32], top_logprobs_TN: NDArray[Any]
) -> None:
    """`remember` in numpy, row by row: the definition."""
    tokens_T, ids_TN, logprobs_TN = _rows(token_ids_T, top_ids_TN, top_logprobs_TN)
    vocab_size = vocab_size_of(matrix)
    for row in np.column_stack([tokens_T, ids_TN]).tolist():
        if min(row) < 0 or max(row) >= vocab_size:
            raise no_token(matrix, row)
    for token, ids_N, logprobs_N in zip(tokens_T, ids_TN, logprobs_TN, strict=True):
        for place in (token, vocab_size):
            matrix.ids_VN[place], matrix.logprobs_VN[place] = 0, -np.inf
            for rank, candidate in enumerate(ids_N):
                is_filled_N = np.isfinite(logprobs_N[:rank])
                if np.isfinite(logprobs_N[rank]) and candidate not in ids_N[:rank][is_filled_N]:
                    matrix.ids_VN[place, rank], matrix.logprobs_VN[place, rank] = candidate, logprobs_N[rank]


def _rows(
    token_ids_T: NDArray[np.int32], top_ids_TN: NDArray[np.int32], top_logprobs_TN: NDArray[Any]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float16]]:
    """What is kept of rows, C-contiguous; raises ValueError unless they belong together."""
    if not len(token_ids_T) == len(top_ids_TN) or top_ids_TN.shape != top_logprobs_TN.shape:
        raise ValueError(
            f"{len(token_ids_T)} tokens, ids {top_ids_TN.shape} and log-probabilities {top_logprobs_TN.shape}; "
            "expected a row each, of as many columns"
        )
    with np.errstate(over="ignore"):  # what fp16 cannot hold is as good as impossible
        logprobs_TN = np.minimum(top_logprobs_TN[:, :WIDTH], 0).astype(np.float16)
    return (
        np.ascontiguousarray(token_ids_T, np.int32),
        np.ascontiguousarray(top_ids_TN[:, :WIDTH], np.int32),
        np.ascontiguousarray(logprobs_TN),
    )


def no_token(matrix: Adjacency, seen: list[int]) -> ValueError:
    """What to raise for ids that are not all tokens of the vocabulary."""
    return ValueError(f"token ids are {seen}; the vocabulary is 0..{vocab_size_of(matrix) - 1}")
