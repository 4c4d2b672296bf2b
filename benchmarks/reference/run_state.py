"""A training run on disk: weights, optimizer moments, step and data position in one safetensors file.

A run that is killed goes on from its last checkpoint and computes what it would have computed: the state and the batch
order are all that the next step depends on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slipstream.errors import CheckpointError
from slipstream.models.checkpoint import expected_shapes
from slipstream.models.config import ModelConfig

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what a run computes; fixed at its first step and stored with it.

    The first `num_all_text_steps` of `num_steps` have the loss on all text, the others on answers. `corpus` is the
    digest of the training tokens. `requested` is what the user asked for, in words: a run is resumed for the same only.
    """

    requested: str
    config: ModelConfig
    corpus: str
    seed: int
    batch_tokens: int
    peak_learning_rate: float
    num_warm_up_steps: int
    num_all_text_steps: int
    num_steps: int


class TrainingState(msgspec.Struct):
    """Where a run stands: `leaves` are the fp32 weights being trained, `taken` the batches drawn from each set."""

    plan: Plan
    leaves: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int
    num_tokens: int
    taken: dict[str, int]


class _Position(msgspec.Struct, frozen=True, kw_only=True):
    plan: Plan
    step: int
    num_tokens: int
    taken: dict[str, int]


def new_state(plan: Plan, weights: Mapping[str, Tensor], *, device: torch.device) -> TrainingState:
    """The state before the first step; `weights` are copied."""
    leaves = {name: tensor.detach().clone().to(device).requires_grad_() for name, tensor in weights.items()}
    groups = [
        {"params": [leaf for leaf in leaves.values() if leaf.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [leaf for leaf in leaves.values() if leaf.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.peak_learning_rate, betas=BETAS, fused=True)
    return TrainingState(plan, leaves, optimizer, 0, 0, {})


def save_state(path: Path, state: TrainingState) -> None:
    """Durably replace the file: a kill at any moment leaves the old state or the new one."""
    tensors = {}
    for name, leaf in state.leaves.items():
        tensors[f"leaf/{name}"] = leaf.detach()
        for moment, tensor in state.optimizer.state.get(leaf, {}).items():
            tensors[f"{moment}/{name}"] = tensor
    position = _Position(plan=state.plan, step=state.step, num_tokens=state.num_tokens, taken=state.taken)
    incoming = path.with_suffix(".incoming")
    save_file(tensors, incoming, metadata={"position": msgspec.json.encode(position).decode()})
    with incoming.open("rb") as file:
        os.fsync(file.fileno())
    incoming.replace(path)


def load_state(path: Path, *, device: torch.device) -> TrainingState:
    """The state that `save_state` stored; raises CheckpointError if the file cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            position = msgspec.json.decode(file.metadata()["position"], type=_Position)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
        names = [name for name, _ in expected_shapes(position.plan.config)]
        state = new_state(position.plan, {name: tensors[f"leaf/{name}"] for name in names}, device=device)
        for name, leaf in state.leaves.items() if position.step else ():
            state.optimizer.state[leaf] = dict(_moments(tensors, name, device))
    except (SafetensorError, OSError, KeyError, TypeError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path} is no saved training run: {error!r}; name another --out or remove it") from error
    state.step, state.num_tokens, state.taken = position.step, position.num_tokens, position.taken
    return state


def _moments(tensors: Mapping[str, Tensor], name: str, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for moment in _MOMENTS:
        yield moment, tensors[f"{moment}/{name}"].to(device)
