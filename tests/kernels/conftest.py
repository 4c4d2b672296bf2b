"""The compiled kernels, in every instruction set that this processor has."""

from __future__ import annotations

import pytest

import slipstream_kernels
from slipstream_kernels.build import INSTRUCTION_SETS


@pytest.fixture(autouse=True)
def _kernels(compiled_kernels: None) -> None:
    pass


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set in turn."""
    name: str = request.param
    if name not in slipstream_kernels.supported_sets():
        pytest.skip(f"this processor has no {name}")
    slipstream_kernels.use_instruction_set(name)
    return name
