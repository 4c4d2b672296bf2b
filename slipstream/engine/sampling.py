"""The sampling contract: which token the target emits at a position, as a function of logits and keyed noise.

One position goes through these steps, in this order:

    raw logits            log-probabilities are reported of these (`slipstream_kernels.logprobs.top_logprobs`)
    + logit bias
    repetition penalty    tokens of prompt or output so far: positive logits divided by it, negative multiplied
    - presence penalty    tokens of the output so far
    - frequency penalty   times their count in the output so far
    / temperature
    top-k, top-p, min-p   (`slipstream_kernels.sampling` defines them)
    + Gumbel noise        keyed by (seed, sample index, absolute position, token, redraw)
    argmax                temperature 0: of the penalised logits

"So far" at a node of a draft tree includes the node's ancestors and the node itself, so every choice is what plain
decoding would have chosen behind the same tokens. Adding Gumbel noise makes the argmax an exact draw from the target's
distribution (the Gumbel-max trick), and one that does not depend on drafts, batches or preemption. A drafter draws its
candidates with the same noise, which is what makes them likely to be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.drafting.tree import DraftTree, depths
from slipstream.engine.request import SamplingParams
from slipstream_kernels.sampling import SampleRows, choose, chosen_ids, probabilities, row_bytes, sample_rows


class RowsOfRequest(msgspec.Struct, frozen=True):
    """The 1 + X rows of logits of one request in a step: behind its last token, then behind each node of its tree.

    `token_ids` holds prompt and output so far, `num_prompt` of them the prompt's.
    """

    sampling: SamplingParams
    token_ids: Sequence[int]
    num_prompt: int
    tree: DraftTree


class Draw(Protocol):
    """What keys a request's noise, and its temperature: `SamplingParams` and `SamplingRecord` have it."""

    @property
    def seed(self) -> int:
        """In [0, 2**63)."""

    @property
    def sample_index(self) -> int:
        """Which of n samples."""

    @property
    def temperature(self) -> float:
        """0 is greedy."""


def choose_tokens(logits_XV: Tensor, requests: Sequence[RowsOfRequest]) -> list[list[int]]:
    """The target's token behind each row, per request: entry 0 at its root, entry x + 1 at node x of its tree.

    `logits_XV` fp32 holds the rows of all requests one after another, and is not changed. One synchronisation.
    """
    rows, positions = [], []
    for request in requests:
        first = len(request.token_ids)
        rows.append(row_of(request.sampling) * (1 + len(request.tree.token_ids)))
        positions += [first, *(first + depth for depth in depths(request.tree))]
    chosen = chosen_ids(adjusted(logits_XV, requests), sample_rows(rows, positions))
    ends = list(accumulate(1 + len(request.tree.token_ids) for request in requests))
    return [chosen[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def target_probs(logits_XV: Tensor, requests: Sequence[RowsOfRequest]) -> Tensor:
    """What `choose_tokens` draws each row's token from: float64 [X, V] after bias, penalties, temperature, filters."""
    rows = [row_of(request.sampling) * (1 + len(request.tree.token_ids)) for request in requests]
    return probabilities(adjusted(logits_XV, requests), sample_rows(rows, [0] * len(logits_XV)))


def row_of(sampling: SamplingParams) -> bytes:
    """The sample row of a request: temperature, filters and the key of its noise."""
    return row_bytes(
        seed=sampling.seed,
        temperature=sampling.temperature,
        sample_index=sampling.sample_index,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )


def draft_tokens(logits_TV: Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> Tensor:
    """A draft's candidate int32 [T] for each absolute position, drawn with the request's own noise; no filters."""
    return choose(logits_TV, draft_rows(draws, positions))


def draft_rows(draws: Sequence[Draw], positions: Sequence[int]) -> SampleRows:
    """The sample rows by which drafts are drawn at these absolute positions."""
    return sample_rows([shared_row(one) for one in draws], positions)


def shared_row(draw: Draw) -> bytes:
    """The sample row whose noise is the target's own, without filters: for trees, beams and chains of fixed length."""
    return row_bytes(seed=draw.seed, temperature=draw.temperature, sample_index=draw.sample_index)


def adjusted(logits_XV: Tensor, requests: Sequence[RowsOfRequest]) -> Tensor:
    """The logits with every request's bias and penalties; `logits_XV` itself if no request asks for any."""
    if not any(_is_adjusted(request.sampling) for request in requests):
        return logits_XV
    logits_XV = logits_XV.clone()
    start = 0
    for request in requests:
        end = start + 1 + len(request.tree.token_ids)
        if _is_adjusted(request.sampling):
            _add_bias(logits_XV[start:end], request.sampling)
            _penalise(logits_XV[start:end], request)
        start = end
    return logits_XV


def _is_adjusted(sampling: SamplingParams) -> bool:
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


def _add_bias(logits_XV: Tensor, sampling: SamplingParams) -> None:
    if sampling.logit_bias:
        biases = dict(sampling.logit_bias)  # the last of two biases for one token counts
        ids = torch.tensor(list(biases), device=logits_XV.device)
        logits_XV[:, ids] += torch.tensor(list(biases.values()), dtype=torch.float32, device=logits_XV.device)


def _penalise(logits_XV: Tensor, request: RowsOfRequest) -> None:
    """Subtract the penalties of one request in place; only the columns of tokens seen so far change."""
    sampling, device = request.sampling, logits_XV.device
    ids_U, counts_XU, is_seen_XU = seen_tokens(request)
    ids = torch.from_numpy(ids_U).to(device)
    values_XU = logits_XV.index_select(1, ids)
    factor = torch.full((), sampling.repetition_penalty, device=device)
    repeated_XU = torch.where(values_XU > 0, values_XU / factor, values_XU * factor)
    values_XU = torch.where(torch.from_numpy(is_seen_XU).to(device), repeated_XU, values_XU)
    penalties_XU = sampling.presence_penalty * (counts_XU > 0) + sampling.frequency_penalty * counts_XU
    logits_XV.index_copy_(1, ids, values_XU - torch.from_numpy(penalties_XU.astype(np.float32)).to(device))


def seen_tokens(request: RowsOfRequest) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """What each row has behind it: token ids [U]; their counts in the output [1 + X, U]; whether seen at all.

    Row 0 looks back from the root, row x + 1 from node x of the tree, the node itself included.
    """
    context = np.fromiter(request.token_ids, np.int64)
    ids_U, inverse = np.unique(np.concatenate([context, request.tree.token_ids]).astype(np.int64), return_inverse=True)
    num_rows = 1 + len(request.tree.token_ids)
    counts_XU = np.zeros((num_rows, len(ids_U)), np.int64)
    counts_XU[0] = np.bincount(inverse[request.num_prompt : len(context)], minlength=len(ids_U))
    for node, parent in enumerate(request.tree.parents):
        counts_XU[node + 1] = counts_XU[parent + 1]
        counts_XU[node + 1, inverse[len(context) + node]] += 1
    is_in_prompt_U = np.bincount(inverse[: request.num_prompt], minlength=len(ids_U)) > 0
    return ids_U, counts_XU, is_in_prompt_U | (counts_XU > 0)
