"""One step of training after another, with progress and checkpoints, until the plan is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from benchmarks.reference.corpus import BatchOrder, TokenSequence
from benchmarks.reference.objective import PROMPT_WEIGHT, to_device, training_loss
from benchmarks.reference.run_state import Plan, TrainingState, save_state
from benchmarks.report import progress

DECAY_SHARE = 0.45
"""The last share of the steps over which the learning rate falls linearly ..."""

FINAL_LEARNING_RATE = 0.02
"""... to this part of its peak."""

MAX_GRADIENT_NORM = 1.0
STATE_FILE = "state.safetensors"
LOSSES_FILE = "losses.jsonl"

_PROGRESS_EVERY_S = 5.0


class StepLoss(msgspec.Struct, frozen=True):
    """Cross-entropy of one step's batch, nats a (weighted) token; written to LOSSES_FILE, one a line."""

    step: int
    loss: float


def learning_rate(plan: Plan, step: int) -> float:
    """The rate of step 0, 1, ..: linear warm-up, flat, linear decay over the last DECAY_SHARE."""
    warm_up = min(1.0, (step + 1) / max(1, plan.num_warm_up_steps))
    left = (plan.num_steps - step) / max(1.0, DECAY_SHARE * plan.num_steps)
    return plan.peak_learning_rate * min(warm_up, max(FINAL_LEARNING_RATE, min(1.0, left)))


def train_step(state: TrainingState, order: BatchOrder) -> float:
    """Draw a batch and take one step; advances `state` and returns the cross-entropy, nats a weighted token."""
    plan = state.plan
    device = next(iter(state.leaves.values())).device
    batch = to_device(order.next(), device)
    prompt_weight = 1.0 if state.step < plan.num_all_text_steps else PROMPT_WEIGHT
    total, text_loss = training_loss(plan.config, state.leaves, batch, prompt_weight=prompt_weight)
    state.optimizer.zero_grad()
    total.backward()
    # An expert that no token of this batch chose has no gradient. Zeros give every leaf moments from the first step
    # on, so that what is saved is always complete.
    for leaf in state.leaves.values():
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    torch.nn.utils.clip_grad_norm_(list(state.leaves.values()), MAX_GRADIENT_NORM)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(plan, state.step)
    state.optimizer.step()
    state.step, state.taken = state.step + 1, dict(order.taken)
    state.num_tokens += int(batch.lengths_B.sum())
    return float(text_loss)


def train(
    state: TrainingState,
    training: Mapping[str, Sequence[TokenSequence]],
    directory: Path,
    *,
    checkpoint_every_s: float,
    checkpoint_every_steps: int | None = None,
) -> None:
    """Run `state` to the end of its plan; checkpoints and losses go to `directory`, a line of progress to stdout.

    A run that is killed, at any moment, goes on from its last checkpoint.
    """
    order = BatchOrder(training, seed=state.plan.seed, batch_tokens=state.plan.batch_tokens, taken=state.taken)
    meter = _Meter(state)
    last_saved = time.monotonic()
    with _losses_up_to(directory / LOSSES_FILE, state.step).open("ab", buffering=0) as losses:
        while state.step < state.plan.num_steps:
            loss = train_step(state, order)
            losses.write(msgspec.json.encode(StepLoss(state.step, loss)) + b"\n")
            meter.show(state, loss)
            is_late = time.monotonic() - last_saved >= checkpoint_every_s
            if is_late or (checkpoint_every_steps and state.step % checkpoint_every_steps == 0):
                save_state(directory / STATE_FILE, state)
                last_saved = time.monotonic()
    save_state(directory / STATE_FILE, state)


def read_losses(path: Path) -> list[StepLoss]:
    """The complete lines of a run's losses; empty if there are none."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was cut off by a kill
    return [msgspec.json.decode(line, type=StepLoss) for line in lines]


def _losses_up_to(path: Path, step: int) -> Path:
    """Drop the losses of steps after the checkpoint: they are taken again."""
    kept = [one for one in read_losses(path) if one.step <= step]
    path.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in kept))
    return path


class _Meter:
    """Prints mean loss, speed and time left every few seconds."""

    def __init__(self, state: TrainingState) -> None:
        self._started = self._shown = time.monotonic()
        self._first_step, self._first_tokens = state.step, state.num_tokens
        self._losses: list[float] = []

    def show(self, state: TrainingState, loss: float) -> None:
        """Take note of a step; print if a line is due."""
        self._losses.append(loss)
        now = time.monotonic()
        if now - self._shown < _PROGRESS_EVERY_S and state.step < state.plan.num_steps:
            return
        plan, elapsed_s = state.plan, max(now - self._started, 1e-9)
        left_s = (plan.num_steps - state.step) * elapsed_s / (state.step - self._first_step)
        speed = (state.num_tokens - self._first_tokens) / elapsed_s
        kind = "all text" if state.step <= plan.num_all_text_steps else "answers"
        mean = sum(self._losses) / len(self._losses)
        progress(
            f"step {state.step:,}/{plan.num_steps:,} ({100 * state.step / plan.num_steps:.1f} %) "
            f"loss on {kind} {mean:.3f}  {speed:,.0f} tokens/s  ETA {duration(left_s)}"
        )
        self._shown, self._losses = now, []


def duration(seconds: float) -> str:
    """As hours, minutes and seconds: `1 h 02 min`, `3 min 20 s`, `7 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
