"""How good a draft is: acceptance rate, acceptance length, acceptance per position.

Definitions are vLLM's: `acceptance_rate` = accepted draft tokens / proposed draft tokens; `acceptance_length` =
1 + accepted / verification passes (the bonus token counts).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from slipstream.records import Round


class AcceptanceCounts(msgspec.Struct, frozen=True):
    """Sums over verification passes; `accepted_per_position[i]` counts passes whose draft token i was accepted."""

    num_passes: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    accepted_per_position: tuple[int, ...] = ()


def count(rounds: Iterable[Round]) -> AcceptanceCounts:
    """The counts of these passes; a pass that proposed nothing still counts as a pass."""
    num_passes = num_proposed = num_accepted = 0
    per_position: list[int] = []
    for one in rounds:
        num_passes += 1
        num_proposed += len(one.proposed)
        num_accepted += one.num_accepted
        per_position.extend([0] * (one.num_accepted - len(per_position)))
        for position in range(one.num_accepted):
            per_position[position] += 1
    return AcceptanceCounts(num_passes, num_proposed, num_accepted, tuple(per_position))


def acceptance_rate(counts: AcceptanceCounts) -> float:
    """Accepted / proposed draft tokens; 0 when nothing was proposed."""
    return counts.num_accepted / counts.num_proposed if counts.num_proposed else 0.0


def acceptance_length(counts: AcceptanceCounts) -> float:
    """Mean tokens per verification pass, the bonus token included; 1 when nothing was accepted."""
    return 1.0 + (counts.num_accepted / counts.num_passes if counts.num_passes else 0.0)
