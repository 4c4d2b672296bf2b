"""Trees grown from a Token Recycling matrix (`adjacency`).

Growing starts at a request's last token. The candidates behind a node are the entries of its token's row; the score of
a candidate is its parent's score (the root's is 0) plus

    log softmax((log mixed + temperature * G) / error_scale) - depth_penalty

over the row, with mixed = (1 - rank_share) * q + rank_share * RANK_PROBS[rank], q the stored probability, and G the
request's own noise at the candidate's position (`noise.gumbel_noise`). The candidates behind a token without a row are
those of the stand-in, each less UNKNOWN_PENALTY: they are drafted when nothing better is left, and fill rows rather
than being accepted. The most likely candidate anywhere becomes the next node; among equals the one found first.

Luo et al., "Turning Trash into Treasure" (ACL 2025, arXiv 2408.08696), fill a fixed template of ranks instead.
"""

from __future__ import annotations

import ctypes
import functools
import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream_kernels.address import address_of
from slipstream_kernels.adjacency import WIDTH, Adjacency, no_token, vocab_size_of
from slipstream_kernels.isa import instruction_set, is_available, typed
from slipstream_kernels.noise import WEIGHT_BITS, fixed_log, fixed_weights, philox
from slipstream_kernels.sampling import SampleRows

# The numbers below were chosen on three small targets (two of stories, a mixture of experts of mixed text), at
# temperatures 0 and 1 with trees of 16 and 80 nodes. Tokens per call at temperature 0, mean of the three: 2.37 at 16
# nodes and 3.01 at 80, against 2.32 and 2.91 with scores of log q - 0.15 alone, and 2.92 with the paper's 80 nodes;
# 0.05 is noise. They change what is proposed, never what is accepted, and are to be learned from verifications.

ERROR_SCALE = 1.0
"""How far a row is off the target's word of today, as the scale of Gumbel errors of its log-probabilities."""

DEPTH_PENALTY = 0.1
"""What every further token costs a path in log-probability: rows forget all but one token of context."""

RANK_SHARE = 0.5
"""How much a candidate's rank counts beside its stored probability, which is that of one context seen before."""

RANK_PROBS = (0.53, 0.09, 0.04, 0.023, 0.019, 0.014, 0.014, 0.011)
"""How often the token at each rank of a row came next under greedy decoding, mean of the three targets."""

UNKNOWN_PENALTY = 8.0
"""What a candidate loses that only stands in for an empty row."""

NO_PARENT = -1
"""Parent of the nodes that follow the root."""

_NUM_RULE_NUMBERS = 4 + WIDTH
_MASK = 0xFFFFFFFF
_TOKENS_PER_COUNTER = 4

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int32
_GROW_ARGUMENTS = (*[_ADDRESS] * 2, *[_INT] * 3, *[_ADDRESS] * 2, _INT, *[_ADDRESS] * 2, _INT, *[_ADDRESS] * 4)
_compiled = typed({"recycling_grow": (_INT, _GROW_ARGUMENTS)})


class GrowthRule(NamedTuple):
    """The numbers of the score (this module says how they are used); `rank_probs` has WIDTH of them.

    `error_scale` is above 0, `rank_share` from 0 to 1, penalties are not negative.
    """

    error_scale: float = ERROR_SCALE
    depth_penalty: float = DEPTH_PENALTY
    rank_share: float = RANK_SHARE
    unknown_penalty: float = UNKNOWN_PENALTY
    rank_probs: tuple[float, ...] = RANK_PROBS


DEFAULT_RULE = GrowthRule()


class Template(NamedTuple):
    """A tree whose shape is fixed: node x has the candidate of rank `ranks_X[x]` behind node `parents_X[x]`.

    Both are int32; parents come first and the children of one parent stand side by side. `depths_X` is 1 for the
    root's children.
    """

    parents_X: NDArray[np.int32]
    ranks_X: NDArray[np.int32]
    depths_X: NDArray[np.int32]


