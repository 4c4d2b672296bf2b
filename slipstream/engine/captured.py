"""CUDA graphs of steps, one for each padded shape, captured when a shape comes a second time.

The first pass of a shape runs kernel by kernel, which also warms up the libraries that a capture must find ready. All
graphs share one memory pool: the outputs of a pass are valid until the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from slipstream.engine.tiling import StepShape

MOST_GRAPHS = 64
"""Graphs of one decoder: each holds its inputs, its outputs, and a few kilobytes per kernel."""

MOST_CAPTURED_ROWS = 256
"""Larger steps keep the device busy for longer than the host needs to launch them."""

MOST_ROWS_PER_LOGIT = 8
"""A step that wants fewer logits is a prefill, whose shape seldom comes back."""

Outputs = tuple[Tensor, Tensor | None]
Compute = Callable[[Tensor, StepShape], Outputs]
"""(int32 buffer of a step on the device, its shape) -> logits, expert ids."""


class Capture(Protocol):
    """A computation that `replay` repeats: it reads the buffer it was captured with, and overwrites `outputs`."""

    @property
    def outputs(self) -> Outputs:
        """What the last replay computed."""

    def replay(self) -> None:
        """Compute again from what the buffer holds now."""


class GraphCapture:
    """A CUDA graph of one step; kernels are recorded at construction and run at `replay`.

    `pool` is the handle of the memory pool that its graphs share.
    """

    def __init__(self, compute: Compute, buffer: Tensor, shape: StepShape, *, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may load a draft meanwhile: what it allocates must not end the capture.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs: Outputs = compute(buffer, shape)

    def replay(self) -> None:
        """Queue the recorded kernels on the current stream."""
        self._graph.replay()


class CapturedSteps:
    """Runs steps on a device, by replay where their shape was seen before.

    `capture` is how a step is recorded; None means CUDA graphs in one memory pool.
    """

    def __init__(
        self,
        compute: Compute,
        device: torch.device,
        *,
        capture: Callable[[Compute, Tensor, StepShape], Capture] | None = None,
    ) -> None:
        self._compute = compute
        self._device = device
        self._capture = capture or partial(GraphCapture, pool=torch.cuda.graph_pool_handle())
        self._captures: dict[StepShape, tuple[Tensor, Capture]] = {}
        self._seen: set[StepShape] = set()

    def __len__(self) -> int:
        """Shapes captured so far."""
        return len(self._captures)

    def run(self, host: Tensor, shape: StepShape) -> Outputs:
        """The outputs of the step in the pinned buffer `host`; the next call may overwrite them."""
        if shape in self._seen and shape not in self._captures and len(self) < MOST_GRAPHS:
            # What a graph reads must stay where it was at capture: its inputs are written in place from now on.
            buffer = torch.zeros_like(host, device=self._device)
            self._captures[shape] = buffer, self._capture(self._compute, buffer, shape)
        if shape not in self._captures:
            if is_decode_shaped(shape):
                self._seen.add(shape)
            return self._compute(host.to(self._device, non_blocking=True), shape)
        buffer, captured = self._captures[shape]
        buffer.copy_(host, non_blocking=True)
        captured.replay()
        return captured.outputs


def is_decode_shaped(shape: StepShape) -> bool:
    """Whether a step of this shape is worth a graph: few rows, most of which end in logits."""
    return shape.num_rows <= min(MOST_CAPTURED_ROWS, MOST_ROWS_PER_LOGIT * shape.num_logits)
