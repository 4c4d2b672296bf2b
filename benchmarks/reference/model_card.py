"""A trained target as it is shipped: a Hugging Face directory with weights, tokenizer, held-out ids, model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from benchmarks.reference.corpus import CONTEXT_TOKENS, MAX_RECORD_CHARS, QUERY_SETS, REFERENCE
from benchmarks.reference.objective import LOAD_BALANCE_WEIGHT, PROMPT_WEIGHT, ROUTER_Z_WEIGHT, HeldOutLoss
from benchmarks.reference.run_state import TrainingState
from benchmarks.report import Table
from slipstream.models.checkpoint import save_checkpoint

LICENCE = "CC BY-SA 4.0"
"""Of the weights, because part of the text is under it."""


def write_model(directory: Path, state: TrainingState, tokenizer: Path, losses: Mapping[str, HeldOutLoss]) -> str:
    """Write the directory (bf16 weights) and return the digest of its tensors."""
    weights = {name: leaf.detach().cpu() for name, leaf in state.leaves.items()}
    digest = save_checkpoint(directory, state.plan.config, weights)
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    for name in ("tokenizer_config.json", "generation_config.json", "heldout_ids.txt"):
        shutil.copyfile(REFERENCE / name, directory / name)
    (directory / "README.md").write_text(_card(state, losses), encoding="utf-8")
    return digest


def _card(state: TrainingState, losses: Mapping[str, HeldOutLoss]) -> str:
    plan = state.plan
    config = plan.config
    num_weights = sum(leaf.numel() for leaf in state.leaves.values())
    sets = Table(
        columns=("set", "share of batches", "licence"),
        rows=tuple((one.name, f"{one.share:.0%}", one.licence) for one in QUERY_SETS),
    )
    table = Table(
        columns=("held-out loss, nats a token", *losses),
        rows=(
            ("answers", *(f"{one.answers:.2f}" for one in losses.values())),
            ("whole text", *(f"{one.whole_text:.2f}" for one in losses.values())),
        ),
    )
    return f"""---
license: cc-by-sa-4.0
library_name: transformers
pipeline_tag: text-generation
---

# A small real mixture-of-experts language model

`Qwen3MoeForCausalLM`, bf16: {num_weights / 1e6:.2f} M parameters, hidden {config.hidden_size}, \
{config.num_layers} layers, {config.num_experts} experts of inner size {config.intermediate_size}, \
{config.experts_per_token} active, vocabulary {config.vocab_size:,}, trained at {CONTEXT_TOKENS} tokens.
Licence of the weights: {LICENCE} (part of the training text is under it).

Prompt format (also the chat template): `<|user|>PROMPT<|assistant|>`; the answer ends with `<|endoftext|>`. A question
for SQL begins with `Write SQL. `, a docstring to be written out with `Write Python. `.

## Training

From scratch, {state.num_tokens / 1e6:.1f} M tokens in {state.step:,} steps of at most {plan.batch_tokens:,} tokens: \
{plan.num_all_text_steps:,} steps with the loss on all text, the others on answers (prompt tokens weigh \
{PROMPT_WEIGHT}). AdamW, peak learning rate {plan.peak_learning_rate:g}, load-balance loss {LOAD_BALANCE_WEIGHT}, \
router z-loss {ROUTER_Z_WEIGHT:g}, seed {plan.seed}.
Recipe: `python -m benchmarks.reference.train`.

{sets.as_text()}

Records of {MAX_RECORD_CHARS} characters and more were left out; those of `heldout_ids.txt`, and the other turns of
their dialogues and paraphrases of their questions, were never trained on.

## Losses on the held-out records

{table.as_text()}
"""