class Grown(NamedTuple):
    """Trees one behind the other: that of request b ends before node `ends_B[b]`.

    `token_ids_X` and `parents_X` int32, parents counted within the tree, or NO_PARENT; `scores_X` float64 (this module
    says of what), which never rise along a path.
    """

    token_ids_X: NDArray[np.int32]
    parents_X: NDArray[np.int32]
    scores_X: NDArray[np.float64]
    ends_B: NDArray[np.int32]


def grow(
    matrices: Sequence[Adjacency],
    draws_B: SampleRows,
    limits_B4: NDArray[np.int32],
    *,
    rule: GrowthRule = DEFAULT_RULE,
    template: Template | None = None,
) -> Grown:
    """A tree for each request, best first, or filling `template` as far as rows have entries and limits allow.

    `draws_B` are the requests' `sampling.sample_rows` (noise and temperature; filters are not looked at) at the
    position of the first drafted token. A line of `limits_B4` is (which matrix, root token, nodes, depth); matrices are
    of one vocabulary. Raises ValueError for a root that is no token of it.
    """
    if len(draws_B) != len(limits_B4):
        raise ValueError(f"{len(draws_B)} draws for {len(limits_B4)} limits; give one each")
    if not is_available():
        return grow_reference(matrices, draws_B, limits_B4, rule=rule, template=template)
    limits_B4 = np.ascontiguousarray(limits_B4, np.int32)
    num_nodes = int(limits_B4[:, 2].clip(0).sum())
    tokens_X, parents_X, scores_X = np.empty(num_nodes, np.int32), np.empty(num_nodes, np.int32), np.empty(num_nodes)
    ends_B = np.empty(len(limits_B4), np.int32)
    shape = None if template is None else np.concatenate(template)
    bad_request = _compiled("recycling_grow", instruction_set())(
        _addresses([matrix.ids_VN for matrix in matrices]),
        _addresses([matrix.logprobs_VN for matrix in matrices]),
        len(matrices),
        matrices[0].ids_VN.itemsize,
        vocab_size_of(matrices[0]),
        address_of(draws_B),
        address_of(limits_B4),
        len(limits_B4),
        (ctypes.c_double * _NUM_RULE_NUMBERS)(*rule[:-1], *rule.rank_probs),
        None if shape is None else address_of(shape),
        0 if template is None else len(template.ranks_X),
        *(address_of(array) for array in (tokens_X, parents_X, scores_X, ends_B)),
    )
    if bad_request >= 0:
        _check_request(int(limits_B4[bad_request, 0]), int(limits_B4[bad_request, 1]), matrices)
    end = int(ends_B[-1]) if len(ends_B) else 0
    return Grown(tokens_X[:end], parents_X[:end], scores_X[:end], ends_B)


def _addresses(arrays: Sequence[NDArray[Any]]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(address_of(array) for array in arrays))


def _check_request(which: int, root: int, matrices: Sequence[Adjacency]) -> None:
    if not 0 <= which < len(matrices):
        raise ValueError(f"matrix is {which}; expected 0 to {len(matrices) - 1}")
    if not 0 <= root < vocab_size_of(matrices[which]):
        raise no_token(matrices[which], [root])


# ------------------------------------------------------------------------------------------------ growing, defined

_Node = tuple[int, int, float]
"""Token, parent and score."""

_Expand = Callable[[int, int, float], list[tuple[int, float]]]
"""From token, depth and score of a node to token and score of the candidates behind it, by rank."""


def grow_reference(
    matrices: Sequence[Adjacency],
    draws_B: SampleRows,
    limits_B4: NDArray[np.int32],
    *,
    rule: GrowthRule = DEFAULT_RULE,
    template: Template | None = None,
) -> Grown:
    """`grow` in plain torch and Python: the definition."""
    nodes: list[_Node] = []
    ends: list[int] = []
    for draw, (which, root, max_nodes, max_depth) in zip(draws_B, limits_B4.tolist(), strict=True):
        _check_request(which, root, matrices)
        expand = functools.partial(candidates_reference, matrices[which], draw, rule)
        if template is None:
            nodes += _best_first(expand, root, max_nodes, max_depth)
        else:
            nodes += _filled(expand, root, template, max_nodes, max_depth)
        ends.append(len(nodes))
    return Grown(
        np.array([token for token, _, _ in nodes], np.int32),
        np.array([parent for _, parent, _ in nodes], np.int32),
        np.array([score for _, _, score in nodes], np.float64),
        np.array(ends, np.int32),
    )


