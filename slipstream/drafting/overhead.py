"""What steps take beside their pass, by mode and size of the batch to a factor of two.

What drafting costs shows there, wherever it is spent.
"""

from __future__ import annotations

from slipstream.drafting.modes import Mode

_AT_FIRST_S = 2e-4
"""What a step takes beside its pass, until one was seen."""

_NEWEST_SHARE = 0.1
"""What the newest such time counts for, after as many steps as make it so."""

_LARGEST_RATIO = 2.0
"""A step that the machine interrupted counts as so many times what is expected, at most."""


class Overhead:
    """Means of the newest steps."""

    def __init__(self) -> None:
        self._means_s: dict[tuple[Mode, int], tuple[int, float]] = {}

    def expected_s(self, mode: Mode, num_requests: int) -> float:
        """What a step of so many requests should take beside its pass, in seconds."""
        return self._means_s.get((mode, num_requests.bit_length()), (0, _AT_FIRST_S))[1]

    def observe(self, mode: Mode, num_requests: int, seconds: float) -> None:
        """A step took so long beside its pass."""
        key = mode, num_requests.bit_length()
        number, mean_s = self._means_s.get(key, (0, seconds))
        if number == 1:  # the first one may have been interrupted as well
            mean_s = min(mean_s, _LARGEST_RATIO * seconds)
        share = max(_NEWEST_SHARE, 1 / (number + 1))
        newest_s = min(seconds, _LARGEST_RATIO * mean_s)
        self._means_s[key] = number + 1, mean_s + share * (newest_s - mean_s)

    def forget(self, mode: Mode) -> None:
        """Begin anew with a mode."""
        for key in [key for key in self._means_s if key[0] is mode]:
            del self._means_s[key]
