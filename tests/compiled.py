"""The compiled kernels, for tests that need them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import slipstream_kernels


@pytest.fixture(scope="session")
def exact_kernels() -> None:
    """Bitwise equality is promised by our own kernels alone: skip where they cannot be built, but never in CI."""
    if not slipstream_kernels.is_available():
        reason = f"needs the compiled kernels: {slipstream_kernels.why_unavailable()}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def compiled_kernels(exact_kernels: None) -> Iterator[None]:
    """The same, for tests that choose threads or an instruction set: leaves one thread and the best set."""
    yield
    slipstream_kernels.set_num_threads(1)
    slipstream_kernels.use_instruction_set(None)
