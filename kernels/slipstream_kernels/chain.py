"""A chain drafted by a small decoder in one call: pass, choose, and again."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream_kernels.address import address_of
from slipstream_kernels.decoder import Decoder, Plan
from slipstream_kernels.merging import Chains
from slipstream_kernels.sampling import NUM_CHOICES, SampleRows, StopTokens

Int32 = NDArray[np.int32]
Float64 = NDArray[np.float64]


class _ChainPlan(ctypes.Structure):
    _fields_ = [
        ("num_requests", ctypes.c_int32),
        ("width", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("slots", "max_tokens", "bases", "draws", "stop_ids", "stop_ends")),
        *((name, ctypes.c_void_p) for name in ("tokens", "scores", "lengths")),
        ("min_survival", ctypes.c_double),
        ("pass_tokens", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("greedy_survivals", "sampled_survivals")),
    ]


class ChainWorth(NamedTuple):
    """When chains end: one whose next token would survive less often than `min_survival`, and all of them once what
    their next tokens survive, less that, adds up to less than the `pass_tokens` that the next pass costs: who drafts
    with others pays for a pass together.

    A next token is expected to survive its forerunners as they survived theirs, on average. Survivals are float64
    [8 depths, score levels], at temperature 0 and above it (`slipstream.drafting.survival`).
    """

    min_survival: float
    pass_tokens: float
    greedy: Float64
    sampled: Float64


class AskedChains(NamedTuple):
    """Chains that B requests want: of at most `max_tokens_B` tokens, each at least 1, ending with one of its `stops`.

    Requests are in `slots_B`. `draws_B` are at the position of the first drafted token; positions of the cache count
    from `bases_B`.
    """

    slots_B: Int32
    max_tokens_B: Int32
    bases_B: Int32
    draws_B: SampleRows
    stops: StopTokens


def draft_chains(decoder: Decoder, first: Plan, asked: AskedChains, *, worth: ChainWorth | None = None) -> Chains:
    """Drafts token after token with the requests' noise and filters.

    `first` is the pass that brings the cache level with the B requests, and asks for a row of logits for each, in
    order. Drafted tokens are computed in place behind it, all but the last. Scores are the shares of
    `sampling.best_choices`; a chain ends early once it is not `worth` going on.
    """
    num_requests, width = len(asked.slots_B), int(asked.max_tokens_B.max())
    price = (0.0, 0.0, None, None) if worth is None else (*worth[:2], *map(address_of, worth[2:]))
    shape = num_requests, width, NUM_CHOICES
    chains = Chains(np.empty(shape, np.int32), np.empty(shape), np.empty(num_requests, np.int32))
    plan = _ChainPlan(
        num_requests,
        width,
        *(address_of(array) for array in (*asked[:-1], *asked.stops, *chains)),
        *price,
    )
    decoder.draft_chain(first, ctypes.addressof(plan))
    return chains
