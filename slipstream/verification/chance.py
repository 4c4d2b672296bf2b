"""Where a rule's random decisions come from: keyed random numbers, one stream for each purpose.

A stream is told apart by the last word of the noise counter (`slipstream_kernels.noise`), the redraw:

    bits    0 ... 19   redraw: how many passes of this request were verified before
    bits   20 ... 28   lane: which node's candidates are drawn, 0 for the root's, x + 1 for node x's
    bits   29 ... 30   purpose

The target's own noise has purpose, lane and redraw 0. Streams must not meet: a draft drawn with the numbers that later
accept it, or that replace it, is biased. Under a rejection rule the redraw has to rise with every pass too: a pass
looks at candidates behind the place where it stops, so their noise may not be used again for the same positions.
Equality needs none of this: there, seeing the target's noise is what makes a draft good.
"""

from __future__ import annotations

import enum
from typing import Any, Protocol, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream_kernels.isa import is_available
from slipstream_kernels.noise import gumbel_noise, philox
from slipstream_kernels.sampling import SampleRows, noise, row_bytes, sample_rows

Row = TypeVar("Row", Tensor, NDArray[Any])
"""A vector or matrix over the vocabulary. Rules use only what tensors and arrays have in common, so that what is proven
with arrays of fractions is the code that serves."""

NUM_LANES = 1 << 9
NUM_REDRAWS = 1 << 20
_LANE_SHIFT = 20
_PURPOSE_SHIFT = 29

_MASK = 0xFFFFFFFF
_UNIFORM_BITS = 52
_KEY_COLUMNS = ("seed", "sample_index", "redraw", "position")


class Purpose(enum.IntEnum):
    """What a random number decides: the target's token, a draft's candidates, an acceptance, the token after one."""

    TARGET = 0
    DRAFT = 1
    ACCEPTANCE = 2
    RESIDUAL = 3


def stream(purpose: Purpose, *, redraw: int, lane: int = 0) -> int:
    """The redraw word of a stream, in [0, 2**31). Raises ValueError if `redraw` or `lane` has no room."""
    if not 0 <= redraw < NUM_REDRAWS:
        raise ValueError(f"redraw is {redraw}; expected 0 to {NUM_REDRAWS - 1}: end the request or speculate no more")
    if not 0 <= lane < NUM_LANES:
        raise ValueError(f"lane is {lane}; expected 0 to {NUM_LANES - 1}: draft a tree of fewer nodes")
    return purpose << _PURPOSE_SHIFT | lane << _LANE_SHIFT | redraw


class Chance(Protocol):
    """Random decisions, each made once; `depth` is that of the token decided on, 0 for the root's children."""

    def accepts(self, part: Any, *, out_of: Any, depth: int, attempt: int = 0) -> bool:
        """True with probability min(1, part / out_of), never if `part` is 0; numbers at least 0.

        `attempt` tells several decisions about one depth apart.
        """

    def draws(self, weights_V: Row, *, depth: int, purpose: Purpose) -> int:
        """A token, each with a probability in proportion to its weight; at least one weight is above 0."""


class KeyedChance:
    """Decisions of one pass over one request, a function of the key alone.

    `first_position` is the absolute position of the token that the root's row decides, `redraw` the number of passes of
    this request before. Ties of float64 rounding aside, the target's draws are the tokens of
    `slipstream_kernels.sampling.choose`.
    """

    def __init__(self, *, seed: int, first_position: int, sample_index: int = 0, redraw: int = 0) -> None:
        self._seed = seed
        self._sample_index = sample_index
        self._first_position = first_position
        self._streams = {purpose: stream(purpose, redraw=redraw) for purpose in Purpose}
        self._streams[Purpose.TARGET] = stream(Purpose.TARGET, redraw=0)

    def accepts(self, part: Any, *, out_of: Any, depth: int, attempt: int = 0) -> bool:
        """Compares with a uniform number of 52 bits, which is neither 0 nor 1."""
        return self._uniform(Purpose.ACCEPTANCE, depth, attempt) * float(out_of) < float(part)

    def draws(self, weights_V: Row, *, depth: int, purpose: Purpose) -> int:
        """By the target's own noise for TARGET, else by inverting the cumulative weights."""
        weights = torch.as_tensor(weights_V, dtype=torch.float64)
        if purpose == Purpose.TARGET:
            noise_V = self._noise(depth, vocab_size=len(weights), device=weights.device)
            return int((weights.log() + noise_V).argmax())
        cumulative = weights.cumsum(0)
        # A product rounded to double stays below the last sum, so a token is found, and its own weight is above 0.
        return int(torch.searchsorted(cumulative, self._uniform(purpose, depth, 0) * cumulative[-1], right=True))

    def _uniform(self, purpose: Purpose, depth: int, index: int) -> float:
        counter = (index, self._first_position + depth, self._sample_index, self._streams[purpose])
        high, low, *_ = philox(counter, (self._seed & _MASK, (self._seed >> 32) & _MASK))
        return ((high << (_UNIFORM_BITS - 32) | low >> (64 - _UNIFORM_BITS)) + 0.5) * 2.0**-_UNIFORM_BITS

    def _noise(self, depth: int, *, vocab_size: int, device: torch.device) -> Tensor:
        key = self._streams[Purpose.TARGET]
        row = row_bytes(seed=self._seed, temperature=1.0, sample_index=self._sample_index, redraw=key)
        return noise_of(sample_rows([row], [self._first_position + depth]), vocab_size=vocab_size, device=device)[0]


def noise_of(rows_X: SampleRows, *, vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The Gumbel noise float64 [X, V] of sample rows, on a device; the same bits on every one."""
    if torch.device(device).type == "cpu" and is_available():
        rows = [torch.from_numpy(noise(rows_X[row : row + 1], vocab_size)) for row in range(len(rows_X))]
        return torch.stack(rows) if rows else torch.empty(0, vocab_size, dtype=torch.float64)
    columns = {name: torch.from_numpy(rows_X[name].astype("int64")).to(device) for name in _KEY_COLUMNS}
    return gumbel_noise(
        seeds_X=columns["seed"],
        sample_indices_X=columns["sample_index"],
        redraws_X=columns["redraw"],
        positions_X=columns["position"],
        vocab_size=vocab_size,
    )
