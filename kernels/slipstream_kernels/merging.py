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
import struct
import weakref
from array import array
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from slipstream_kernels.address import address_of
from slipstream_kernels.adjacency import WIDTH, Adjacency
from slipstream_kernels.isa import instruction_set, typed
from slipstream_kernels.recycling import GrowthRule
from slipstream_kernels.sampling import ROW

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


NO_MATRIX = -1
"""The place of the matrix of a request that drafts from none."""


class Wanted(NamedTuple):
    """The tree that a request wants, of up to `max_nodes` nodes and `max_depth` tokens along a path.

    `slot` tells requests apart between calls; the text went on with `new_ids` since the last one, and ends with `root`.
    `draw` is a row of `sampling.row_bytes` at the position of the first drafted token, `matrix` which of the matrices
    to draft from. `scope`, in [0, 2**64), says whose past outputs the request may find, `stop_ids` what ends it.
    """

    slot: int
    new_ids: Sequence[int]
    root: int
    draw: bytes
    max_nodes: int
    max_depth: int
    matrix: int = NO_MATRIX
    scope: int = 0
    stop_ids: Sequence[int] = ()


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


_ADDRESS, _INT, _BYTES = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p

# A step's requests, matrices and the rest of it are packed into bytes at once: behind a pass of the target every first
# look at something costs misses of all caches, and setting thirty fields took longer than growing the trees.
# (draw, scope, slot, matrix, root, nodes, depth, end of new ids, end of stop ids)
_REQUEST = struct.Struct(f"<{ROW.itemsize}sQ7i4x")
# (ids, log-probabilities)
_MATRIX = struct.Struct("<2Q")
# (seconds, ids, chains' tokens, lengths, scores; token rate, least survival; numbers of requests, requests that choose,
# matrices, bytes of a matrix's id, width of a chain, most nodes of the step)
_STEP = struct.Struct("<5Q2d6i")

