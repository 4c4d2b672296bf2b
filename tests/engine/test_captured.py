"""Which shapes a step is padded to, and when one is captured and replayed."""

from __future__ import annotations

from typing import Any

import torch

from slipstream.engine.captured import MOST_GRAPHS, CapturedSteps, is_decode_shaped
from slipstream.engine.tiling import LARGE, StepShape, bucket, lay_out, padded
from tests.plans import Rows, plan_of

SMALL_SHAPE = StepShape(4, 4, 1, 16, 0, 4)


def test_sizes_are_padded_to_few_shapes() -> None:
    assert [bucket(size) for size in (0, 1, 2, 3, 5, 33, 64, 65, 128, 129)] == [1, 1, 2, 4, 8, 64, 64, 128, 128, 192]
    assert bucket(10 * LARGE) == 10 * LARGE
    smallest = padded(StepShape(1, 1, 1, 1, 0, 1))
    assert smallest == (1, 1, 1, 16, 0, 1)
    assert padded(StepShape(5, 3, 4, 17, 3, 5)) == (8, 4, 4, 32, 16, 8)


def test_a_longer_context_and_another_tree_keep_the_shape() -> None:
    """What a captured graph is keyed by must not change from step to step."""
    chain = Rows(token_ids=(1,) * 20, blocks=(0, 1), start=19, nodes=(1, 2, 3), parents=(-1, 0, 1))
    star = Rows(token_ids=(1,) * 150, blocks=tuple(range(10)), start=149, nodes=(1, 2, 3), parents=(-1, -1, -1))
    assert lay_out(plan_of([chain]), is_padded=True).shape == lay_out(plan_of([star]), is_padded=True).shape


def test_a_shape_is_captured_when_it_comes_again_and_replayed_from_its_own_buffer() -> None:
    """A graph reads where its inputs stood at capture: the buffer stays, its content is written in place."""
    buffers: list[torch.Tensor] = []
    num_computed = 0

    def compute(buffer: torch.Tensor, _: StepShape) -> tuple[torch.Tensor, None]:
        nonlocal num_computed
        num_computed += 1
        return buffer * 2.0, None

    class Recorded:
        """What stands for a graph where there is no CUDA: the same work on the same memory."""

        def __init__(self, buffer: torch.Tensor) -> None:
            self.buffer, self.outputs = buffer, (torch.zeros(3), None)

        def replay(self) -> None:
            self.outputs[0].copy_(self.buffer * 2.0)

    def capture(_: Any, buffer: torch.Tensor, shape: StepShape) -> Recorded:
        buffers.append(buffer)
        return Recorded(buffer)

    steps = CapturedSteps(compute, torch.device("cpu"), capture=capture)
    seen = [steps.run(torch.full((3,), value), SMALL_SHAPE)[0].clone() for value in (1, 2, 3, 4)]
    assert torch.equal(torch.stack(seen)[:, 0], torch.tensor([2.0, 4.0, 6.0, 8.0]))
    assert (num_computed, len(buffers), len(steps)) == (1, 1, 1)


def test_a_prefill_is_never_captured() -> None:
    assert is_decode_shaped(SMALL_SHAPE)
    assert is_decode_shaped(SMALL_SHAPE._replace(num_rows=32))
    assert not is_decode_shaped(SMALL_SHAPE._replace(num_rows=64))
    assert not is_decode_shaped(SMALL_SHAPE._replace(num_rows=320, num_logits=320))


def test_the_number_of_graphs_is_bounded() -> None:
    class Empty:
        outputs = (torch.zeros(1), None)

        def replay(self) -> None:
            pass

    steps = CapturedSteps(lambda *_: Empty.outputs, torch.device("cpu"), capture=lambda *_: Empty())
    for _ in range(2):
        for num_blocks in range(MOST_GRAPHS + 5):
            steps.run(torch.zeros(1), SMALL_SHAPE._replace(num_blocks=num_blocks))
    assert len(steps) == MOST_GRAPHS
