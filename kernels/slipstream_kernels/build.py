"""Compiling `csrc` on first use, and the library that comes out.

Every source but those of BASELINE is compiled once per instruction set, with SLIPSTREAM_ISA naming its namespace, and
exports its functions as `slipstream_<name>_<set>`; which set runs is chosen when a function is looked up. The library
is kept under SLIPSTREAM_KERNEL_CACHE (default: the user's cache directory) by a digest of sources, compiler, flags and
this file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).parent / "csrc"
BASELINE = ("cpu.cpp", "memory.cpp", "pool.cpp")
"""Sources that are compiled once, for any processor of the machine's kind."""

# Contraction stays off: a fused multiply-add happens where it is written, so that results do not hang on a compiler's
# choices; -fno-math-errno lets square roots be one instruction.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
_AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
_ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512": _AVX512_FLAGS,
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}
INSTRUCTION_SETS = tuple(_ISA_FLAGS)
"""All that x86 processors may have, best first; each holds those after it."""

_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_TIMEOUT_S = 300


class KernelsUnavailable(RuntimeError):
    """The kernels cannot be built here; the message says why and what to do."""


def instruction_sets() -> tuple[str, ...]:
    """The sets that sources are compiled for on this kind of machine, best first; raises KernelsUnavailable.

    Older compilers and assemblers do not know the newest one.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("baseline",)
    return _known_sets(_compiler())


_NEWEST_INSTRUCTIONS = 'void f() { __asm__("ldtilecfg 0(%rsp); tdpbf16ps %tmm0, %tmm1, %tmm2"); }'
"""What an assembler must know for the best set: it may be older than its compiler."""


@functools.cache
def _known_sets(compiler: str) -> tuple[str, ...]:
    """The sets that compiler and assembler know: the best of them, and those that it holds."""
    for place, isa in enumerate(INSTRUCTION_SETS):
        check = [compiler, *_ISA_FLAGS[isa], "-x", "c++", "-c", "-o", os.devnull, "-"]
        text = _NEWEST_INSTRUCTIONS if isa == INSTRUCTION_SETS[0] else ""
        try:
            _run(check, source=text)
        except KernelsUnavailable:
            continue
        return INSTRUCTION_SETS[place:]
    return INSTRUCTION_SETS[-1:]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; builds them if no cached build fits. Raises KernelsUnavailable, again at every call."""
    try:
        return ctypes.CDLL(str(build(CSRC)))
    except OSError as error:
        raise KernelsUnavailable(f"the built kernels cannot be loaded: {error}") from error


def build(sources: Path, *, cache: Path | None = None) -> Path:
    """The shared library of the sources in a directory, compiled unless the cache holds it.

    Raises KernelsUnavailable without a compiler that works, or without a place to write to.
    """
    compiler = _compiler()
    name = f"slipstream-{_digest(sources, compiler)}{'.dylib' if sys.platform == 'darwin' else '.so'}"
    directory = cache or _cache_directory()
    finished = directory / name
    if finished.exists():
        return finished
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            built = _compile(sources, compiler, Path(scratch))
            # Processes may build at the same time: each moves a whole file into place, and any of them will do.
            built.replace(finished)
    except OSError as error:
        raise KernelsUnavailable(
            f"cannot write to {directory}: {error.strerror}; set SLIPSTREAM_KERNEL_CACHE to a directory that can"
        ) from error
    return finished


def _compiler() -> str:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else _COMPILERS
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise KernelsUnavailable(
            f"no C++ compiler among {', '.join(names)}; install g++ or clang++, or set CXX, and start again"
        )
    return found


def _cache_directory() -> Path:
    named = os.environ.get("SLIPSTREAM_KERNEL_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slipstream"


def _digest(sources: Path, compiler: str) -> str:
    digest = hashlib.sha256()
    for path in (Path(__file__), *sorted(sources.iterdir())):
        digest.update(path.name.encode() + path.read_bytes())
    version = _run([compiler, "--version"]).splitlines()[:1]
    flags = {isa: _ISA_FLAGS[isa] for isa in instruction_sets()}
    digest.update(repr((version, _FLAGS, flags, platform.machine())).encode())
    return digest.hexdigest()[:16]


def _compile(sources: Path, compiler: str, scratch: Path) -> Path:
    """Compile what `_units` lists, as many at a time as there are processors, and link it."""
    units = _units(sources)
    objects = [scratch / f"{source.stem}-{isa}.o" for source, isa in units]
    num_parallel = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    for first in range(0, len(units), num_parallel):
        running = [
            subprocess.Popen(
                [compiler, *_FLAGS, *_ISA_FLAGS[isa], f"-DSLIPSTREAM_ISA={isa}", "-c", str(source), "-o", str(target)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for (source, isa), target in zip(units[first:][:num_parallel], objects[first:][:num_parallel], strict=True)
        ]
        for process in running:
            _, errors = process.communicate(timeout=_COMPILE_TIMEOUT_S)
            if process.returncode:
                raise KernelsUnavailable(f"{compiler} fails on the kernels: {errors.strip()[:2000]}")
    built = scratch / "library"
    _run([compiler, "-shared", "-fPIC", *map(str, objects), "-pthread", "-o", str(built)])
    return built


def _units(sources: Path) -> list[tuple[Path, str]]:
    """(source, instruction set) pairs to compile and to link in this order: the least set first, the best one last.

    Inline functions outside SLIPSTREAM_ISA (those of pool.h and memory.h, instantiations of the standard library) have
    one name in all sets. A linker keeps the first one it meets, so every set gets one that runs wherever the set itself
    runs.
    """
    found = sorted(sources.glob("*.cpp"))
    once = [(source, "baseline") for source in found if source.name in BASELINE]
    return once + [
        (source, isa) for isa in reversed(instruction_sets()) for source in found if source.name not in BASELINE
    ]


def _run(command: Sequence[str], *, source: str = "") -> str:
    try:
        done = subprocess.run(
            command, input=source, capture_output=True, text=True, check=False, timeout=_COMPILE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"{command[0]} cannot run: {error}") from error
    if done.returncode:
        raise KernelsUnavailable(f"{' '.join(command)[:200]} fails: {done.stderr.strip()[:2000]}")
    return done.stdout
