"""What a measured system is asked (`Task`) and answers (`Timing`), and the processes that it runs in."""

from __future__ import annotations

import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

INSTALL = "pip install -e '.[peers]'"
TIMEOUT_S = 900.0


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one system.

    `model` is a checkpoint directory or a GGUF file. Greedy decoding: `num_tokens` tokens after `prompt_ids`. Prefill:
    all of `text_ids` at once into an empty cache. Verification: `tree_sizes` tokens in one pass after each prefix of
    `text_ids` that `contexts` gives the length of. Batches: `batch_sizes` requests together. All of them are measured
    `num_repeats` times.
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

    `pass_ms` maps a number of verified tokens to the median milliseconds of a pass, `experts_touched` to the mean
    number of distinct experts that it read in a layer. `kernel_share` is the part of the steps' time inside kernels,
    `batch_tokens_per_s` maps a batch size to the tokens a second of all its requests. Fields that a system was not
    asked for, or cannot tell, stay empty.
    """

    token_ids: tuple[int, ...]
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


class Resident:
    """A system that has loaded its model and waits: plain decoding on request, as often as wanted.

    Systems that take turns by the second meet the same machine; its memory may be twice as fast a minute later.
    """

    def __init__(self, module: str, task: Task) -> None:
        """Start it and wait until it is loaded; raises RuntimeError if it fails."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(task.num_threads), "TOKENIZERS_PARALLELISM": "false"}
        self._folder = tempfile.TemporaryDirectory()
        asked = Path(self._folder.name) / "task.json"
        asked.write_bytes(msgspec.json.encode(task))
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(asked)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.turn()  # loads, and is no measurement

    def turn(self) -> float:
        """Milliseconds a token of one plain generation."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} ended with {self._process.wait()} in the middle of a turn")
        return float(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._folder.cleanup()


def answer(measure: Callable[[Task], Timing], plain: Callable[[Task], Callable[[], float]]) -> None:
    """The main function of a measured system: read the task that the command line names, and measure.

    With a second file: `measure`, and write the timing there. Without: load with `plain`, and answer every line of the
    standard input with the milliseconds a token of what it returned.
    """
    asked, *answered = (Path(argument) for argument in sys.argv[1:3])
    task = msgspec.json.decode(asked.read_bytes(), type=Task)
    if answered:
        answered[0].write_bytes(msgspec.json.encode(measure(task)))
        return
    run = plain(task)
    for _ in sys.stdin:
        print(run(), flush=True)


def median_ms(run: Callable[[], object], *, num_repeats: int, prepare: Callable[[], object] = lambda: None) -> float:
    """Median milliseconds of `run`, each time after an untimed `prepare`; the first time of all is not counted."""
    return interleaved_ms({0: run}, num_repeats=num_repeats, prepare=prepare)[0]


def interleaved_ms(
    runs: Mapping[int, Callable[[], object]], *, num_repeats: int, prepare: Callable[[], object] = lambda: None
) -> dict[int, float]:
    """Median milliseconds of each of the runs, which take turns, so that none always finds what another left cached.

    An untimed `prepare` comes before each; the first turn is not counted.
    """
    times: dict[int, list[float]] = {key: [] for key in runs}
    for _ in range(num_repeats + 1):
        for key, run in runs.items():
            prepare()
            started = time.perf_counter()
            run()
            times[key].append((time.perf_counter() - started) * 1e3)
    return {key: statistics.median(each[1:]) for key, each in times.items()}


def median_of_each(contexts: Iterable[Mapping[int, float]]) -> dict[int, float]:
    """By number of tokens, the median over contexts."""
    every = list(contexts)
    return {size: statistics.median(each[size] for each in every) for size in (every[0] if every else {})}


def median_gap_ms(runs: Iterable[Sequence[float]]) -> float:
    """Median milliseconds from one token to the next, given when (seconds) each token of each run was there."""
    return statistics.median(after - before for stamps in runs for before, after in itertools.pairwise(stamps)) * 1e3
