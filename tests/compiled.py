"""The compiled kernels, for tests that need them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import slipstream_kernels


@pytest.fixture
def compiled_kernels() -> Iterator[None]:
    """Skips where no kernels can be built (CI must have a compiler); leaves one thread and the best set."""
    if not slipstream_kernels.is_available():
        if os.environ.get("CI") == "true":
            pytest.fail(slipstream_kernels.why_unavailable())
        pytest.skip(slipstream_kernels.why_unavailable())
    yield
    slipstream_kernels.set_num_threads(1)
    slipstream_kernels.use_instruction_set(None)
