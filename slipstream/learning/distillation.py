"""Refit a draft to what the target was logged saying: forward KL from kept log-probabilities, no target model loaded.

The loss of one generated position is the cross-entropy from the target to the draft over N + 1 outcomes, the N kept
tokens and one for all others:  -(sum_i p_i log q_i + p_rest log q_rest). It differs from the forward KL divergence of
those outcomes by the target's entropy, which does not depend on the draft. Every generated position counts, not only
those where a draft failed. Source of learning from serving traffic: Liu et al., "Online Speculative Decoding", 2023.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slipstream.errors import CheckpointError
from slipstream.models.checkpoint import expected_shapes, save_checkpoint
from slipstream.models.config import ModelConfig
from slipstream.models.decoder import arrange, causal_decode, logits_of
from slipstream.records import Observation, unpack_floats, unpack_ids

MAX_SEQUENCE_TOKENS = 384
"""Longer sequences lose the start of their prompt in training: rotary positions are relative, and time is short."""

_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.1
_MAX_GRADIENT_NORM = 1.0
_WARM_UP_STEPS = 5
_AVERAGE_DECAY = 0.98
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")

_SMALLEST_REST = 1e-6
"""Keeps log(q_rest) finite when the draft is sure of the kept tokens; fp32 sums of probabilities err by as much."""


class DistillationBatch(msgspec.Struct, frozen=True):
    """Sequences and what the target said at each of their G generated positions.

    `ids_BT` int64 is prompt and output, padded on the right with 0. `sources_G` int64 are the indices into the
    flattened [B * T] positions whose logits predict the generated tokens. `top_ids_GN` int64 and `top_probs_GN`
    float32 are the target's kept probabilities; `rest_probs_G` float32 is what they leave of 1, at least 0.
    """

    ids_BT: Tensor
    sources_G: Tensor
    top_ids_GN: Tensor
    top_probs_GN: Tensor
    rest_probs_G: Tensor


def is_trainable(observation: Observation, *, vocab_size: int) -> bool:
    """Whether an observation can be learned from: something generated, known token ids, finite probabilities."""
    ids = np.concatenate([unpack_ids(observation.prompt_ids), unpack_ids(observation.output_ids)])
    top_ids, top_logprobs = unpack_ids(observation.top_ids), unpack_floats(observation.top_logprobs, bits=16)
    if not observation.output_ids or not observation.prompt_ids or not observation.top_n:
        return False
    all_ids = np.concatenate([ids, top_ids])
    return bool(all_ids.min() >= 0 and all_ids.max() < vocab_size and (top_logprobs < 1).all())


def make_batch(observations: Sequence[Observation]) -> DistillationBatch:
    """The batch of these observations (`is_trainable`); keeps the smallest `top_n` among them. ValueError if empty."""
    if not observations:
        raise ValueError("no observations, expected at least one")
    num_kept = min(one.top_n for one in observations)
    sequences = [_sequence(one) for one in observations]
    ids_BT = torch.zeros(len(sequences), max(len(ids) for ids, _ in sequences), dtype=torch.int64)
    sources, top_ids, top_probs = [], [], []
    for row, ((ids, num_outputs), one) in enumerate(zip(sequences, observations, strict=True)):
        ids_BT[row, : len(ids)] = torch.from_numpy(ids)
        first_source = row * ids_BT.shape[1] + len(ids) - num_outputs - 1
        sources.append(torch.arange(first_source, first_source + num_outputs))
        top_ids_TN, top_probs_TN = kept_probs(one)
        top_ids.append(top_ids_TN[-num_outputs:, :num_kept])
        top_probs.append(top_probs_TN[-num_outputs:, :num_kept])
    top_probs_GN = torch.cat(top_probs)
    rest_probs_G = (1.0 - top_probs_GN.sum(-1)).clamp(min=0.0)
    return DistillationBatch(ids_BT, torch.cat(sources), torch.cat(top_ids), top_probs_GN, rest_probs_G)


def kept_probs(observation: Observation) -> tuple[Tensor, Tensor]:
    """The target's kept token ids int64 [T, N] and probabilities float32 [T, N], most likely first."""
    top_ids_TN = torch.from_numpy(unpack_ids(observation.top_ids).astype(np.int64)).view(-1, observation.top_n)
    top_logprobs_TN = torch.from_numpy(unpack_floats(observation.top_logprobs, bits=16)).view(-1, observation.top_n)
    top_probs_TN = top_logprobs_TN.exp()
    # float16 log-probabilities can sum to a little more than one.
    return top_ids_TN, top_probs_TN / top_probs_TN.sum(-1, keepdim=True).clamp(min=1.0)


