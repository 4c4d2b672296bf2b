"""The compiled kernels, in every instruction set that this processor has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import slipstream_kernels


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    """Skips where no kernels can be built (CI must have a compiler); leaves one thread and the best set."""
    if not slipstream_kernels.is_available():
        if os.environ.get("CI") == "true":
            pytest.fail(slipstream_kernels.why_unavailable())
        pytest.skip(slipstream_kernels.why_unavailable())
    yield
    slipstream_kernels.set_num_threads(1)
    slipstream_kernels.use_instruction_set(None)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set in turn."""
    name: str = request.param
    if name not in slipstream_kernels.supported_sets():
        pytest.skip(f"this processor has no {name}")
    slipstream_kernels.use_instruction_set(name)
    return name
