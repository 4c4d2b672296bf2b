"""Trees from the candidates of several drafters at once, and the set of their nodes that pays.

    candidate          a token that a drafter proposes behind a node of a tree
    survival           how often such candidates are accepted where their parent is (`slipstream.drafting.survival`)
    merged survival    what the candidates behind one node survive beside each other, by who proposes them and how sure
                       each is (`slipstream.drafting.merged_survival`)
    source             the chain, Token Recycling, or look-ups
    survival of a path the product from the root down

Candidates behind a node come from a drafted chain and from look-ups as far as the path reads as they do, and from the
Token Recycling row of the node's token. Trees grow best first: the candidate with the largest survival of its path is
the next node. The budget then takes the nodes of all requests by falling survival, as many as are worth their time
(`slipstream.drafting.budget` proves that no other set is better). A token that ends the output is never a node: to
verify it saves nothing, as nothing comes behind it.

When a request's text has gone on, its last tree is judged: every candidate along the path that the tokens took counts,
verified or not, since the target's token is known there.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from slipstream_kernels.address import address_of
from slipstream_kernels.adjacency import WIDTH, Adjacency
from slipstream_kernels.isa import function, instruction_set
from slipstream_kernels.recycling import GrowthRule
from slipstream_kernels.sampling import SampleRows, StopTokens

DRAFTERS = ("chain", "recycling", "lookup", "pool")
"""Whose candidates are told apart."""

Int32 = NDArray[np.int32]
Float64 = NDArray[np.float64]


class Curve(Protocol):
    """A calibration curve: `sums` float64 [3, bins]."""

    sums: Float64


class Cells(Protocol):
    """Estimates and counts of one drafter, float64 [8 ranks, 8 depths, levels]; they stay where they are."""

    said: Float64
    new_tried: Float64
    new_accepted: Float64

    @property
    def curve(self) -> Curve: ...  # noqa: D102


class MergedWeights(Protocol):
    """What candidates survive beside each other: float64 [8 sets of sources, 4], which stay where they are."""

    weights: Float64
    squares: Float64

    @property
    def curve(self) -> Curve: ...  # noqa: D102


class Estimates(NamedTuple):
    """What candidates survive: by the cells of their drafter, in the order of DRAFTERS, and beside each other."""

    cells: Sequence[Cells]
    merged: MergedWeights


class Chains(NamedTuple):
    """Drafted chains of B requests, at each of S depths its R best tokens, best first (`sampling.best_choices`).

    `token_ids_BSR` int32, -1 where no token is left, `scores_BSR` float64 from 0 to 1, `lengths_B` int32. A chain goes
    on behind the first token of each depth.
    """

    token_ids_BSR: Int32
    scores_BSR: Float64
    lengths_B: Int32


class Asked(NamedTuple):
    """Trees that B requests want.

    `slots_B` tells them apart between calls, `new_ids` are the tokens that their texts went on with since the last one,
    those of request b ending before `new_ends_B[b]`. `draws_B` are `sampling.sample_rows` at the first drafted token.
    A line of `limits_B4` is (which matrix, -1 for none; root token; nodes; depth). `scopes_B` uint64 says whose past
    outputs a request may find, `stops` what ends its output.
    """

    slots_B: Int32
    new_ids: Int32
    new_ends_B: Int32
    draws_B: SampleRows
    limits_B4: Int32
    scopes_B: NDArray[np.uint64]
    stops: StopTokens
    chains: Chains


class Price(NamedTuple):
    """What nodes cost: `step_s[n]` seconds of the step with n of them, float64, at `token_rate` tokens a second.

    At rate 0 time is worth nothing, and all nodes that can survive are taken. `num_choosing` requests get a token in
    any case. Growth stops at paths that survive less often than `min_survival`.
    """

    step_s: Float64
    token_rate: float
    num_choosing: int
    min_survival: float = 0.0


class Merged(NamedTuple):
    """The chosen trees, one behind the other: that of request b ends before `ends_B[b]`; parents within the tree or -1.

    `expected_tokens` of the step; `num_judged` candidates of earlier trees were counted as trials, which who owns the
    cells is to take in.
    """

    token_ids_X: Int32
    parents_X: Int32
    ends_B: Int32
    expected_tokens: float
    num_judged: int


_ADDRESS, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_double

_NUMBERS = (
    "num_requests",
    "num_choosing",
    "num_matrices",
    "id_bytes",
    "vocab_size",
    "chain_width",
    "max_step_nodes",
    "drafters",
)
_ADDRESSES = (
    "slots",
    "draws",
    "limits",
    "scopes",
    "new_tokens",
    "new_ends",
    "chain_tokens",
    "chain_lengths",
    "chain_scores",
    "matrix_ids",
    "matrix_logprobs",
    "stop_ids",
    "stop_ends",
    "rule",
    "cells",
    "merged",
    "step_s",
    "tokens",
    "parents",
    "ends",
    "figures",
)


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in _NUMBERS),
        ("token_rate", _DOUBLE),
        ("min_survival", _DOUBLE),
        *((name, _ADDRESS) for name in _ADDRESSES),
    ]


class _Cells(ctypes.Structure):
    _fields_ = [
        *((name, _ADDRESS) for name in ("survivals", "tried", "accepted", "curve")),
        ("num_levels", ctypes.c_int64),
    ]


class _MergedWeights(ctypes.Structure):
    _fields_ = [(name, _ADDRESS) for name in ("weights", "squares", "curve")]


class Merger:
    """Grows trees for the requests in `num_slots` slots, of at most `max_nodes` nodes each; for one thread at a time.

    `greedy` and `sampled` are for requests at temperature 0 and above. `pool_tokens` of past outputs are kept. Look-ups
    take part if `drafters` names them. The compiled kernels must be available.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_nodes: int,
        vocab_size: int,
        pool_tokens: int,
        greedy: Estimates,
        sampled: Estimates,
        rule: GrowthRule,
        drafters: Collection[str] = DRAFTERS,
    ) -> None:
        self._handle = self._function("merger_new", _ADDRESS)(_INT(num_slots), ctypes.c_int64(pool_tokens))
        weakref.finalize(self, self._function("merger_free"), _ADDRESS(self._handle))
        self._grow = self._function("merger_grow", _INT)
        self._end = self._function("merger_end", ctypes.c_int64)
        self._release = self._function("merger_release")
        self._keep = self._function("merger_keep")
        self._vocab_size = vocab_size
        self._tokens, self._parents = np.empty((2, max(num_slots * max_nodes, 1)), np.int32)
        self._ends = np.empty(num_slots, np.int32)
        self._figures = np.zeros(2)
        self._kept_alive = (greedy, sampled)
        cells = [_cells_of(one) for one in (*greedy.cells, *sampled.cells)]
        self._cells = (_Cells * len(cells))(*cells)
        self._merged = (_MergedWeights * 2)(*(_weights_of(one.merged) for one in self._kept_alive))
        self._rule = (_DOUBLE * (len(rule) - 1 + WIDTH))(*rule[:-1], *rule.rank_probs)
        self._plan = _Plan(
            vocab_size=vocab_size,
            drafters=sum(1 << place for place, name in enumerate(DRAFTERS) if name in drafters),
            rule=ctypes.addressof(self._rule),
            cells=ctypes.addressof(self._cells),
            merged=ctypes.addressof(self._merged),
            tokens=address_of(self._tokens),
            parents=address_of(self._parents),
            ends=address_of(self._ends),
            figures=address_of(self._figures),
        )

    def _function(self, name: str, result: Any = None) -> Callable[..., Any]:
        found = function(name, instruction_set())
        found.restype = result
        return found  # type: ignore[no-any-return]

    def grow(self, asked: Asked, matrices: Sequence[Adjacency], price: Price) -> Merged:
        """A tree for each request; what it returns is overwritten by the next call.

        Raises ValueError for a root that is no token of the vocabulary.
        """
        plan, chains = self._plan, asked.chains
        plan.num_requests, plan.num_choosing = len(asked.slots_B), price.num_choosing
        plan.num_matrices = len(matrices)
        plan.id_bytes = matrices[0].ids_VN.itemsize if matrices else 0
        plan.chain_width = chains.token_ids_BSR.shape[1]
        plan.max_step_nodes = len(price.step_s) - 1
        plan.token_rate, plan.min_survival = price.token_rate, price.min_survival
        plan.slots, plan.draws = address_of(asked.slots_B), address_of(asked.draws_B)
        plan.limits, plan.scopes = address_of(asked.limits_B4), address_of(asked.scopes_B)
        plan.new_tokens, plan.new_ends = address_of(asked.new_ids), address_of(asked.new_ends_B)
        plan.chain_tokens, plan.chain_lengths = address_of(chains.token_ids_BSR), address_of(chains.lengths_B)
        plan.chain_scores = address_of(chains.scores_BSR)
        plan.stop_ids, plan.stop_ends = map(address_of, asked.stops)
        matrix_ids = (_ADDRESS * len(matrices))(*(address_of(one.ids_VN) for one in matrices))
        matrix_logprobs = (_ADDRESS * len(matrices))(*(address_of(one.logprobs_VN) for one in matrices))
        plan.matrix_ids, plan.matrix_logprobs = ctypes.addressof(matrix_ids), ctypes.addressof(matrix_logprobs)
        plan.step_s = address_of(price.step_s)
        bad_request = self._grow(_ADDRESS(self._handle), ctypes.byref(plan))
        if bad_request >= 0:
            raise ValueError(
                f"(matrix, root, nodes, depth) is {asked.limits_B4[bad_request].tolist()}; expected one of "
                f"{len(matrices)} matrices or -1, and a token of 0..{self._vocab_size - 1}"
            )
        num_requests = len(asked.slots_B)
        end = int(self._ends[num_requests - 1]) if num_requests else 0
        expected_tokens, num_judged = self._figures.tolist()
        return Merged(
            self._tokens[:end], self._parents[:end], self._ends[:num_requests], expected_tokens, int(num_judged)
        )

    def end(self, slot: int, token_ids: Sequence[int]) -> int:
        """The request in this slot ended with these tokens; returns how many candidates that judged.

        What comes last is what looks like going on and does not: without it estimates would be too high.
        """
        ids = np.array(token_ids, np.int32)
        return self._end(  # type: ignore[no-any-return]
            _ADDRESS(self._handle), ctypes.byref(self._plan), _INT(slot), _ADDRESS(address_of(ids)), _INT(len(ids))
        )

    def release(self, slot: int) -> None:
        """The request in this slot has left; its text is forgotten."""
        self._release(_ADDRESS(self._handle), _INT(slot))

    def keep(self, scope: int, token_ids: Sequence[int]) -> None:
        """Keep an output for the look-ups of requests of this scope."""
        ids = np.array(token_ids, np.int32)
        self._keep(_ADDRESS(self._handle), ctypes.c_uint64(scope), _ADDRESS(address_of(ids)), _INT(len(ids)))


def _cells_of(cells: Cells) -> _Cells:
    addresses = _addresses_of(cells.said, cells.new_tried, cells.new_accepted, cells.curve.sums)
    return _Cells(*addresses, cells.said.shape[2])


def _weights_of(merged: MergedWeights) -> _MergedWeights:
    return _MergedWeights(*_addresses_of(merged.weights, merged.squares, merged.curve.sums))


def _addresses_of(*arrays: Float64) -> list[int]:
    for array in arrays:
        assert array.flags.c_contiguous, array.shape
    return [address_of(array) for array in arrays]
