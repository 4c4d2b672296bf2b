"""What holds of the built library whatever its functions compute."""

from __future__ import annotations

import ctypes
import platform
import shutil
from pathlib import Path

import pytest
import torch

import slipstream_kernels
from slipstream_kernels import ops
from slipstream_kernels.build import CSRC, INSTRUCTION_SETS, build, instruction_sets

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


def shared_function(tmp_path: Path) -> ctypes.CDLL:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "export.h").write_text((CSRC / "export.h").read_text())
    (sources / "shared.cpp").write_text(SHARED_FUNCTION)
    return ctypes.CDLL(str(build(sources, cache=tmp_path)))


def test_a_function_that_all_instruction_sets_share_runs_on_the_least_of_them(tmp_path: Path) -> None:
    library = shared_function(tmp_path)
    bits = [library[f"slipstream_compiled_for_{isa}"]() for isa in instruction_sets()]
    assert bits == [0] * len(bits)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has several sets")
def test_a_compiler_that_does_not_know_the_best_set_compiles_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "older"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-mamx-tile*) exit 1;; esac\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    assert instruction_sets() == INSTRUCTION_SETS[1:]
    library = shared_function(tmp_path)
    assert hasattr(library, f"slipstream_compiled_for_{INSTRUCTION_SETS[1]}")
    assert not hasattr(library, f"slipstream_compiled_for_{INSTRUCTION_SETS[0]}")


def test_products_of_integers_are_the_same_bits_in_every_instruction_set() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(130, 650, generator=generator), torch.randn(50, 650, generator=generator)
    products = []
    for isa in slipstream_kernels.supported_sets():
        slipstream_kernels.use_instruction_set(isa)
        products.append(ops.matrix_product(x, ops.PackedMatrix(weight, packs_int8=True)))
    assert all(torch.equal(product, products[0]) for product in products)
