"""What the steps of an engine add to its metrics: summed in plain numbers, handed over once a step."""

from __future__ import annotations

from prometheus_client import Counter

from slipstream.drafting.merge import MergedDrafter
from slipstream.drafting.modes import Mode
from slipstream.telemetry import MAX_POSITIONS, DraftingMetrics, ReplicaMetrics


class DomainCounts:
    """One domain's counters; looking them up by label costs more than counting."""

    def __init__(self, metrics: ReplicaMetrics, domain: str) -> None:
        by_domain = (
            metrics.generation_tokens,
            metrics.verification_passes,
            metrics.drafts,
            metrics.proposed_tokens,
            metrics.accepted_tokens,
        )
        self._counters: list[Counter] = [counter.labels(domain) for counter in by_domain]
        self._sums = [0] * len(by_domain)

    def add(self, *, num_tokens: int, num_proposed: int, num_accepted: int) -> None:
        """One pass of one request."""
        sums = self._sums
        sums[0] += num_tokens
        sums[1] += 1
        if num_proposed:
            sums[2] += 1
            sums[3] += num_proposed
            sums[4] += num_accepted

    def hand_over(self) -> None:
        """Give the sums to the metrics and begin again."""
        for counter, number in zip(self._counters, self._sums, strict=True):
            if number:
                counter.inc(number)
        self._sums = [0] * len(self._sums)


class StepCounts:
    """All counts of an engine's steps."""

    def __init__(self, metrics: ReplicaMetrics) -> None:
        self._metrics = metrics
        self._domains: dict[str, DomainCounts] = {}
        self._busy: set[str] = set()
        self._accepted_at = [metrics.accepted_per_position.labels(str(position)) for position in range(MAX_POSITIONS)]
        self._accepted = [0] * MAX_POSITIONS
        self._num_prompt_tokens = 0

    def add(self, domain: str, *, num_tokens: int, num_proposed: int, num_accepted: int) -> None:
        """One pass of one request of this domain."""
        label = domain if domain in self._domains else self._metrics.domain_label(domain)
        if label not in self._domains:
            self._domains[label] = DomainCounts(self._metrics, label)
        self._busy.add(label)
        self._domains[label].add(num_tokens=num_tokens, num_proposed=num_proposed, num_accepted=num_accepted)
        for position in range(min(num_accepted, MAX_POSITIONS)):
            self._accepted[position] += 1

    def add_prompt(self, num_tokens: int) -> None:
        """A request got its first token."""
        self._num_prompt_tokens += num_tokens

    def hand_over(self) -> None:
        """Give everything since the last call to the metrics."""
        for label in self._busy:
            self._domains[label].hand_over()
        self._busy.clear()
        if self._num_prompt_tokens:
            self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
            self._num_prompt_tokens = 0
        for position, number in enumerate(self._accepted):
            if not number:
                break  # who accepts at a position has accepted at all before it
            self._accepted_at[position].inc(number)
            self._accepted[position] = 0


class DraftingCounts:
    """What a budgeted drafter decided, and how well it knew."""

    def __init__(self, metrics: DraftingMetrics) -> None:
        self._metrics = metrics
        self._handed_over: dict[Mode, int] = {}

    def hand_over(self, drafter: MergedDrafter) -> None:
        """Give the metrics what came since the last call."""
        self._metrics.calibration_error.set(drafter.calibration_error())
        economy = drafter.economy
        if economy is None:
            return
        self._metrics.step_time_error.set(economy.step_cost.mean_error_ratio)
        for mode, number in economy.modes.counts.items():
            steps = self._metrics.steps.labels(mode.name.lower())
            steps.inc(number - self._handed_over.get(mode, 0))
            self._handed_over[mode] = number
