"""Look-ups: what followed the last time a text looked like this, in the request itself and in outputs of the past.

csrc/lookup.h says what the two classes do; drafting grows its trees from them without coming back to Python, so these
here are for tests and measurements. They need the compiled kernels.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream_kernels.address import address_of
from slipstream_kernels.isa import Signatures, instruction_set, typed

MAX_CLASSES = 4
"""Matching endings that an automaton follows: the longest, and the next shorter ones that stood elsewhere too."""

NGRAM_TOKENS = (8, 3)
"""Sizes of the n-grams that a pool finds outputs by, longest first; the last is the shortest match there is."""

MAX_PLACES = 16
"""Places that a pool keeps per n-gram, the latest ones."""

MAX_MATCH_TOKENS = 64
"""Where a pool stops comparing a match: one this long says all that a longer one does."""

_ADDRESS, _INT, _LONG, _SCOPE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
_SIGNATURES: Signatures = {
    "automaton_new": (_ADDRESS, ()),
    "automaton_free": (None, (_ADDRESS,)),
    "automaton_extend": (None, (_ADDRESS, _ADDRESS, _INT)),
    "automaton_clear": (None, (_ADDRESS,)),
    "automaton_num_tokens": (_INT, (_ADDRESS,)),
    "automaton_match_length": (_INT, (_ADDRESS,)),
    "automaton_num_bytes": (_LONG, (_ADDRESS,)),
    "automaton_continuations": (_INT, (_ADDRESS, _INT, _INT, _ADDRESS)),
    "output_pool_new": (_ADDRESS, (_LONG,)),
    "output_pool_free": (None, (_ADDRESS,)),
    "output_pool_add": (None, (_ADDRESS, _SCOPE, _ADDRESS, _INT)),
    "output_pool_look_up": (_INT, (_ADDRESS, _SCOPE, _ADDRESS, _INT, _INT, _INT, _ADDRESS)),
    "output_pool_num_tokens": (_LONG, (_ADDRESS,)),
    "output_pool_num_outputs": (_INT, (_ADDRESS,)),
    "output_pool_num_bytes": (_LONG, (_ADDRESS,)),
}
_compiled = typed(_SIGNATURES)


class _Found(ctypes.Structure):
    # `Continuation` of lookup.h, field by field.
    _fields_ = (
        ("tokens", _ADDRESS),
        ("num_tokens", _INT),
        ("is_loop", ctypes.c_bool),
        ("match_length", _INT),
    )


_AUTOMATON_ROOM = _Found * (2 * MAX_CLASSES)
_POOL_ROOM = _Found * (len(NGRAM_TOKENS) * MAX_PLACES)


class Continuation(NamedTuple):
    """The tokens that followed an earlier occurrence of the last `match_length` tokens; at least one of each."""

    token_ids: tuple[int, ...]
    match_length: int


class SuffixAutomaton:
    """Every substring of one growing text, with the first and a recent place of each."""

    def __init__(self) -> None:
        """Raises KernelsUnavailable."""
        self._isa = instruction_set()
        self._handle = _compiled("automaton_new", self._isa)()
        weakref.finalize(self, _compiled("automaton_free", self._isa), self._handle)

    def __len__(self) -> int:
        return int(self._call("automaton_num_tokens"))

    @property
    def match_length(self) -> int:
        """How many of the last tokens stood together before; 0 if not even the last one did."""
        return int(self._call("automaton_match_length"))

    @property
    def num_bytes(self) -> int:
        """Memory allocated."""
        return int(self._call("automaton_num_bytes"))

    def extend(self, token_ids: Sequence[int] | NDArray[np.int32]) -> None:
        """The text goes on with these tokens."""
        tokens_T = _tokens(token_ids)
        self._call("automaton_extend", address_of(tokens_T), len(tokens_T))

    def clear(self) -> None:
        """Start again with an empty text."""
        self._call("automaton_clear")

    def continuations(self, *, max_tokens: int, max_continuations: int, min_match: int = 1) -> list[Continuation]:
        """What may follow, longest match first and, of equal matches, the recent place before the first one.

        At most `max_continuations` of at most `max_tokens` tokens, from matches of at least `min_match` tokens. What
        reaches the end of the text goes on as a loop does.
        """
        room = _AUTOMATON_ROOM()
        number = self._call("automaton_continuations", max_continuations, min_match, room)
        return [_read(found, max_tokens) for found in room[:number]] if max_tokens > 0 else []

    def _call(self, name: str, *arguments: Any) -> Any:
        return _compiled(name, self._isa)(self._handle, *arguments)


class OutputPool:
    """Past outputs of at most `max_tokens` tokens in all; the least recently used goes first.

    Using is adding (again) or being found by `look_up`. A scope (a tenant, as a rule) is a number from 0 to 2^64 - 1;
    what is added in one is found in that one only.
    """

    def __init__(self, *, max_tokens: int) -> None:
        """Raises KernelsUnavailable, and ValueError for a negative bound; 0 keeps nothing."""
        if max_tokens < 0:
            raise ValueError(f"max_tokens is {max_tokens}, expected at least 0 (0 keeps nothing)")
        self._isa = instruction_set()
        self._handle = _compiled("output_pool_new", self._isa)(max_tokens)
        weakref.finalize(self, _compiled("output_pool_free", self._isa), self._handle)

    @property
    def num_tokens(self) -> int:
        """Tokens it holds now."""
        return int(self._call("output_pool_num_tokens"))

    @property
    def num_outputs(self) -> int:
        """Outputs it holds now."""
        return int(self._call("output_pool_num_outputs"))

    @property
    def num_bytes(self) -> int:
        """Memory allocated."""
        return int(self._call("output_pool_num_bytes"))

    def add(self, scope: int, token_ids: Sequence[int] | NDArray[np.int32]) -> None:
        """Keep an output, of a longer one than fits the end; one that is there already counts as used."""
        tokens_T = _tokens(token_ids)
        self._call("output_pool_add", scope, address_of(tokens_T), len(tokens_T))

    def look_up(
        self, scope: int, token_ids: Sequence[int] | NDArray[np.int32], *, max_tokens: int, max_continuations: int
    ) -> list[Continuation]:
        """What followed the longest endings of `token_ids` in past outputs, longest match first, then the latest.

        The longest match of the scope is among them unless its n-gram was added MAX_PLACES times since; a match is at
        least the shortest n-gram long, and one of MAX_MATCH_TOKENS is as good as any longer. Continuations differ, and
        have at most `max_tokens` tokens; what is found counts as used.
        """
        tokens_T, room = _tokens(token_ids), _POOL_ROOM()
        number = self._call(
            "output_pool_look_up", scope, address_of(tokens_T), len(tokens_T), max_tokens, max_continuations, room
        )
        return [_read(found, max_tokens) for found in room[:number]]

    def _call(self, name: str, *arguments: Any) -> Any:
        return _compiled(name, self._isa)(self._handle, *arguments)


def _tokens(token_ids: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(token_ids, np.int32)


def _read(found: _Found, max_tokens: int) -> Continuation:
    """The first tokens of a continuation, of a loop as many as asked for."""
    number = min(found.num_tokens, max_tokens)
    tokens = tuple((_INT * number).from_address(found.tokens))
    if found.is_loop:
        tokens = (tokens * -(-max_tokens // number))[:max_tokens]
    return Continuation(tokens, found.match_length)
