"""Which instruction set runs, with how many threads, and the functions of the compiled kernels by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from slipstream_kernels.build import KernelsUnavailable, instruction_sets, library

_chosen: str | None = None


@functools.cache
def why_unavailable() -> str:
    """Why the compiled kernels cannot be used here; empty if they can."""
    try:
        library()
    except KernelsUnavailable as error:
        return str(error)
    return ""


def is_available() -> bool:
    """Whether the compiled kernels can be used; the first call may compile them (some seconds)."""
    return not why_unavailable()


@functools.cache
def supported_sets() -> tuple[str, ...]:
    """The instruction sets this processor has, best first."""
    return tuple(isa for isa in instruction_sets() if library().slipstream_supports(isa.encode()))


def instruction_set() -> str:
    """The set that runs: the best one, unless `use_instruction_set` chose another."""
    return _chosen or supported_sets()[0]


def use_instruction_set(isa: str | None) -> None:
    """Run this set from now on, None for the best; what was packed for another keeps its own. Raises ValueError."""
    global _chosen
    if isa is not None and isa not in supported_sets():
        raise ValueError(f"instruction set is {isa!r}, this processor has {', '.join(supported_sets())}")
    _chosen = isa


def set_num_threads(number: int) -> None:
    """Share every pass among this many threads of the process, the caller included; results do not change."""
    if number < 1:
        raise ValueError(f"number of threads is {number}, expected at least 1")
    library().slipstream_set_num_threads(number)


def function(name: str, isa: str | None = None) -> Any:
    """The compiled function of this name for `isa` (default: the set that runs), a ctypes foreign function."""
    return library()[f"slipstream_{name}_{isa or instruction_set()}"]


Signatures = Mapping[str, tuple[Any, tuple[Any, ...]]]
"""By name: the ctypes type of the result, and those of the arguments."""


def typed(signatures: Signatures) -> Callable[[str, str], Callable[..., Any]]:
    """How to find compiled functions of these signatures by name and instruction set; each is looked up once."""

    @functools.cache
    def compiled(name: str, isa: str) -> Callable[..., Any]:
        found = function(name, isa)
        found.restype, found.argtypes = signatures[name]
        return found  # type: ignore[no-any-return]

    return compiled
