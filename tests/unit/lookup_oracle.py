"""The definition of look-ups in plain Python, which the compiled ones equal in every answer."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from slipstream_kernels.lookup import MAX_CLASSES, MAX_MATCH_TOKENS, MAX_PLACES, NGRAM_TOKENS, Continuation

_START = 0
_NOWHERE = -1


class SuffixAutomaton:
    """The compiled class of this name, with a dictionary of next tokens per state."""

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
        return self._matches[0][0] if self._matches else 0

    def extend(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            self._append(token)
            self._note_matches()

    def continuations(self, *, max_tokens: int, max_continuations: int, min_match: int = 1) -> list[Continuation]:
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
        self._matches = []
        state = self._links[self._last]
        while state != _START and len(self._matches) < MAX_CLASSES:
            self._matches.append((self._lengths[state], self._recent_ends[state], self._first_ends[state]))
            self._recent_ends[state] = len(self._tokens) - 1
            state = self._links[state]


class _Output(msgspec.Struct, frozen=True):
    scope: int
    token_ids: tuple[int, ...]


class OutputPool:
    """The compiled class of this name, with a list of places per n-gram."""

    def __init__(self, *, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._outputs: OrderedDict[int, _Output] = OrderedDict()
        self._numbers: dict[_Output, int] = {}
        self._places: dict[tuple[int, tuple[int, ...]], list[tuple[int, int]]] = {}
        self._next_number = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(output.token_ids) for output in self._outputs.values())

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    @property
    def kept(self) -> list[tuple[int, ...]]:
        """What it holds now, the least recently used first."""
        return [output.token_ids for output in self._outputs.values()]

    def add(self, scope: int, token_ids: Sequence[int]) -> None:
        output = _Output(scope, tuple(token_ids[max(len(token_ids) - self._max_tokens, 0) :]))
        if output in self._numbers:
            self._outputs.move_to_end(self._numbers[output])
            return
        if len(output.token_ids) <= NGRAM_TOKENS[-1]:
            return
        while self.num_tokens + len(output.token_ids) > self._max_tokens:
            self._drop_oldest()
        number = self._numbers[output] = self._next_number
        self._next_number += 1
        self._outputs[number] = output
        for ngram, end in _ngrams(output):
            places = self._places.setdefault(ngram, [])
            places.append((number, end))
            del places[:-MAX_PLACES]

    def look_up(
        self, scope: int, token_ids: Sequence[int], *, max_tokens: int, max_continuations: int
    ) -> list[Continuation]:
        ending = tuple(token_ids[-MAX_MATCH_TOKENS:])
        lengths = self._match_lengths(scope, ending)
        best = sorted(lengths.items(), key=lambda item: (item[1], item[0]), reverse=True)
        found: dict[tuple[int, ...], Continuation] = {}
        for (number, end), length in best:
            if len(found) >= max_continuations or max_tokens < 1:
                break
            following = self._outputs[number].token_ids[end + 1 : end + 1 + max_tokens]
            if following not in found:
                found[following] = Continuation(following, length)
                self._outputs.move_to_end(number)
        return list(found.values())

    def _match_lengths(self, scope: int, ending: tuple[int, ...]) -> dict[tuple[int, int], int]:
        """How many tokens agree at every place that the index names for this ending."""
        lengths: dict[tuple[int, int], int] = {}
        for size in NGRAM_TOKENS:
            for place in self._places.get((scope, ending[-size:]), ()):
                lengths[place] = agreeing(self._outputs[place[0]].token_ids, place[1], ending)
        return lengths

    def _drop_oldest(self) -> None:
        number, output = self._outputs.popitem(last=False)
        del self._numbers[output]
        for ngram, end in _ngrams(output):
            places = self._places.get(ngram, [])
            if (number, end) in places:
                places.remove((number, end))


def _ngrams(output: _Output) -> list[tuple[tuple[int, tuple[int, ...]], int]]:
    """((scope, tokens), last position) of every n-gram that something follows."""
    return [
        ((output.scope, output.token_ids[end + 1 - size : end + 1]), end)
        for size in NGRAM_TOKENS
        for end in range(size - 1, len(output.token_ids) - 1)
    ]


def agreeing(token_ids: Sequence[int], end: int, ending: Sequence[int]) -> int:
    """How many tokens up to `end` equal the last ones of `ending`."""
    limit = min(end + 1, len(ending))
    return next((count for count in range(limit) if token_ids[end - count] != ending[-1 - count]), limit)