_compiled = typed(
    {
        "merger_new": (_ADDRESS, (_INT, ctypes.c_int64)),
        "merger_free": (None, (_ADDRESS,)),
        "merger_grow": (_INT, (_ADDRESS, _ADDRESS, _BYTES, _BYTES, _BYTES)),
        "merger_end": (ctypes.c_int64, (_ADDRESS, _ADDRESS, _INT, _ADDRESS, _INT)),
        "merger_release": (None, (_ADDRESS, _INT)),
        "merger_keep": (None, (_ADDRESS, ctypes.c_uint64, _ADDRESS, _INT)),
    }
)


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("vocab_size", "drafters")),
        *((name, _ADDRESS) for name in ("rule", "cells", "merged", "tokens", "parents", "ends", "figures")),
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
        isa = instruction_set()
        self._handle = _compiled("merger_new", isa)(num_slots, pool_tokens)
        weakref.finalize(self, _compiled("merger_free", isa), self._handle)
        self._grow, self._end, self._release, self._keep = (
            _compiled(f"merger_{name}", isa) for name in ("grow", "end", "release", "keep")
        )
        self._vocab_size = vocab_size
        self._tokens, self._parents = np.empty((2, max(num_slots * max_nodes, 1)), np.int32)
        self._ends = np.empty(num_slots, np.int32)
        self._figures = np.zeros(2)
        self._kept_alive = (greedy, sampled)
        cells = [_cells_of(one) for one in (*greedy.cells, *sampled.cells)]
        self._cells = (_Cells * len(cells))(*cells)
        self._merged = (_MergedWeights * 2)(*(_weights_of(one.merged) for one in self._kept_alive))
        self._rule = (ctypes.c_double * (len(rule) - 1 + WIDTH))(*rule[:-1], *rule.rank_probs)
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
        self._plan_address = ctypes.addressof(self._plan)

    def grow(
        self, wanted: Sequence[Wanted], matrices: Sequence[Adjacency], price: Price, *, chains: Chains | None = None
    ) -> Merged:
        """A tree for each request, from its chain among others; what it returns is overwritten by the next call.

        The price is of no more nodes than all slots have. Raises ValueError for a root that is no token of the
        vocabulary, or a slot or matrix that is not there.
        """
        assert len(wanted) <= len(self._ends), (len(wanted), len(self._ends))
        assert len(price.step_s) - 1 <= len(self._tokens), (len(price.step_s), len(self._tokens))
        assert chains is None or len(chains.lengths_B) == len(wanted), len(wanted)
        ids = array("i")
        requests = b"".join([_packed(one, ids) for one in wanted])
        bad_request = self._grow(
            self._handle,
            self._plan_address,
            _STEP.pack(
                address_of(price.step_s),
                ids.buffer_info()[0],
                *(_NO_CHAINS if chains is None else _chain_addresses(chains)),
                price.token_rate,
                price.min_survival,
                len(wanted),
                price.num_choosing,
                len(matrices),
                matrices[0].ids_VN.itemsize if matrices else 0,
                0 if chains is None else chains.token_ids_BSR.shape[1],
                len(price.step_s) - 1,
            ),
            requests,
            b"".join([_MATRIX.pack(address_of(one.ids_VN), address_of(one.logprobs_VN)) for one in matrices]),
        )
        if bad_request >= 0:
            bad = wanted[bad_request]
            raise ValueError(
                f"(slot, matrix, root) is {[bad.slot, bad.matrix, bad.root]}; expected one of {len(self._ends)} slots, "
                f"one of {len(matrices)} matrices or {NO_MATRIX}, and a token of 0..{self._vocab_size - 1}"
            )
        end = int(self._ends[len(wanted) - 1]) if wanted else 0
        expected_tokens, num_judged = self._figures.tolist()
        return Merged(
            self._tokens[:end], self._parents[:end], self._ends[: len(wanted)], expected_tokens, int(num_judged)
        )

    def end(self, slot: int, token_ids: Sequence[int]) -> int:
        """The request in this slot ended with these tokens; returns how many candidates that judged.

        What comes last is what looks like going on and does not: without it estimates would be too high.
        """
        assert 0 <= slot < len(self._ends), (slot, len(self._ends))
        ids = array("i", token_ids)
        return self._end(  # type: ignore[no-any-return]
            self._handle, self._plan_address, slot, ids.buffer_info()[0], len(ids)
        )

    def release(self, slot: int) -> None:
        """The request in this slot has left; its text is forgotten."""
        assert 0 <= slot < len(self._ends), (slot, len(self._ends))
        self._release(self._handle, slot)

    def keep(self, scope: int, token_ids: Sequence[int]) -> None:
        """Keep an output for the look-ups of requests of this scope."""
        ids = array("i", token_ids)
        self._keep(self._handle, scope, ids.buffer_info()[0], len(ids))


_NO_CHAINS = 0, 0, 0


def _chain_addresses(chains: Chains) -> tuple[int, int, int]:
    return address_of(chains.token_ids_BSR), address_of(chains.lengths_B), address_of(chains.scores_BSR)


def _packed(wanted: Wanted, ids: array[int]) -> bytes:
    """A `_REQUEST`, whose tokens go to the end of `ids`."""
    assert len(wanted.draw) == ROW.itemsize, wanted.draw
    ids.extend(wanted.new_ids)
    new_end = len(ids)
    ids.extend(wanted.stop_ids)
    return _REQUEST.pack(
        wanted.draw,
        wanted.scope,
        wanted.slot,
        wanted.matrix,
        wanted.root,
        wanted.max_nodes,
        wanted.max_depth,
        new_end,
        len(ids),
    )


def _cells_of(cells: Cells) -> _Cells:
    addresses = _addresses_of(cells.said, cells.new_tried, cells.new_accepted, cells.curve.sums)
    return _Cells(*addresses, cells.said.shape[2])


def _weights_of(merged: MergedWeights) -> _MergedWeights:
    return _MergedWeights(*_addresses_of(merged.weights, merged.squares, merged.curve.sums))


def _addresses_of(*arrays: Float64) -> list[int]:
    for one in arrays:
        assert one.flags.c_contiguous, one.shape
    return [address_of(one) for one in arrays]
