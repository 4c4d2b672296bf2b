"""llama.cpp through llama-cpp-python's C interface, with its defaults: flash attention as it sees fit, an f16 cache."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp

from benchmarks.peers.protocol import Task, Timing, answer, interleaved_ms, median_gap_ms, median_ms, median_of_each

_SEQUENCE = 0


class Session:
    """One model and one context; `decode` appends tokens to the only sequence."""

    def __init__(self, path: str, *, num_threads: int, context_tokens: int) -> None:
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, None)
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}; write it again with benchmarks.peers.gguf_file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_threads = params.n_threads_batch = num_threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(context_tokens, 0, 1)
        self._sampler = llama_cpp.llama_sampler_init_greedy()
        self.num_cached = 0

    def decode(self, token_ids: Sequence[int], *, all_logits: bool = False) -> None:
        """One pass over the tokens, after those cached; logits of the last one, or of all."""
        batch, first = self._batch, self.num_cached
        batch.n_tokens = len(token_ids)
        for index, token in enumerate(token_ids):
            batch.token[index] = token
            batch.pos[index] = first + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = _SEQUENCE
            batch.logits[index] = all_logits or index == len(token_ids) - 1
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {len(token_ids)} tokens gave {status}; expected 0")
        llama_cpp.llama_get_logits(self._context)  # waits until they are there
        self.num_cached += len(token_ids)

    def best_token(self) -> int:
        """The most likely token after the last one decoded."""
        return int(llama_cpp.llama_sampler_sample(self._sampler, self._context, -1))

    def best_tokens(self, number: int) -> list[int]:
        """The most likely token after each of the `number` tokens of a pass with all logits."""
        return [int(llama_cpp.llama_sampler_sample(self._sampler, self._context, row)) for row in range(number)]

    def forget(self, *, keep: int) -> None:
        """Drop what is cached after the first `keep` tokens."""
        if keep:
            llama_cpp.llama_memory_seq_rm(self._memory, _SEQUENCE, keep, -1)
        else:
            llama_cpp.llama_memory_clear(self._memory, False)
        self.num_cached = keep


def measure(task: Task) -> Timing:
    """Run the task in this process."""
    longest = max(len(task.prompt_ids) + task.num_tokens, len(task.text_ids))
    session = Session(task.model, num_threads=task.num_threads, context_tokens=-(-longest // 256) * 256)
    token_ids, _ = generate(session, task.prompt_ids, num_tokens=task.num_tokens)
    prefill_ms = median_ms(
        lambda: session.decode(task.text_ids),
        prepare=lambda: session.forget(keep=0),
        num_repeats=task.num_repeats,
    )
    return Timing(
        token_ids=tuple(token_ids),
        prefill_tokens_per_s=len(task.text_ids) / prefill_ms * 1e3,
        pass_ms=median_of_each(_pass_ms(session, task, context) for context in task.contexts),
        version=f"llama-cpp-python {llama_cpp.__version__}",
    )


def plain_runs(task: Task) -> Callable[[], float]:
    """Load the task's model; what is returned decodes plainly and gives the milliseconds a token."""
    longest = max(len(task.prompt_ids) + task.num_tokens, len(task.text_ids))
    session = Session(task.model, num_threads=task.num_threads, context_tokens=-(-longest // 256) * 256)
    return lambda: median_gap_ms([generate(session, task.prompt_ids, num_tokens=task.num_tokens)[1]])


def generate(session: Session, prompt_ids: Sequence[int], *, num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens after the prompt, and when (seconds) each was known."""
    session.forget(keep=0)
    session.decode(prompt_ids)
    token_ids, stamps = [session.best_token()], [time.perf_counter()]
    while len(token_ids) < num_tokens:
        session.decode(token_ids[-1:])
        token_ids.append(session.best_token())
        stamps.append(time.perf_counter())
    return token_ids, stamps


def _pass_ms(session: Session, task: Task, context: int) -> dict[int, float]:
    session.forget(keep=0)
    session.decode(task.text_ids[:context])
    return interleaved_ms(
        {
            size: functools.partial(session.decode, task.text_ids[context : context + size], all_logits=True)
            for size in task.tree_sizes
        },
        prepare=lambda: session.forget(keep=context),
        num_repeats=task.num_repeats,
    )


if __name__ == "__main__":
    answer(measure, plain_runs)
