"""Where arrays lie, as the compiled kernels are told."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream_kernels.address import address_of


@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.uint16, np.dtype([("a", "<i8"), ("b", "<f8")])])
def test_an_address_is_that_of_the_first_number(dtype: np.dtype[np.generic]) -> None:
    array = np.zeros((4, 6), dtype)
    assert address_of(array) == array.ctypes.data
    assert address_of(array[2:]) == array.ctypes.data + 12 * array.itemsize


def test_read_only_arrays_have_addresses_and_empty_ones_none() -> None:
    array = np.arange(3)
    array.flags.writeable = False
    assert address_of(array) == array.ctypes.data
    assert address_of(np.zeros((0, 5))) == 0


def test_an_array_with_gaps_is_refused() -> None:
    with pytest.raises(TypeError, match="contiguous"):
        address_of(np.zeros((4, 4))[:, ::2])
