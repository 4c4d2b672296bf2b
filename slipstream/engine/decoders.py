"""Which decoder runs a checkpoint: own kernels on CPU, torch on CUDA and where no kernels can be built."""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import torch

import slipstream_kernels
from slipstream.engine.native_decoder import NativeDecoder
from slipstream.engine.plan import PagedDecoder
from slipstream.engine.torch_decoder import TorchDecoder
from slipstream.errors import ConfigError
from slipstream.models.checkpoint import Checkpoint
from slipstream.models.decoder import arrange

_log = logging.getLogger(__name__)


class OpenDecoder(Protocol):
    """`open_decoder`, or what stands in for it."""

    def __call__(
        self, checkpoint: Checkpoint, *, num_blocks: int, num_node_slots: int, max_rows: int, device: str = "cpu"
    ) -> PagedDecoder:
        """A decoder of this checkpoint with a cache of these sizes."""


def open_decoder(
    checkpoint: Checkpoint,
    *,
    num_blocks: int,
    num_node_slots: int,
    max_rows: int,
    device: str = "cpu",
    packs_int8: bool = False,
) -> PagedDecoder:
    """A decoder of `checkpoint` with `num_blocks` blocks of cache and room for `num_node_slots` nodes of trees.

    A pass has at most `max_rows` rows. On `device` "cpu", weights run as stored (fp16 as fp32) in our own kernels, or
    in fp32 by torch where those cannot be built, which is logged once. On "cuda" or "cuda:N", weights and cache are
    bf16. `packs_int8` multiplies integers in our own kernels, matrices rounded to int8 and rows to 64ths of their
    largest, and keeps keys and values in bf16: for drafts, of which nobody needs exact logits. Raises ConfigError for
    another device or one that is not there.
    """
    check_device(device)
    if device == "cpu" and slipstream_kernels.is_available():
        weights = arrange(checkpoint.config, checkpoint.weights, dtype=None)
        return NativeDecoder(
            weights,
            num_blocks=num_blocks,
            num_node_slots=num_node_slots,
            max_rows=max_rows,
            packs_int8=packs_int8,
        )
    if device == "cpu":
        _warn_of_torch(slipstream_kernels.why_unavailable())
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return TorchDecoder(
        arrange(checkpoint.config, checkpoint.weights, dtype=None),
        num_blocks=num_blocks,
        num_node_slots=num_node_slots,
        max_rows=max_rows,
        device=device,
        dtype=dtype,
    )


def check_device(device: str) -> None:
    """Raise ConfigError unless `device` is "cpu", or a CUDA device that torch can use here."""
    if device == "cpu":
        return
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ConfigError(f"device is {device!r}, expected 'cpu', 'cuda' or 'cuda:N'")
    if int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {device!r}, this machine has {torch.cuda.device_count()} CUDA devices that torch can use; "
            "set serving.device to 'cpu', or install a torch build with CUDA and the driver"
        )


@functools.cache
def _warn_of_torch(reason: str) -> None:
    """Once per process: a replica opens decoders at every swap."""
    _log.warning(
        "no CPU kernels (%s): decoding with torch, several times slower, and tokens may differ between batches and "
        "with speculation where two are almost equally likely; install g++ or clang++ and start again",
        reason,
    )
