"""Stop strings: which emitted token completes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

TokenBytes = Callable[[int], bytes]
"""The bytes that a token stands for; b"" for a control token."""


class StopStrings:
    """Watches one request's output for its stop strings, byte by byte: a match may straddle tokens and blocks."""

    def __init__(self, stop_strings: Sequence[str], token_bytes: TokenBytes) -> None:
        self._stops = [stop.encode() for stop in stop_strings]
        self._num_kept_bytes = max(len(stop) for stop in self._stops) - 1
        self._token_bytes = token_bytes
        self._tail = b""

    def completed_by(self, token: int) -> bool:
        """Whether a stop string ends in this token, the next one of the output."""
        window = self._tail + self._token_bytes(token)
        # Not window[-n:], which is everything at n = 0.
        self._tail = window[max(len(window) - self._num_kept_bytes, 0) :]
        return any(stop in window for stop in self._stops)
