"""What holds of the built library whatever its functions compute."""

from __future__ import annotations

import ctypes
from pathlib import Path

from slipstream_kernels.build import CSRC, build, instruction_sets

SHARED_FUNCTION = """
#include "export.h"

// Like an instantiation of the standard library: every instruction set has one of the same name.
template <class Number>
Number compiled_for(Number) {
#if defined(__AVX512F__)
    return 512;
#elif defined(__AVX2__)
    return 256;
#else
    return 0;
#endif
}

extern "C" int SLIPSTREAM_EXPORT(compiled_for)() noexcept {
    int (*volatile function)(int) = compiled_for<int>;  // a compiler that saw which one would not call it
    return function(0);
}
"""


def test_a_function_that_all_instruction_sets_share_runs_on_the_least_of_them(tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "export.h").write_text((CSRC / "export.h").read_text())
    (sources / "shared.cpp").write_text(SHARED_FUNCTION)
    library = ctypes.CDLL(str(build(sources, cache=tmp_path)))
    bits = [library[f"slipstream_compiled_for_{isa}"]() for isa in instruction_sets()]
    assert bits == [0] * len(bits)
