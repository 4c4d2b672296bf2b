"""The ways of running experts in shapes that no data decides."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from slipstream.engine.products import StackedExperts, every, gathered, grouped, run_experts


@pytest.mark.parametrize("num_rows", [1, 2, 3, 64, 65, 130])
def test_every_way_of_running_experts_gives_the_same(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    experts = StackedExperts(
        torch.randn(6, 2 * 24, 16, generator=generator), torch.randn(6, 16, 24, generator=generator)
    )
    x_TD = torch.randn(num_rows, 16, generator=generator)
    ids_TK = torch.rand(num_rows, 6, generator=generator).argsort(dim=-1)[:, :3]
    expected = torch.stack(
        [torch.stack([mlp(experts, int(e), x_TD[row]) for e in ids_TK[row]]) for row in range(num_rows)]
    )
    for way in (grouped, gathered, every, run_experts):
        torch.testing.assert_close(way(experts, x_TD, ids_TK), expected, atol=1e-3, rtol=1e-4)


def mlp(experts: StackedExperts, expert: int, x_D: torch.Tensor) -> torch.Tensor:
    gate, up = (experts.gate_up[expert] @ x_D).chunk(2)
    return experts.down[expert] @ (functional.silu(gate) * up)


def test_experts_without_a_row_are_no_special_case() -> None:
    experts = StackedExperts(torch.ones(8, 32, 16), torch.ones(8, 16, 16))
    ids_TK = torch.tensor([[7, 2], [2, 7]])
    for way in (grouped, gathered, every):
        assert way(experts, torch.ones(2, 16), ids_TK).shape == (2, 2, 16)