def _best_first(expand: _Expand, root: int, max_nodes: int, max_depth: int) -> list[_Node]:
    nodes: list[_Node] = []
    heap: list[tuple[float, int, int, int, int]] = []
    num_found = 0
    token, score, depth = root, 0.0, 0
    while len(nodes) < max_nodes:
        if depth < max_depth:
            for candidate, value in expand(token, depth, score):
                if value > -np.inf:
                    heapq.heappush(heap, (-value, num_found, candidate, len(nodes) - 1, depth + 1))
                    num_found += 1
        if not heap:
            break
        negated, _, token, parent, depth = heapq.heappop(heap)
        score = -negated
        nodes.append((token, parent, score))
    return nodes


def _filled(expand: _Expand, root: int, template: Template, max_nodes: int, max_depth: int) -> list[_Node]:
    nodes: list[_Node] = []
    places: dict[int, int] = {NO_PARENT: NO_PARENT}
    for node, (parent, rank, depth) in enumerate(np.column_stack(template).tolist()):
        if parent not in places or depth > max_depth or len(nodes) == max_nodes:
            continue
        token, _, score = (root, NO_PARENT, 0.0) if parent == NO_PARENT else nodes[places[parent]]
        candidates = expand(token, depth - 1, score)
        candidate, value = candidates[rank] if candidates else (0, -np.inf)
        if value > -np.inf:
            places[node] = len(nodes)
            nodes.append((candidate, places[parent], value))
    return nodes


def candidates_reference(
    matrix: Adjacency, draw: Any, rule: GrowthRule, token: int, depth: int, score: float
) -> list[tuple[int, float]]:
    """Token and score of what may follow `token` at `depth` (0: the root), by rank, where the path has `score`."""
    row = token
    if np.isneginf(matrix.logprobs_VN[token]).all():
        row, score = vocab_size_of(matrix), score - rule.unknown_penalty
    ids_N = torch.from_numpy(matrix.ids_VN[row].astype(np.int64))
    logprobs_N = torch.from_numpy(matrix.logprobs_VN[row].astype(np.float64))
    values_N = logprobs_N
    if rule.rank_share:
        ranks_N = torch.tensor(rule.rank_probs, dtype=torch.float64)
        stored_N = fixed_weights(logprobs_N).double() * 2.0**-WEIGHT_BITS
        values_N = fixed_log(stored_N * (1.0 - rule.rank_share) + ranks_N * rule.rank_share)
    if draw["temperature"]:
        noise_N = noise_of_tokens(ids_N, draw, int(draw["position"]) + depth)
        values_N = values_N + noise_N * float(draw["temperature"])
    values_N = values_N / torch.tensor(rule.error_scale, dtype=torch.float64)
    values_N = torch.where(logprobs_N == -torch.inf, -torch.inf, values_N)
    if values_N.max() == -torch.inf:
        return []
    relative_N = values_N - values_N.max()
    log_sum = fixed_log(fixed_weights(relative_N).sum().double() * 2.0**-WEIGHT_BITS)
    scores_N = score + ((relative_N - log_sum) - rule.depth_penalty)
    return list(zip(ids_N.tolist(), scores_N.tolist(), strict=True))


def noise_of_tokens(ids_N: Tensor, draw: Any, position: int) -> Tensor:
    """The noise float64 [N] of these tokens (int64) at an absolute position, keyed by a line of `sampling.ROW`."""
    zeros = torch.zeros_like(ids_N)
    seed = int(draw["seed"])
    counter = (
        ids_N // _TOKENS_PER_COUNTER,
        zeros + position,
        zeros + int(draw["sample_index"]),
        zeros + int(draw["redraw"]),
    )
    outputs = torch.stack(philox(counter, (zeros + (seed & _MASK), zeros + (seed >> 32 & _MASK))))
    bits = outputs.gather(0, (ids_N % _TOKENS_PER_COUNTER).unsqueeze(0))[0]
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -fixed_log(-fixed_log(uniform))
