"""A pool of past outputs: what other requests went on with after the same words.

A tenant's requests find that tenant's outputs only. A pool that all tenants share would never show one of them a token
of another (the target verifies every token), but how fast an answer comes would tell whether somebody wrote it before;
so sharing is a choice of the operator (`is_shared`), not the default. Room is one bound for all tenants.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from slipstream.drafting.lookup import Continuation

NGRAM_TOKENS = (8, 3)
"""Sizes of the n-grams that outputs are found by, longest first; the last is the shortest match there is."""

MAX_PLACES = 16
"""Places kept per n-gram, the latest ones: a common n-gram would have thousands, all equally telling."""

MAX_MATCH_TOKENS = 64
"""Where comparing a match stops: one this long says all that a longer one does."""


class _Output(msgspec.Struct, frozen=True):
    scope: str
    token_ids: array[int]


class OutputPool:
    """Past outputs of at most `max_tokens` tokens in all; the least recently used goes first.

    Using is adding (again) or being found by `look_up`. Memory: 380 bytes a token (measured on code), nearly all of
    it the index, so 65,536 tokens take 24 MiB.
    """

    def __init__(self, *, max_tokens: int, is_shared: bool = False) -> None:
        if max_tokens < 0:
            raise ValueError(f"max_tokens is {max_tokens}, expected at least 0 (0 keeps nothing)")
        self._max_tokens = max_tokens
        self._is_shared = is_shared
        self._num_tokens = 0
        self._outputs: OrderedDict[int, _Output] = OrderedDict()
        self._numbers: dict[tuple[str, bytes], int] = {}
        self._places: dict[int, list[tuple[int, int]]] = {}
        self._next_number = 0

    @property
    def num_tokens(self) -> int:
        """Tokens it holds now."""
        return self._num_tokens

    @property
    def num_outputs(self) -> int:
        """Outputs it holds now."""
        return len(self._outputs)

    def add(self, tenant: str, token_ids: Sequence[int]) -> None:
        """Keep an output, of a longer one than fits the end; one that is there already counts as used."""
        kept = array("i", token_ids[max(len(token_ids) - self._max_tokens, 0) :])
        scope = self._scope(tenant)
        content = (scope, kept.tobytes())
        if content in self._numbers:
            self._outputs.move_to_end(self._numbers[content])
            return
        if len(kept) <= NGRAM_TOKENS[-1]:
            return
        while self._num_tokens + len(kept) > self._max_tokens:
            self._drop_oldest()
        number = self._numbers[content] = self._next_number
        self._next_number += 1
        self._outputs[number] = _Output(scope, kept)
        self._num_tokens += len(kept)
        for key, end in _ngrams(scope, kept):
            places = self._places.setdefault(key, [])
            places.append((number, end))
            del places[:-MAX_PLACES]

    def look_up(
        self, tenant: str, token_ids: Sequence[int], *, max_tokens: int, max_continuations: int
    ) -> list[Continuation]:
        """What followed the longest endings of `token_ids` in past outputs, longest match first, then the latest.

        The longest match of the pool is among them unless its n-gram occurred MAX_PLACES times since; a match is at
        least the shortest n-gram long, and one of MAX_MATCH_TOKENS is as good as any longer. Continuations differ, and
        have at most `max_tokens` tokens; what is found counts as used.
        """
        ending = tuple(token_ids[-MAX_MATCH_TOKENS:])
        lengths = self._match_lengths(self._scope(tenant), ending)
        best = sorted(lengths.items(), key=lambda item: (item[1], item[0]), reverse=True)
        found: dict[tuple[int, ...], Continuation] = {}
        for (number, end), length in best:
            if len(found) >= max_continuations or max_tokens < 1:
                break
            following = tuple(self._outputs[number].token_ids[end + 1 : end + 1 + max_tokens])
            if following not in found:
                found[following] = Continuation(following, length)
                self._outputs.move_to_end(number)
        return list(found.values())

    def _match_lengths(self, scope: str, ending: tuple[int, ...]) -> dict[tuple[int, int], int]:
        """How many tokens agree at every place that the index names for this ending."""
        lengths: dict[tuple[int, int], int] = {}
        for size in NGRAM_TOKENS:
            if len(ending) < size:
                continue
            for place in self._places.get(_key(scope, ending[-size:]), ()):
                if place not in lengths:
                    output = self._outputs[place[0]]
                    agreeing = _agreeing(output.token_ids, place[1], ending) if output.scope == scope else 0
                    if agreeing >= NGRAM_TOKENS[-1]:
                        lengths[place] = agreeing
        return lengths

    def _drop_oldest(self) -> None:
        number, output = self._outputs.popitem(last=False)
        del self._numbers[output.scope, output.token_ids.tobytes()]
        self._num_tokens -= len(output.token_ids)
        for key, end in _ngrams(output.scope, output.token_ids):
            places = self._places.get(key, [])
            if (number, end) in places:
                places.remove((number, end))
            if not places:
                self._places.pop(key, None)

    def _scope(self, tenant: str) -> str:
        return "" if self._is_shared else tenant


def _ngrams(scope: str, token_ids: array[int]) -> list[tuple[int, int]]:
    """(key, last position) of every n-gram that something follows."""
    return [
        (_key(scope, token_ids[end + 1 - size : end + 1]), end)
        for size in NGRAM_TOKENS
        for end in range(size - 1, len(token_ids) - 1)
    ]


def _key(scope: str, ngram: Sequence[int]) -> int:
    """Equal for equal n-grams of a scope; where others collide, comparing the tokens tells them apart."""
    return hash((scope, *ngram))


def _agreeing(token_ids: array[int], end: int, ending: tuple[int, ...]) -> int:
    """How many tokens up to `end` equal the last ones of `ending`."""
    limit = min(end + 1, len(ending))
    count = 0
    while count < limit and token_ids[end - count] == ending[-1 - count]:
        count += 1
    return count
