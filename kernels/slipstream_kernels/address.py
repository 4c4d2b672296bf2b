"""Where the numbers of an array lie, for the compiled kernels."""

from __future__ import annotations

import ctypes
from typing import Any

from numpy.typing import NDArray


def address_of(array: NDArray[Any]) -> int:
    """Of a C-contiguous array that outlives the call it is passed to, else TypeError; 0 for an empty one.

    Takes a quarter of the time of `array.ctypes.data`, which dozens of arrays in every step would wait for.
    """
    if not array.size:
        return 0
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    except TypeError:
        if not array.flags.c_contiguous:
            raise
        return array.ctypes.data  # it is read-only
