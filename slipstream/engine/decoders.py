"""Which decoder runs a checkpoint: own kernels on CPU, torch on CUDA and where no kernels can be built."""

from __future__ import annotations

import logging

import torch

from slipstream.engine.plan import PagedDecoder
from slipstream.engine.torch_decoder import TorchDecoder
from slipstream.models.checkpoint import Checkpoint
from slipstream.models.decoder import arrange

_log = logging.getLogger(__name__)


def open_decoder(
    checkpoint: Checkpoint, *, num_blocks: int, num_node_slots: int, max_rows: int, device: str = "cpu"
) -> PagedDecoder:
    """A decoder of `checkpoint` with `num_blocks` blocks of cache and room for `num_node_slots` nodes of trees.

    `device` is "cpu", or a CUDA device ("cuda", "cuda:1"), where weights and cache are bf16. A pass has at most
    `max_rows` rows. ConfigError for a CUDA device on a machine without one.
    """
    return TorchDecoder(
        arrange(checkpoint.config, checkpoint.weights),
        num_blocks=num_blocks,
        num_node_slots=num_node_slots,
        max_rows=max_rows,
        device=device,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
    )
