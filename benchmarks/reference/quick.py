"""The recipe's own proof: a tiny run learns, and a run that was killed ends where an uninterrupted one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.reference.evaluate import loss_table
from benchmarks.reference.run import RunRequest, mean_answer_loss, run, tiny_size
from benchmarks.reference.training import LOSSES_FILE, StepLoss, read_losses
from benchmarks.report import Goal, Table, finish, progress
from slipstream.errors import ConfigError

SMALLEST_FALL_NATS = 1.0
KILL_AFTER_STEPS = 30
"""Between two checkpoints (every 20 steps), so that some steps are taken twice."""

_DEADLINE_S = 120.0


def prove(data: Path, *, seed: int) -> int:
    """Train without a break; train again, killed halfway and resumed; compare. Returns the exit code.

    On the CPU, also where CUDA is present: its sums have no fixed order, so equality could not be asked for.
    """
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="slipstream-reference-") as directory:
        whole = RunRequest(size=tiny_size(), data=data, directory=Path(directory) / "whole", seed=seed)
        broken = RunRequest(size=tiny_size(), data=data, directory=Path(directory) / "broken", seed=seed)
        uninterrupted = run(whole, device=device)
        progress("the same run in a process of its own, to be killed")
        num_steps_at_kill = start_and_kill(broken)
        resumed = run(broken, device=device)
        losses = [read_losses(request.directory / LOSSES_FILE) for request in (whole, broken)]
    fall = mean_answer_loss(uninterrupted.before) - mean_answer_loss(uninterrupted.after)
    goals = [
        Goal(figure="fall of the held-out loss on answers, nats", value=fall, at_least=SMALLEST_FALL_NATS),
        Goal(figure="steps before the kill", value=num_steps_at_kill, at_least=KILL_AFTER_STEPS),
        Goal(figure="steps whose loss differs after the kill", value=num_different(*losses), at_most=0),
        Goal(
            figure="final weights that differ after the kill",
            value=int(uninterrupted.digest != resumed.digest),
            at_most=0,
        ),
    ]
    table = loss_table({"before": uninterrupted.before, "after": uninterrupted.after, "killed": resumed.after})
    steps = Table(
        columns=("step", "loss, uninterrupted", "loss, killed and resumed"),
        rows=tuple(
            (str(one.step), f"{one.loss:.6f}", f"{other.loss:.6f}")
            for one, other in zip(*losses, strict=False)
            if one.step % 20 == 0
        ),
    )
    figures = {goal.figure: float(goal.value) for goal in goals}
    return finish("reference_quick", tables=[table, steps], figures=figures, goals=goals)


def start_and_kill(request: RunRequest) -> int:
    """Run the request (tiny, shipped tokenizer) in a process, SIGKILL it in the middle; returns the steps it took."""
    command = [sys.executable, "-m", "benchmarks.reference.train", "--tiny", "--seed", str(request.seed)]
    command += ["--data", str(request.data), "--out", str(request.directory)]
    request.directory.mkdir(parents=True)
    log = request.directory / "output.log"
    losses = request.directory / LOSSES_FILE
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    deadline = time.monotonic() + _DEADLINE_S
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        while process.poll() is None and time.monotonic() < deadline and len(read_losses(losses)) < KILL_AFTER_STEPS:
            time.sleep(0.01)
        process.kill()
    if process.returncode != -signal.SIGKILL or len(read_losses(losses)) < KILL_AFTER_STEPS:
        raise ConfigError(
            f"the run to be killed ended with {process.returncode}, expected it to be killed after "
            f"{KILL_AFTER_STEPS} steps within {_DEADLINE_S:g} s; it said: {log.read_text(errors='replace')[-500:]}"
        )
    return len(read_losses(losses))


def num_different(losses: list[StepLoss], others: list[StepLoss]) -> int:
    """Steps whose losses are not equal to the last bit, steps that only one run has included."""
    num_equal = sum(one == other for one, other in zip(losses, others, strict=False))
    return max(len(losses), len(others)) - num_equal
