"""What this machine could do at best with the instruction set that runs: reading memory, and multiply-adds.

These are the two sides of the roofline that the kernels' times are put beside. The work is compiled with the kernels.
"""

from __future__ import annotations

import ctypes

import numpy as np

from slipstream_kernels.isa import function

_LEAST_BYTES_READ = 1 << 28
"""A measurement reads at least this much: some milliseconds, against a few microseconds to start the threads."""

_ROUNDS = 500_000

_TRIALS = 5
"""The best of these counts: what the machine can do is not less because something else ran for a moment."""


def read_gbps(num_bytes: int, *, num_threads: int) -> float:
    """Gigabytes (10^9) a second that `num_threads` threads read from a buffer of `num_bytes`, pass after pass.

    Each thread reads its own part in order; a buffer smaller than a cache is read from that cache.
    """
    buffer = np.ones(max(num_bytes // 4, 1), dtype=np.float32)
    num_passes = max(3, _LEAST_BYTES_READ // buffer.nbytes)
    read_seconds = function("read_seconds")
    read_seconds.restype = ctypes.c_double
    read_seconds.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32)
    read_seconds(buffer.ctypes.data, buffer.nbytes, num_threads, 1)
    seconds = min(read_seconds(buffer.ctypes.data, buffer.nbytes, num_threads, num_passes) for _ in range(_TRIALS))
    return float(num_passes * buffer.nbytes / seconds / 1e9)


def multiply_adds_per_s(*, num_threads: int) -> float:
    """Multiply-adds of fp32 rows with bf16 weights a second that `num_threads` threads do, without reading memory."""
    multiply_add_seconds = function("multiply_add_seconds")
    multiply_add_seconds.restype = ctypes.c_double
    multiply_add_seconds.argtypes = (ctypes.c_int32, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))
    number = ctypes.c_int64()
    seconds = min(multiply_add_seconds(num_threads, _ROUNDS, ctypes.byref(number)) for _ in range(_TRIALS))
    return float(number.value / seconds)
