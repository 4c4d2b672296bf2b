"""One convention for measured claims: a table and a picture under `results/`, goals, and one line of JSON at the end.

`python -m benchmarks.NAME [--quick]` exits 0 only if every goal is met. `--quick` takes at most 3 minutes and has its
own, smaller goals.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

RESULTS = Path("results")


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that must reach a bound: `at_least`, or `at_most`, whichever is given."""

    figure: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the value is within its bounds."""
        is_low = self.at_least is not None and not self.value >= self.at_least
        is_high = self.at_most is not None and not self.value <= self.at_most
        return not (is_low or is_high)


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of cells under a heading; cells are written as they are. A caption stands above it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def as_text(self) -> str:
        """The caption, and the table in Markdown, columns aligned."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        rule = " | ".join("-" * width for width in widths)
        table = "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])
        return f"{self.caption}\n\n{table}" if self.caption else table


def finish(name: str, *, tables: Sequence[Table], figures: dict[str, float], goals: Sequence[Goal]) -> int:
    """Print and store the tables, judge the goals, end with the line of JSON; returns the exit code."""
    text = "\n\n".join(table.as_text() for table in tables)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(f"# {name}\n\n`{command()}`\n\n{text}\n", encoding="utf-8")
    print(f"\n{text}\n")
    for goal in goals:
        bound = f">= {goal.at_least}" if goal.at_least is not None else f"<= {goal.at_most}"
        print(f"{'met   ' if goal.is_met else 'MISSED'} {goal.figure} = {goal.value:.4g} (goal {bound})")
    is_met = all(goal.is_met for goal in goals)
    summary = {
        "name": name,
        "figures": figures,
        "goals": [msgspec.to_builtins(goal) | {"met": goal.is_met} for goal in goals],
        "met": is_met,
        "command": command(),
        "machine": machine(),
    }
    print(msgspec.json.encode(summary).decode())
    return 0 if is_met else 1


def command() -> str:
    """The command line that makes this claim."""
    module = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0])
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def machine() -> dict[str, str | int]:
    """Processor, cores and versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def progress(line: str) -> None:
    """One line of progress, at once."""
    print(line, flush=True)
