"""transformers' `generate`: plain greedy decoding with its cache, `sdpa` attention, in the task's dtype."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.peers.protocol import Task, Timing, answer, median_gap_ms, median_ms


class _Stamps(BaseStreamer):  # type: ignore[misc]  # transformers' types are not read
    """Notes when every token arrives; the first call carries the prompt."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(task: Task) -> torch.nn.Module:
    """The task's model."""
    torch.set_num_threads(task.num_threads)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        task.model, dtype=getattr(torch, task.dtype), attn_implementation="sdpa", local_files_only=True
    )
    return model.eval()


def plain_runs(task: Task) -> Callable[[], float]:
    """Load the task's model; what is returned decodes plainly and gives the milliseconds a token."""
    model, prompt = load(task), torch.tensor([task.prompt_ids])
    return lambda: median_gap_ms([_generate(model, prompt, task.num_tokens)[1]])


@torch.inference_mode()
def measure(task: Task) -> Timing:
    """Run the task in this process; verification passes are not measured."""
    model, prompt, text = load(task), torch.tensor([task.prompt_ids]), torch.tensor([task.text_ids])
    token_ids, _ = _generate(model, prompt, task.num_tokens)
    prefill_ms = median_ms(lambda: model(text, use_cache=True, logits_to_keep=1), num_repeats=task.num_repeats)
    return Timing(
        token_ids=tuple(token_ids),
        prefill_tokens_per_s=len(task.text_ids) / prefill_ms * 1e3,
        version=f"transformers {transformers.__version__}",
    )


@torch.inference_mode()
def _generate(model: torch.nn.Module, prompt: torch.Tensor, num_tokens: int) -> tuple[list[int], list[float]]:
    stamps = _Stamps()
    output = model.generate(  # type: ignore[operator]  # the auto classes give a Module that generates
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        use_cache=True,
        # Without an end of text there is nothing that `min_new_tokens` would forbid: the greedy tokens stay ours.
        eos_token_id=-1,
        pad_token_id=0,
        max_new_tokens=num_tokens,
        streamer=stamps,
    )
    return output[0, prompt.shape[1] :].tolist(), stamps.seconds[1:]


if __name__ == "__main__":
    answer(measure, plain_runs)
