"""What the demo shows: a live table on a terminal, plain lines elsewhere, a picture at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.live import Live
from rich.table import Table

from deploy.local.traffic import Speed
from deploy.local.watch import Reading, Watch, between
from slipstream.acceptance import AcceptanceCounts, acceptance_length, acceptance_rate

PLAIN_EVERY_S = 5.0
WINDOW_S = 8.0
"""The live figures count the last so many seconds."""

ALL_SENT = "all sent"
"""How a stream ends whose queries ran out before it settled or reached its cap."""

_COLUMNS = (
    "stream", "state", "queries", "failed", "draft", "acceptance rate", "acceptance length", "tokens/s with", "without",
    "ratio", "swaps",
)  # fmt: skip


class StreamRow:
    """One stream as it goes; `ended_at` None while it runs."""

    def __init__(self, number: int, domain: str) -> None:
        self.number = number
        self.domain = domain
        self.began_at = 0.0
        self.ended_at: float | None = None
        self.state = "waiting"
        self.ending = ALL_SENT
        self.num_queries = 0
        self.errors: list[str] = []
        self.num_swaps = 0
        self.speed: Speed | None = None
        self.last = AcceptanceCounts()
        self.draft_version = 0

    def update(self, watch: Watch) -> None:
        """Take the figures of the last WINDOW_S seconds of this stream from the readings."""
        if not watch.readings or self.state == "waiting":
            return
        newest = watch.readings[-1]
        readings = watch.since(max(self.began_at, newest.at - WINDOW_S))
        self.last = between(readings[0], newest, self.domain)
        self.draft_version = newest.draft_version
        self.num_swaps = sum(swap.at >= self.began_at for swap in watch.swaps)

    def cells(self) -> tuple[str, ...]:
        """The row of the table; speeds as measured, also when speculation loses."""
        speed = self.speed
        rates = ("", "", "")
        if speed is not None:
            ratio = speed.with_speculation / speed.without_speculation
            rates = (f"{speed.with_speculation:.0f}", f"{speed.without_speculation:.0f}", f"{ratio:.2f}")
        draft = f"v{self.draft_version}" if self.draft_version else "none"
        figures = (f"{acceptance_rate(self.last):.3f}", f"{acceptance_length(self.last):.2f}")
        if not self.last.num_passes:
            figures = ("", "")
        name = f"{self.number} {self.domain}"
        return (
            name, self.state, str(self.num_queries), str(len(self.errors)), draft, *figures, *rates, str(self.num_swaps)
        )  # fmt: skip


class Screen:
    """A live table if standard output is a terminal, else one line every PLAIN_EVERY_S seconds."""

    def __init__(self, rows: Sequence[StreamRow]) -> None:
        self._rows = rows
        self._console = Console(width=None if sys.stdout.isatty() else 140)
        self._live = Live(console=self._console, auto_refresh=False) if sys.stdout.isatty() else None
        self._last_line_at = 0.0

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def refresh(self) -> None:
        """Show the rows as they are."""
        if self._live is not None:
            self._live.update(table(self._rows), refresh=True)
        elif time.monotonic() - self._last_line_at >= PLAIN_EVERY_S:
            self._last_line_at = time.monotonic()
            for row in self._rows:
                if row.state == "running":
                    print("  ".join(f"{name} {cell}" for name, cell in zip(_COLUMNS, row.cells(), strict=True) if cell))
            sys.stdout.flush()

    def say(self, line: str) -> None:
        """One line above the table."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def summary(self) -> None:
        """The whole table, also where there is no terminal."""
        self._console.print(table(self._rows), soft_wrap=True)


def table(rows: Sequence[StreamRow]) -> Table:
    """All streams as a table."""
    shown = Table(title="acceptance: the service's own counters over the last 8 s of the stream")
    for name in _COLUMNS:
        shown.add_column(name, justify="left" if name in ("stream", "state") else "right")
    for row in rows:
        shown.add_row(*row.cells())
    return shown


class Sample(msgspec.Struct, frozen=True):
    """One point of the curve: seconds since the first reading, acceptance rate."""

    at_s: float
    rate: float


def curve(readings: Sequence[Reading], domain: str, *, began_at: float, ended_at: float) -> list[Sample]:
    """Acceptance rate of a domain over a stream, each point over the readings of about WINDOW_S seconds before it."""
    mine = [one for one in readings if began_at <= one.at <= ended_at + 1.0]
    samples = []
    for index, later in enumerate(mine):
        earlier = next((one for one in mine[: index + 1] if later.at - one.at <= WINDOW_S), later)
        counts = between(earlier, later, domain)
        if counts.num_passes:
            samples.append(Sample(later.at - readings[0].at, acceptance_rate(counts)))
    return samples


def draw(path: Path, rows: Sequence[StreamRow], watch: Watch) -> None:
    """A picture of acceptance over time, a dashed line where a replica took over a new draft."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = {domain: f"C{index}" for index, domain in enumerate(dict.fromkeys(row.domain for row in rows))}
    for row in rows:
        if row.ended_at is None or not watch.readings:
            continue
        points = curve(watch.readings, row.domain, began_at=row.began_at, ended_at=row.ended_at)
        label = f"{row.number} {row.domain}"
        axes.plot([one.at_s for one in points], [one.rate for one in points], color=colors[row.domain], label=label)
    for swap in watch.swaps:
        at_s = swap.at - watch.readings[0].at
        axes.axvline(at_s, color="gray", linestyle="--", linewidth=0.8)
        axes.text(at_s, 0.99, f"v{swap.version}", rotation=90, va="top", ha="right", fontsize=7, color="gray",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set(xlabel="seconds", ylabel="acceptance rate (accepted / proposed draft tokens)", ylim=(0, None))
    axes.set_title("Drafts learn from the traffic they serve; dashed: a running replica swapped to that version")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
