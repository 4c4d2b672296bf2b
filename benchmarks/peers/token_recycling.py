"""The authors' own Token Recycling, run on a CPU: started by path with an interpreter that has transformers 4.37.1.

    INTERPRETER benchmarks/peers/token_recycling.py < task.json > answer.json

The task: `checkout` of github.com/Luowaterbi/TokenRecycling, `model` directory, `prompts` (token ids), `max_tokens`,
and `template`, rank paths to use in place of the checkout's own, or null. The answer: per prompt `token_ids` behind it
and `accepted`, the tokens of each call. Nothing of the checkout is changed: its device literals are replaced as
it is read, and what only its command line needs (fastchat, its evaluation harness) is left empty. Its matrix is kept
from prompt to prompt, as it keeps it from question to question.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

_DEVICE_LITERALS = ((".cuda()", ""), ("cuda:0", "cpu"))


class Tokenizer:
    """What its generation asks of a tokenizer."""

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id


class Inputs:
    """What its generation asks of an encoded prompt: token ids [1, T]."""

    def __init__(self, prompt: list[int]) -> None:
        self.input_ids = torch.tensor([prompt])


def generation_module(checkout: Path, template: list[list[int]] | None) -> types.ModuleType:
    """Its `evaluation/inference_recycling.py`, with devices and, if asked for, the template replaced."""
    sys.path.insert(0, str(checkout))
    for name, members in {
        "fastchat": (),
        "fastchat.utils": ("str_to_torch_dtype",),
        "evaluation.eval": ("run_eval", "reorg_answer_file"),
    }.items():
        empty = types.ModuleType(name)
        for member in members:
            setattr(empty, member, None)
        sys.modules[name] = empty
    source = (checkout / "evaluation" / "inference_recycling.py").read_text(encoding="utf-8")
    for literal, replacement in _DEVICE_LITERALS:
        source = source.replace(literal, replacement)
    module = types.ModuleType("inference_recycling")
    exec(compile(source, "inference_recycling.py", "exec"), module.__dict__)
    if template is not None:
        vars(module)["choose_tree_template"] = lambda _version: template
    return module


def main() -> None:
    """Answer the task on standard input."""
    task: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(1)
    module: Any = generation_module(Path(task["checkout"]), task["template"])
    models: Any = importlib.import_module("model.recycling.modeling_llama_kv")
    model = models.LlamaForCausalLM.from_pretrained(task["model"], torch_dtype=torch.float32).eval()
    module.adj_matrix = torch.zeros((model.vocab_size, 8), dtype=torch.long)
    tokenizer = Tokenizer(model.config.eos_token_id)
    answers = []
    for prompt in task["prompts"]:
        ids, _, _, accepted = module.recycling_forward(Inputs(prompt), model, tokenizer, task["max_tokens"])
        answers.append({"token_ids": ids[0, len(prompt) :].tolist(), "accepted": accepted})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
