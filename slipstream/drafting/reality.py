"""What steps took beside their pass, and how they turned out beside what was expected of them, by mode.

The budget takes the nodes that look best, and so more often those that look better than they are; and what it does not
know of a step's cost is missing from its price. Both show in the tokens a second that steps really gave.
"""

from __future__ import annotations

from slipstream.drafting.modes import Mode

_PLAIN_BESIDE_S = 2e-4
"""What a step without drafts takes beside its pass, until one was seen."""

_NEWEST_SHARE = 0.1
"""What the newest such time counts for."""

_KEPT = 0.99
"""What older steps still count for with every new one: the last hundred count."""

_STEPS_OF_FAITH = 20.0
"""As many steps that went as expected count from the start."""

_SMALLEST = 0.5


class Reality:
    """Compares tokens and seconds of steps with what was expected; `expect` comes before `came`, or nothing does."""

    def __init__(self) -> None:
        # Expected tokens, real ones, expected seconds, real ones.
        self._sums: dict[Mode, list[float]] = {}
        self._expected: tuple[float, float] | None = None
        # By mode and number of requests, to a factor of two.
        self._beside_s: dict[tuple[Mode, int], float] = {}

    def drafting_s(self, mode: Mode, num_requests: int) -> float:
        """What drafting in a mode adds to a step beside its pass."""
        spent_s = self._beside_s.get((mode, num_requests.bit_length()), 0.0)
        return max(spent_s - self._plain_s(num_requests), 0.0)

    def begin(self) -> None:
        """A step begins of which nothing is expected yet."""
        self._expected = None

    def expect(self, num_requests: int, *, num_tokens: float, seconds: float) -> None:
        """What this step should give, and take for its pass and for drafting."""
        self._expected = num_tokens, seconds + self._plain_s(num_requests)

    def came(self, mode: Mode, num_requests: int, *, num_tokens: int, seconds: float, beside_s: float) -> None:
        """What it gave, and took: in all, and beside its pass.

        A step that the machine interrupted counts as one of twice the time expected.
        """
        key = mode, num_requests.bit_length()
        self._beside_s[key] = (1 - _NEWEST_SHARE) * self._beside_s.get(key, beside_s) + _NEWEST_SHARE * beside_s
        if self._expected is None:
            return
        expected_tokens, expected_s = self._expected
        faith = [_STEPS_OF_FAITH * number for number in (expected_tokens, expected_tokens, expected_s, expected_s)]
        sums = self._sums.setdefault(mode, faith)
        newest = (expected_tokens, float(num_tokens), expected_s, min(seconds, 2 * expected_s))
        for place, number in enumerate(newest):
            sums[place] = _KEPT * sums[place] + number

    def ratio(self, mode: Mode) -> float:
        """Tokens a second that steps of this mode gave over those expected, at most 1; 1 without any.

        Steps that went better than expected are no credit: a faster machine would have sped up plain ones as well.
        """
        if mode not in self._sums:
            return 1.0
        expected_tokens, num_tokens, expected_s, seconds = self._sums[mode]
        return min(max(num_tokens / expected_tokens * expected_s / seconds, _SMALLEST), 1.0)

    def _plain_s(self, num_requests: int) -> float:
        return self._beside_s.get((Mode.OFF, num_requests.bit_length()), _PLAIN_BESIDE_S)
