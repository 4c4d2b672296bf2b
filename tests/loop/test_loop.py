"""One turn of the loop in memory: the first test a newcomer runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slipstream.acceptance import acceptance_length, acceptance_rate
from slipstream.loop import questions, turn

TARGET = Path(__file__).parents[2] / "deploy" / "models" / "mix-moe-11m"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_one_turn_of_the_loop_makes_the_next_answers_cheaper(tmp_path: Path) -> None:
    result = turn(TARGET, questions(72, seed=0), tmp_path)
    assert acceptance_length(result.before) == 1.0
    assert result.decision.verdict == "promote"
    assert result.pointer is not None
    assert (result.pointer.version, result.pointer.generation) == (1, 1)
    assert acceptance_rate(result.after) > 0.3
    assert acceptance_length(result.after) > 1.8
