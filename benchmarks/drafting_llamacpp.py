"""llama.cpp at batch 1, plain and with its own draft option: prompt look-up as llama-cpp-python brings it.

Greedy. Each runs in a process of its own (`python -m benchmarks.drafting_llamacpp GGUF_FILE NUM_THREADS`) that stays
loaded and answers a line of JSON with a line of JSON, so that it can take turns with ours within seconds. Drafting and
verification are what `Llama.generate` does with a `draft_model`, without its cost in Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.peers.protocol import is_installed

if is_installed("llama_cpp"):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    from benchmarks.peers.llamacpp import Session

_CONTEXT_TOKENS = 512
NUM_PREDICTED = (0, 3, 10)
"""How much its look-up drafts; 0 is plain decoding, 10 its default."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Decode `num_tokens` tokens greedily; drafts of `num_predicted` tokens by prompt look-up, 0 for none."""

    prompt_ids: tuple[int, ...]
    num_tokens: int
    num_predicted: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` and `num_calls` from the first token, which the prompt's pass gives, to the last."""

    seconds: float
    num_calls: int
    token_ids: tuple[int, ...]


class LlamaPeer:
    """The process, loaded and waiting."""

    def __init__(self, gguf: Path, *, num_threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.drafting_llamacpp", str(gguf), str(num_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false"},
        )

    def decode(self, ask: Ask) -> Answer:
        """What it answers; raises RuntimeError if it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(ask) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"benchmarks.drafting_llamacpp ended with {self._process.wait()}, expected an answer")
        return msgspec.json.decode(line, type=Answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def decode(session: Session, ask: Ask) -> Answer:
    """Greedy tokens after the prompt, drafted by look-up in the text so far and verified in the next pass."""
    look_up = LlamaPromptLookupDecoding(num_pred_tokens=ask.num_predicted) if ask.num_predicted else None
    session.forget(keep=0)
    session.decode(ask.prompt_ids)
    token_ids = [session.best_token()]
    num_calls = 0
    began = time.perf_counter()
    while len(token_ids) < ask.num_tokens:
        text = [*ask.prompt_ids, *token_ids]
        drafted = [int(token) for token in look_up(np.array(text, np.intc))] if look_up else []
        session.decode([token_ids[-1], *drafted], all_logits=True)
        said = session.best_tokens(1 + len(drafted))
        num_right = next((i for i, token in enumerate(drafted) if token != said[i]), len(drafted))
        token_ids += said[: num_right + 1]
        session.forget(keep=len(text) + num_right)
        num_calls += 1
    seconds = time.perf_counter() - began
    return Answer(seconds=seconds, num_calls=num_calls, token_ids=tuple(token_ids[: ask.num_tokens]))


def main() -> None:
    """Answer every line of the standard input."""
    session = Session(sys.argv[1], num_threads=int(sys.argv[2]), context_tokens=_CONTEXT_TOKENS)
    for line in sys.stdin.buffer:
        answer = decode(session, msgspec.json.decode(line, type=Ask))
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