def _sequence(observation: Observation) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], int]:
    """Prompt and output ids, cut on the left, and how many at the end are generated and have a token before them."""
    output = unpack_ids(observation.output_ids)
    ids = np.concatenate([unpack_ids(observation.prompt_ids), output]).astype(np.int64)[-MAX_SEQUENCE_TOKENS:]
    return ids, min(len(output), len(ids) - 1)


def distillation_loss(logits_GV: Tensor, batch: DistillationBatch) -> Tensor:
    """Mean cross-entropy from the target's kept tokens and their rest to the draft, nats a token, fp32 scalar."""
    draft_logprobs_GN = logits_GV.gather(1, batch.top_ids_GN) - logits_GV.logsumexp(-1, keepdim=True)
    kept_G = draft_logprobs_GN.exp().sum(-1)
    rest_logprobs_G = torch.log((1.0 - kept_G).clamp(min=_SMALLEST_REST))
    cross_entropy_G = -(batch.top_probs_GN * draft_logprobs_GN).sum(-1) - batch.rest_probs_G * rest_logprobs_G
    return cross_entropy_G.mean()


def generated_logits(config: ModelConfig, weights: Mapping[str, Tensor], batch: DistillationBatch) -> Tensor:
    """The draft's logits [G, V] at the generated positions, differentiable in `weights`.

    Unlike `causal_logits` the head runs over generated positions only: prompts are most of a sequence and the head
    is half of a small draft's work.
    """
    decoder = arrange(config, weights)
    return logits_of(decoder, causal_decode(decoder, batch.ids_BT)[0][batch.sources_G])


class Student:
    """A draft in training: fp32 leaf weights, AdamW, and the running average of the weights that is published.

    `learning_rate` may be changed between steps.
    The average evens out the noise of small batches: published drafts match 1 to 2 % more tokens than the leaves do.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], *, learning_rate: float) -> None:
        self.config = config
        self.num_steps = 0
        self.learning_rate = learning_rate
        # Copies in fp32, which is what is trained, whatever the weights were stored in.
        weights = {name: tensor.detach().float() for name, tensor in weights.items()}
        self._leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
        self._average = {name: tensor.clone() for name, tensor in weights.items()}
        self._optimizer = torch.optim.AdamW(
            list(self._leaves.values()), lr=learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, fp32: what `snapshot` stores."""
        return self._average

    def train_step(self, batch: DistillationBatch) -> float:
        """One optimizer step; returns the loss before it, nats a token. A loss that is not finite changes nothing."""
        loss = distillation_loss(generated_logits(self.config, self._leaves, batch), batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self._leaves.values()), _MAX_GRADIENT_NORM)
        self.num_steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, self.num_steps / _WARM_UP_STEPS)
        self._optimizer.step()
        decay = min(_AVERAGE_DECAY, self.num_steps / (self.num_steps + 10))
        for name, average in self._average.items():
            average.lerp_(self._leaves[name].detach(), 1.0 - decay)
        return value

    def snapshot(self, directory: Path) -> str:
        """Store the averaged weights as a checkpoint directory (bf16); returns its digest."""
        return save_checkpoint(directory, self.config, self._average)

    def save(self, path: Path, *, version: int) -> None:
        """Durably store everything training needs to go on; `version` names the registered version it stands at."""
        tensors = {f"average/{name}": tensor for name, tensor in self._average.items()}
        for name, leaf in self._leaves.items():
            tensors[f"leaf/{name}"] = leaf.detach()
            for moment, tensor in self._optimizer.state.get(leaf, {}).items():
                tensors[f"{moment}/{name}"] = tensor
        metadata = {
            "version": str(version),
            "num_steps": str(self.num_steps),
            "config": msgspec.json.encode(self.config).decode(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        incoming = path.with_suffix(".incoming")
        save_file(tensors, incoming, metadata=metadata)
        with incoming.open("rb") as file:
            os.fsync(file.fileno())
        incoming.replace(path)

    @staticmethod
    def restore(path: Path, *, learning_rate: float) -> tuple[Student, int]:
        """The student that `save` stored and the version it stands at; raises CheckpointError if it cannot be read."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            config = msgspec.json.decode(metadata["config"], type=ModelConfig)
            shapes = dict(expected_shapes(config))
            student = Student(config, {name: tensors[f"leaf/{name}"] for name in shapes}, learning_rate=learning_rate)
            student._average = {name: tensors[f"average/{name}"] for name in shapes}
            student.num_steps = int(metadata["num_steps"])
            for name, leaf in student._leaves.items() if student.num_steps else ():
                student._optimizer.state[leaf] = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS}
            return student, int(metadata["version"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, msgspec.MsgspecError) as error:
            raise CheckpointError(f"{path} is no saved student: {error!r}; training starts from a version") from error
