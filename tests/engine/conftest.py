"""The reference target, two drafts, real prompts, and a way to run an engine to the end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer

from deploy.local.queries import builtin_streams
from slipstream.drafting.drafter import Drafter
from slipstream.drafting.merge import DraftingOptions
from slipstream.engine.decoders import OpenDecoder, open_decoder
from slipstream.engine.engine import Engine
from slipstream.engine.request import Request, SamplingParams, TokenBlock
from slipstream.engine.scheduler import EngineLimits
from slipstream.engine.stops import TokenBytes
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.records import Observation
from slipstream.telemetry import ReplicaMetrics

MODELS = Path(__file__).parents[2] / "deploy" / "models"
END_OF_TEXT = 0


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target() -> Checkpoint:
    return load_checkpoint(MODELS / "mix-moe-11m")


@pytest.fixture(scope="session")
def sibling() -> Checkpoint:
    """A draft that knows all of the target's domains."""
    return load_checkpoint(MODELS / "draft-2m-sibling")


@pytest.fixture(scope="session")
def general() -> Checkpoint:
    """A draft that knows none of them."""
    return load_checkpoint(MODELS / "draft-2m-general")


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    """48 prompts, a third each of word problems, questions for SQL, and docstrings of the standard library."""
    tokenizer = Tokenizer.from_file(str(MODELS / "mix-moe-11m" / "tokenizer.json"))
    first_three = dict(builtin_streams(seed=7)[:3]).values()
    queries = [query for stream in first_three for query in itertools.islice(stream, 16)]
    return [tuple(tokenizer.encode(f"<|user|>{query.prompt}<|assistant|>").ids) for query in queries]


LIMITS = EngineLimits(
    max_running_requests=32,
    max_queued_requests=1000,
    max_step_tokens=512,
    max_context_tokens=1024,
    num_draft_tokens=4,
)


class Run(msgspec.Struct):
    """What came out of an engine that served some prompts to the end."""

    outputs: list[list[int]]
    blocks: list[list[TokenBlock]]
    observations: list[Observation]
    metrics: ReplicaMetrics
    num_steps: int
    num_free_blocks: int

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"slipstream_{name}", labels) or 0.0


class Served(msgspec.Struct, kw_only=True):
    """How to serve: sizes, what drafts (a checkpoint, any drafter, or a choice of them), and the requests' sampling."""

    draft: Checkpoint | None = None
    drafter: Drafter | None = None
    decoders: OpenDecoder = open_decoder
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 48
    limits: EngineLimits = LIMITS
    may_train: bool = True
    seed: int = 1000
    num_logprobs: int | None = None
    token_bytes: TokenBytes | None = None
    more: dict[str, Any] = {}
    drafting: DraftingOptions | None = None


BeforeStep = Callable[[Engine, int], None]


def make_engine(target: Checkpoint, served: Served, observations: list[Observation], metrics: ReplicaMetrics) -> Engine:
    engine = Engine(
        target,
        limits=served.limits,
        target_digest=target.digest,
        replica_id="replica-1",
        top_n=16,
        observe=observations.append,
        metrics=metrics,
        decoders=served.decoders,
        token_bytes=served.token_bytes,
        drafting=served.drafting,
    )
    if served.draft is not None:
        engine.install_draft(served.draft, version=1)
    if served.drafter is not None:
        engine.install_drafter(served.drafter)
    return engine


def request_for(index: int, prompt: Sequence[int], served: Served) -> Request:
    return Request(
        request_id=f"request-{index}",
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(
            seed=served.seed + index,
            max_tokens=served.max_tokens,
            temperature=served.temperature,
            top_k=served.top_k,
            top_p=served.top_p,
            stop_token_ids=(END_OF_TEXT,),
            **served.more,
        ),
        tenant="anonymous",
        domain="math",
        may_train=served.may_train,
        arrived_at=0.0,
        num_logprobs=served.num_logprobs,
    )


def serve(
    target: Checkpoint, prompts: Sequence[Sequence[int]], served: Served, before_step: BeforeStep = lambda *_: None
) -> Run:
    """Submit all prompts at once and step until none is left; `before_step` sees the engine and the step's number."""
    observations: list[Observation] = []
    metrics = ReplicaMetrics()
    engine = make_engine(target, served, observations, metrics)
    blocks: list[list[TokenBlock]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.submit(request_for(index, prompt, served), blocks[index].append)
    num_steps = 0
    before_step(engine, num_steps)
    while engine.step():
        num_steps += 1
        before_step(engine, num_steps)
    outputs = [[token for block in some for token in block.token_ids] for some in blocks]
    return Run(outputs, blocks, observations, metrics, num_steps, engine.num_free_blocks)
