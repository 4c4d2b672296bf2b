"""One whole run: text and tokenizer, a plan or the state of an earlier start, training, held-out losses, the model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer

from benchmarks.reference.corpus import (
    REFERENCE,
    BatchOrder,
    Corpus,
    load_tokenizer,
    read_corpus,
    train_tokenizer,
)
from benchmarks.reference.evaluate import evaluate
from benchmarks.reference.model_card import write_model
from benchmarks.reference.objective import HeldOutLoss, initial_weights
from benchmarks.reference.run_state import Plan, TrainingState, load_state, new_state
from benchmarks.reference.training import STATE_FILE, duration, train, train_step
from benchmarks.report import progress
from slipstream.errors import ConfigError
from slipstream.models.config import ModelConfig, read_config

NUM_TOKENS = 21_700_000
"""Tokens of a run without a time limit, as many as the shipped target saw."""

ALL_TEXT_SHARE = 0.34
"""The first share of the steps has the loss on all text, the others on answers."""

CHECKPOINT_EVERY_S = 180.0

_TIMED_STEPS = 6
_SAMPLED_BATCHES = 200


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration of the recipe: architecture, batches and optimizer, and what bounds text and steps (None: no)."""

    name: str
    config: ModelConfig
    batch_tokens: int
    peak_learning_rate: float
    num_warm_up_steps: int
    num_steps: int | None = None
    most_records: int | None = None
    checkpoint_every_steps: int | None = None


class RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for. `minutes` None: train on NUM_TOKENS tokens however long it takes."""

    size: Size
    data: Path
    directory: Path
    seed: int = 0
    minutes: float | None = None
    trains_tokenizer: bool = False

    @property
    def words(self) -> str:
        """The request without its folders; a stored run is resumed for the same words only."""
        amount = f"{self.minutes:g} minutes" if self.minutes else "all tokens"
        tokenizer = "own tokenizer" if self.trains_tokenizer else "shipped tokenizer"
        return f"{self.size.name}, {amount}, seed {self.seed}, {tokenizer}"


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run: held-out losses per set before and after, and the digest of the stored tensors."""

    state: TrainingState
    before: dict[str, HeldOutLoss]
    after: dict[str, HeldOutLoss]
    digest: str


def full_size() -> Size:
    """The shipped target's architecture."""
    config = read_config(REFERENCE / "config.json")
    return Size(name="full", config=config, batch_tokens=4096, peak_learning_rate=2e-3, num_warm_up_steps=100)


def tiny_size() -> Size:
    """The same family at a size that shows in seconds whether the recipe works."""
    config = msgspec.structs.replace(
        read_config(REFERENCE / "config.json"),
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        num_experts=4,
    )
    return Size(
        name="tiny",
        config=config,
        batch_tokens=1024,
        peak_learning_rate=4e-3,
        num_warm_up_steps=10,
        num_steps=80,
        most_records=300,
        checkpoint_every_steps=20,
    )


def run(request: RunRequest, *, device: torch.device) -> Run:
    """Train what was asked for, or what is left of it, and write `directory`/model.

    Raises ConfigError if data is missing or `directory` holds another run, CheckpointError if its state is broken.
    """
    request.directory.mkdir(parents=True, exist_ok=True)
    progress("reading and encoding the query sets")
    tokenizer_path, tokenizer = _tokenizer(request)
    corpus = read_corpus(request.data, tokenizer, most_records=request.size.most_records)
    state = _state(request, tokenizer, corpus, device=device)
    train(
        state,
        corpus.training,
        request.directory,
        checkpoint_every_s=CHECKPOINT_EVERY_S,
        checkpoint_every_steps=request.size.checkpoint_every_steps,
    )
    progress("measuring the held-out records")
    config = state.plan.config
    fresh = {name: tensor.to(device) for name, tensor in initial_weights(config, seed=state.plan.seed).items()}
    before = evaluate(config, fresh, corpus.held_out, device=device)
    after = evaluate(config, state.leaves, corpus.held_out, device=device)
    digest = write_model(request.directory / "model", state, tokenizer_path, after)
    return Run(state=state, before=before, after=after, digest=digest)


