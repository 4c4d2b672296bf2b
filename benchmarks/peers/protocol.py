"""What a measured system is asked (`Task`) and answers (`Timing`), and the process that it runs in."""

from __future__ import annotations

import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

INSTALL = "pip install -e '.[peers]'"
TIMEOUT_S = 900.0


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one system.

    `model` is a checkpoint directory or a GGUF file. Greedy decoding: `num_tokens` tokens after `prompt_ids`. Prefill:
    all of `text_ids` at once into an empty cache. Verification: `tree_sizes` tokens in one pass after each prefix of
    `text_ids` that `contexts` gives the length of; every context is measured `num_repeats` times.
    """

    model: str
    dtype: Literal["bfloat16", "float32"]
    num_threads: int
    prompt_ids: tuple[int, ...]
    num_tokens: int
    text_ids: tuple[int, ...]
    contexts: tuple[int, ...] = ()
    tree_sizes: tuple[int, ...] = ()
    num_repeats: int = 3
    batch_sizes: tuple[int, ...] = ()


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: what was generated and how long it took.

    `ms_per_token` is the median time from one token to the next. `pass_ms` maps a number of verified tokens to
    the median milliseconds of a pass, `experts_touched` to the mean number of distinct experts that it read in a layer.
    `kernel_share` is the part of the steps' time inside kernels, `batch_tokens_per_s` maps a batch size to the tokens a
    second of all its requests. Fields that a system was not asked for, or cannot tell, stay empty.
    """

    token_ids: tuple[int, ...]
    ms_per_token: float
    prefill_tokens_per_s: float
    pass_ms: dict[int, float] = {}
    experts_touched: dict[int, float] = {}
    kernel_share: float | None = None
    batch_tokens_per_s: dict[int, float] = {}
    version: str = ""


def is_installed(package: str) -> bool:
    """Whether a peer's package can be imported here; it is not imported."""
    return importlib.util.find_spec(package) is not None


def run_system(module: str, task: Task) -> Timing:
    """Run `python -m MODULE TASK_FILE` with the task's threads and return what it answers.

    Raises RuntimeError with the end of its error output if it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(task.num_threads), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "task.json", Path(folder) / "timing.json"
        asked.write_bytes(msgspec.json.encode(task))
        command = [sys.executable, "-m", module, str(asked), str(answered)]
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False)
        if ended.returncode or not answered.exists():
            raise RuntimeError(
                f"{module} ended with {ended.returncode}: {ended.stderr.decode(errors='replace')[-2000:]}"
            )
        return msgspec.json.decode(answered.read_bytes(), type=Timing)


def answer(measure: Callable[[Task], Timing]) -> None:
    """The main function of a measured system: read the task that the command line names, measure, write the timing."""
    asked, answered = (Path(argument) for argument in sys.argv[1:3])
    timing = measure(msgspec.json.decode(asked.read_bytes(), type=Task))
    answered.write_bytes(msgspec.json.encode(timing))


def median_ms(run: Callable[[], object], *, prepare: Callable[[], object], num_repeats: int) -> float:
    """Median milliseconds of `run`, each time after an untimed `prepare`; the first time of all is not counted."""
    times: list[float] = []
    for _ in range(num_repeats + 1):
        prepare()
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def median_gap_ms(stamps: Sequence[float]) -> float:
    """Median milliseconds from one token to the next, given when (seconds) each was there; NaN for fewer than two."""
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    return statistics.median(gaps) * 1e3 if gaps else float("nan")
