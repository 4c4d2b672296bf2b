"""Look-up drafting: what followed the last time the text looked like this.

`SuffixAutomaton` finds, after every token, the longest ending of a request's text that stood there before, and proposes
what came after it (the online suffix automaton of Blumer et al., 1985, "The smallest automaton recognizing the subwords
of a text"). It only reads committed tokens, which never go back, so it is only ever extended.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.drafting.tree import ROOT

MAX_CLASSES = 4
"""Matching endings that are followed at each token: the longest, and the next shorter ones that stood elsewhere too."""

_START = 0
_NOWHERE = -1


class Continuation(msgspec.Struct, frozen=True):
    """The tokens that followed an earlier occurrence of the last `match_length` tokens; at least one of each."""

    token_ids: tuple[int, ...]
    match_length: int


class LookedUpTree(msgspec.Struct, frozen=True):
    """Continuations as one tree of X nodes, int32 arrays; parents before children, no two equal siblings.

    `parents_X` holds node numbers or ROOT, `depths_X` 1 for children of the root, `ranks_X` the order among siblings
    from 0, `match_lengths_X` the longest match that proposed the node.
    """

    token_ids_X: NDArray[np.int32]
    parents_X: NDArray[np.int32]
    depths_X: NDArray[np.int32]
    ranks_X: NDArray[np.int32]
    match_lengths_X: NDArray[np.int32]


class SuffixAutomaton:
    """Every substring of one growing text, with the first and a recent place of each.

    `extend` costs O(1) amortised, whatever the text. A text of n tokens has at most 2n states, each with a dictionary
    of its next tokens: 280 to 560 bytes a token in all, measured on loops, code, random tokens and random bits at 4,096
    tokens, so memory is bounded by the context.
    """

    def __init__(self) -> None:
        self._tokens = array("i")
        # Per state: what may follow, the longest string's length, the state of its longest ending that occurs
        # elsewhere too, and the last positions of its first and of a recent occurrence.
        self._next: list[dict[int, int]] = [{}]
        self._lengths = array("i", [0])
        self._links = array("i", [_NOWHERE])
        self._first_ends = array("i", [_NOWHERE])
        self._recent_ends = array("i", [_NOWHERE])
        self._last = _START
        self._matches: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def match_length(self) -> int:
        """How many of the last tokens stood together before; 0 if not even the last one did."""
        return self._matches[0][0] if self._matches else 0

    def extend(self, token_ids: Iterable[int]) -> None:
        """The text goes on with these tokens."""
        for token in token_ids:
            self._append(token)
            self._note_matches()

    def continuations(self, *, max_tokens: int, max_continuations: int, min_match: int = 1) -> list[Continuation]:
        """What may follow, longest match first and, of equal matches, the recent place before the first one.

        At most `max_continuations` of at most `max_tokens` tokens, from matches of at least `min_match` tokens. A
        place so near that its continuation reaches the end of the text goes on as a loop does.
        """
        found: list[Continuation] = []
        seen: set[int] = set()
        for length, recent_end, first_end in self._matches:
            for end in (recent_end, first_end):
                if length >= min_match and end not in seen and len(found) < max_continuations and max_tokens > 0:
                    seen.add(end)
                    found.append(Continuation(self._following(end, max_tokens), length))
        return found

    def _following(self, end: int, num_tokens: int) -> tuple[int, ...]:
        copied = tuple(self._tokens[end + 1 : end + 1 + num_tokens])
        num_loops = -(-num_tokens // len(copied))
        return (copied * num_loops)[:num_tokens]

    def _append(self, token: int) -> None:
        """Blumer's step: a state for the whole text, and a clone where a substring's places come to differ."""
        position = len(self._tokens)
        self._tokens.append(token)
        whole = self._new_state({}, position + 1, _START, position, position)
        state = self._last
        while state != _NOWHERE and token not in self._next[state]:
            self._next[state][token] = whole
            state = self._links[state]
        if state != _NOWHERE:
            self._links[whole] = self._exact(state, token)
        self._last = whole

    def _exact(self, state: int, token: int) -> int:
        """The state whose longest string is that of `state` followed by `token`."""
        target = self._next[state][token]
        length = self._lengths[state] + 1
        if self._lengths[target] == length:
            return target
        clone = self._new_state(
            dict(self._next[target]),
            length,
            self._links[target],
            self._first_ends[target],
            self._recent_ends[target],
        )
        self._links[target] = clone
        while state != _NOWHERE and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._links[state]
        return clone

    def _new_state(self, following: dict[int, int], length: int, link: int, first_end: int, recent_end: int) -> int:
        self._next.append(following)
        self._lengths.append(length)
        self._links.append(link)
        self._first_ends.append(first_end)
        self._recent_ends.append(recent_end)
        return len(self._next) - 1

    def _note_matches(self) -> None:
        """The endings of the text that stood elsewhere before, longest first; each now stood here most recently.

        Only MAX_CLASSES of them, which keeps the cost of a token bounded: states beyond keep an older recent place.
        """
        self._matches = []
        state = self._links[self._last]
        while state != _START and len(self._matches) < MAX_CLASSES:
            self._matches.append((self._lengths[state], self._recent_ends[state], self._first_ends[state]))
            self._recent_ends[state] = len(self._tokens) - 1
            state = self._links[state]


def tree_of(continuations: Sequence[Continuation], *, max_nodes: int) -> LookedUpTree:
    """One tree of the continuations, in their order, until it has `max_nodes` nodes."""
    nodes: dict[tuple[int, int], int] = {}
    num_children: dict[int, int] = {}
    rows: list[tuple[int, int, int, int, int]] = []
    for one in continuations:
        parent = ROOT
        for depth, token in enumerate(one.token_ids, start=1):
            node = nodes.get((parent, token))
            if node is None:
                if len(rows) >= max_nodes:
                    break
                node = nodes[parent, token] = len(rows)
                rank = num_children.get(parent, 0)
                num_children[parent] = rank + 1
                rows.append((token, parent, depth, rank, one.match_length))
            parent = node
    columns = np.array(rows, dtype=np.int32).reshape(-1, 5).T.copy()
    return LookedUpTree(*columns)
