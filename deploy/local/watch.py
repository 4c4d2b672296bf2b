"""What the demo sees of the running service: its counters, and the pointer beside the acknowledgements."""

from __future__ import annotations

import time

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from slipstream.acceptance import AcceptanceCounts
from slipstream.errors import StoreError
from slipstream.stores.protocols import PointerStore
from slipstream.versions import DEFAULT_DOMAIN

_PASSES = "slipstream_verification_passes_total"
_PROPOSED = "slipstream_draft_tokens_total"
_ACCEPTED = "slipstream_accepted_tokens_total"


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """The service's own counters at one moment, `at` in seconds of time.monotonic()."""

    at: float
    counts: dict[str, AcceptanceCounts]
    num_swaps: int
    num_refusals: int
    draft_version: int


class Swap(msgspec.Struct, frozen=True, kw_only=True):
    """A pointer generation that a replica acknowledged, first seen `at`."""

    at: float
    generation: int
    version: int


def read_metrics(text: str, *, at: float) -> Reading:
    """The reading in a page of `/metrics`."""
    sums: dict[str, dict[str, float]] = {_PASSES: {}, _PROPOSED: {}, _ACCEPTED: {}}
    swaps = refusals = 0.0
    version = 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name][sample.labels["domain"]] = sample.value
            elif sample.name == "slipstream_swaps_total":
                swaps += sample.value
            elif sample.name == "slipstream_swap_refusals_total":
                refusals += sample.value
            elif sample.name == "slipstream_draft_info" and sample.value == 1:
                version = int(sample.labels["version"])
    counts = {domain: _counts(sums, domain) for domain in sums[_PASSES]}
    return Reading(at=at, counts=counts, num_swaps=int(swaps), num_refusals=int(refusals), draft_version=version)


def _counts(sums: dict[str, dict[str, float]], domain: str) -> AcceptanceCounts:
    passes, proposed, accepted = (int(sums[name].get(domain, 0)) for name in (_PASSES, _PROPOSED, _ACCEPTED))
    return AcceptanceCounts(num_passes=passes, num_proposed=proposed, num_accepted=accepted)


def between(earlier: Reading, later: Reading, domain: str) -> AcceptanceCounts:
    """What one domain counted between two readings; zeros if the service restarted in between."""
    start, end = (reading.counts.get(domain, AcceptanceCounts()) for reading in (earlier, later))
    return AcceptanceCounts(
        num_passes=max(0, end.num_passes - start.num_passes),
        num_proposed=max(0, end.num_proposed - start.num_proposed),
        num_accepted=max(0, end.num_accepted - start.num_accepted),
    )


class Watch:
    """Readings and swaps in the order in which they were seen. `look` is called about once a second."""

    def __init__(self, http: httpx.Client, pointers: PointerStore) -> None:
        self.readings: list[Reading] = []
        self.swaps: list[Swap] = []
        self._http = http
        self._pointers = pointers

    def look(self) -> None:
        """Append a reading, and the swap that a replica acknowledged since the last look; skips what is down."""
        try:
            page = self._http.get("/metrics").raise_for_status().text
            self.readings.append(read_metrics(page, at=time.monotonic()))
        except httpx.HTTPError:
            return
        try:
            acknowledged = self._pointers.acknowledgements("draft", DEFAULT_DOMAIN)
        except StoreError:
            return
        serving = [one for one in acknowledged if one.state == "serving" and one.version]
        newest = max(serving, key=lambda one: one.generation, default=None)
        if newest is not None and newest.generation > self.generation():
            self.swaps.append(Swap(at=time.monotonic(), generation=newest.generation, version=newest.version))

    def generation(self) -> int:
        """The highest generation that a replica acknowledged with a draft, 0 before the first."""
        return self.swaps[-1].generation if self.swaps else 0

    def since(self, at: float) -> list[Reading]:
        """The readings from a moment on, and the last one before it."""
        first = sum(reading.at < at for reading in self.readings)
        return self.readings[max(0, first - 1) :]
