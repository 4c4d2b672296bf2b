"""What a Token Recycling matrix would have brought on a logged request: replay under equality, no target calls.

A replica that has just started from the matrix is replayed with this request as its first: at each pass it grows a tree
behind the last token, along the request's own noise; the logged tokens say what is accepted; and the rows that the
target gave for the tokens of the pass are taken over. Rows of prompts and of rejected nodes are not in the log, so the
replayed replica learns a little less than a real one, and less from request to request; that is the same for challenger
and champion.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slipstream import acceptance
from slipstream.drafting.recycling_artifact import StoredMatrix
from slipstream.engine.sampling import draft_rows
from slipstream.learning.shadow import ReplayScore
from slipstream.records import Observation, Round, unpack_floats, unpack_ids
from slipstream.versions import NO_VERSION
from slipstream_kernels.adjacency import Adjacency, empty_adjacency, remember
from slipstream_kernels.recycling import NO_PARENT, Grown, grow


def rows_of(observation: Observation) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """What the target said at the T output positions: the tokens int32 [T] before them, and the N most likely behind.

    Ids are int32 [T, N], log-probabilities float32 [T, N]: the arguments of `adjacency.remember`, in order.
    """
    prompt, output = unpack_ids(observation.prompt_ids), unpack_ids(observation.output_ids)
    shape = (len(output), observation.top_n)
    return (
        np.concatenate([prompt[-1:], output[:-1]]),
        unpack_ids(observation.top_ids).reshape(shape),
        unpack_floats(observation.top_logprobs, bits=16).reshape(shape),
    )


def score_matrix(
    start: StoredMatrix | None, observation: Observation, *, vocab_size: int, num_draft_tokens: int
) -> ReplayScore:
    """Replay a matrix (None: an empty one) against one trainable observation, with trees of `num_draft_tokens` nodes.

    `start` does not change.
    """
    matrix = empty_adjacency(vocab_size) if start is None else Adjacency(*(array.copy() for array in start.matrix))
    tokens_T, top_ids_TN, top_logprobs_TN = rows_of(observation)
    num_tokens, begin = len(tokens_T), 0
    rounds: list[Round] = []
    while begin < num_tokens:
        rounds.append(_round(matrix, observation, begin=begin, num_draft_tokens=num_draft_tokens))
        end = begin + rounds[-1].num_accepted + 1
        remember(matrix, tokens_T[begin:end], top_ids_TN[begin:end], top_logprobs_TN[begin:end])
        begin = end
    return ReplayScore(
        request_id=observation.request_id,
        domain=observation.domain,
        counts=acceptance.count(rounds),
        num_tokens=num_tokens,
        overlap_sum=_overlap_sum(start.matrix, tokens_T, top_ids_TN, top_logprobs_TN) if start else 0.0,
    )


def _round(matrix: Adjacency, observation: Observation, *, begin: int, num_draft_tokens: int) -> Round:
    """The pass whose first token is output token `begin`.

    As in the engine, the pass that ends the prompt drafts nothing, and the last token that `max_tokens` allows is never
    drafted; a stop token may be.
    """
    prompt, output = unpack_ids(observation.prompt_ids), unpack_ids(observation.output_ids)
    num_left = len(output) - begin
    max_depth = min(num_draft_tokens, num_left - 1) if observation.finish_reason == "length" else num_draft_tokens
    if max_depth < 1 or (observation.chunk == 0 and begin == 0):
        return Round(start=begin, draft_version=NO_VERSION, proposed=(), num_accepted=0)
    last = int(output[begin - 1] if begin else prompt[-1])
    draws_B = draft_rows([observation.sampling], [observation.first_position + begin])
    limits_B4 = np.array([[0, last, num_draft_tokens, max_depth]], np.int32)
    grown = grow([matrix], draws_B, limits_B4)
    return Round(
        start=begin,
        draft_version=NO_VERSION,
        proposed=tuple(grown.token_ids_X.tolist()),
        num_accepted=_num_accepted(grown, output[begin:].tolist()),
    )


def _num_accepted(grown: Grown, said: Sequence[int]) -> int:
    """How many of the tokens that the target said are a path from the root of this tree; siblings differ."""
    nodes = zip(grown.parents_X.tolist(), grown.token_ids_X.tolist(), strict=True)
    places = {edge: node for node, edge in enumerate(nodes)}
    node, num_accepted = NO_PARENT, 0
    for token in said:
        found = places.get((node, token))
        if found is None:
            break
        node, num_accepted = found, num_accepted + 1
    return num_accepted


def _overlap_sum(
    matrix: Adjacency,
    tokens_T: NDArray[np.int32],
    top_ids_TN: NDArray[np.int32],
    top_logprobs_TN: NDArray[np.float32],
) -> float:
    """Sum over positions and kept tokens of min(target, stored) probability; `matrix` as it was before the request."""
    ids_TW, probs_TW = matrix.ids_VN[tokens_T], np.exp(matrix.logprobs_VN[tokens_T].astype(np.float32))
    is_same_TNW = top_ids_TN[:, :, None] == ids_TW[:, None, :]
    return float(np.minimum(np.exp(top_logprobs_TN)[:, :, None], probs_TW[:, None, :])[is_same_TNW].sum())