def mean_answer_loss(losses: Mapping[str, HeldOutLoss]) -> float:
    """Mean over the sets of the loss on answers, nats a token."""
    return sum(one.answers for one in losses.values()) / len(losses)


def _tokenizer(request: RunRequest) -> tuple[Path, Tokenizer]:
    """The shipped tokenizer, or the run's own: trained at its first start, read at later ones."""
    if not request.trains_tokenizer:
        path = REFERENCE / "tokenizer.json"
        return path, load_tokenizer(path)
    path = request.directory / "tokenizer.json"
    if not path.exists():
        progress("training a tokenizer")
        train_tokenizer(request.data, vocab_size=request.size.config.vocab_size).save(str(path))
    return path, load_tokenizer(path)


def _state(request: RunRequest, tokenizer: Tokenizer, corpus: Corpus, *, device: torch.device) -> TrainingState:
    """Where an earlier start of the same request stopped, or the beginning."""
    path = request.directory / STATE_FILE
    if not path.exists():
        plan = _plan(request, tokenizer, corpus, device=device)
        return new_state(plan, initial_weights(plan.config, seed=plan.seed), device=device)
    state = load_state(path, device=device)
    seen, expected = (state.plan.requested, state.plan.corpus), (request.words, corpus.digest)
    if seen != expected:
        raise ConfigError(
            f"{path} holds a run of ({seen[0]}) on text {seen[1][:12]}, asked for is ({expected[0]}) on text "
            f"{expected[1][:12]}; repeat the earlier command, or name another directory with --out"
        )
    progress(f"going on from step {state.step:,} of {state.plan.num_steps:,}")
    return state


def _plan(request: RunRequest, tokenizer: Tokenizer, corpus: Corpus, *, device: torch.device) -> Plan:
    size = request.size
    draft = Plan(
        requested=request.words,
        config=msgspec.structs.replace(size.config, vocab_size=tokenizer.get_vocab_size()),
        corpus=corpus.digest,
        seed=request.seed,
        batch_tokens=size.batch_tokens,
        peak_learning_rate=size.peak_learning_rate,
        num_warm_up_steps=size.num_warm_up_steps,
        num_all_text_steps=0,
        num_steps=1,
    )
    if size.num_steps:
        num_steps = size.num_steps
    elif request.minutes:
        num_steps = max(1, round(60 * request.minutes / _step_s(draft, corpus, device=device)))
    else:
        num_steps = math.ceil(NUM_TOKENS / _mean_batch_tokens(draft, corpus))
    return msgspec.structs.replace(
        draft,
        num_steps=num_steps,
        num_all_text_steps=round(ALL_TEXT_SHARE * num_steps),
        num_warm_up_steps=min(size.num_warm_up_steps, max(1, num_steps // 10)),
    )


def _mean_batch_tokens(plan: Plan, corpus: Corpus) -> float:
    """Tokens of a batch, padding not counted."""
    order = BatchOrder(corpus.training, seed=plan.seed, batch_tokens=plan.batch_tokens)
    return sum(int(order.next().lengths_B.sum()) for _ in range(_SAMPLED_BATCHES)) / _SAMPLED_BATCHES


def _step_s(plan: Plan, corpus: Corpus, *, device: torch.device) -> float:
    """Seconds of a step on this machine, from a few that are thrown away (the first two warm up)."""
    state = new_state(plan, initial_weights(plan.config, seed=plan.seed), device=device)
    order = BatchOrder(corpus.training, seed=plan.seed, batch_tokens=plan.batch_tokens)
    started = time.monotonic()
    for number in range(2 + _TIMED_STEPS):
        if number == 2:
            started = time.monotonic()
        train_step(state, order)  # ends by reading the loss, so the device has finished
    step_s = (time.monotonic() - started) / _TIMED_STEPS
    progress(f"a step takes {duration(step_s) if step_s >= 1 else f'{1000 * step_s:.0f} ms'}")
    return step_s
