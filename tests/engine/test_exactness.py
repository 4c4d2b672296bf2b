"""Output is a function of prompt and seed: not of drafts, batches, chunks of prefill, or swaps."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
import torch
from conftest import LIMITS, Run, Served, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.engine import Engine
from slipstream.engine.kv_cache import CachedDecoder, Span
from slipstream.engine.scheduler import EngineLimits
from slipstream.models.checkpoint import Checkpoint
from slipstream.models.decoder import arrange, causal_logits

Prompts = list[tuple[int, ...]]


def limits(*, running: int, step_tokens: int = 512, draft_tokens: int = 4) -> EngineLimits:
    return msgspec.structs.replace(
        LIMITS, max_running_requests=running, max_step_tokens=step_tokens, num_draft_tokens=draft_tokens
    )


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["greedy", "sampled"])
def plain(request: pytest.FixtureRequest, target: Checkpoint, prompts: Prompts) -> tuple[float, Run]:
    """One request at a time, without a draft."""
    temperature: float = request.param
    return temperature, serve(target, prompts[::2], Served(temperature=temperature, limits=limits(running=1)))


@pytest.mark.parametrize(
    ("running", "step_tokens", "draft_tokens"), [(1, 512, 4), (16, 512, 4), (24, 512, 1), (5, 32, 7), (16, 24, 0)]
)
def test_tokens_do_not_depend_on_draft_batch_or_prefill_chunks(
    plain: tuple[float, Run],
    target: Checkpoint,
    sibling: Checkpoint,
    prompts: Prompts,
    running: int,
    step_tokens: int,
    draft_tokens: int,
) -> None:
    temperature, expected = plain
    sizes = limits(running=running, step_tokens=step_tokens, draft_tokens=draft_tokens)
    run = serve(target, prompts[::2], Served(draft=sibling, temperature=temperature, limits=sizes))
    assert run.outputs == expected.outputs
    if draft_tokens:
        assert run.metric("accepted_tokens_total", domain="math") > 0.1 * run.metric(
            "draft_tokens_total", domain="math"
        )


def test_tokens_do_not_depend_on_swaps_with_requests_in_flight(
    plain: tuple[float, Run], target: Checkpoint, sibling: Checkpoint, general: Checkpoint, prompts: Prompts
) -> None:
    temperature, expected = plain
    drafts: Sequence[Checkpoint | None] = (general, sibling, None, sibling)
    in_flight: list[int] = []

    def swap(engine: Engine, step: int) -> None:
        if step and step % 5 == 0 and len(in_flight) < len(drafts):
            in_flight.append(engine.num_running)
            engine.install_draft(drafts[len(in_flight) - 1], version=len(in_flight) + 1)

    run = serve(target, prompts[::2], Served(draft=sibling, temperature=temperature, limits=limits(running=24)), swap)
    assert run.outputs == expected.outputs
    assert len(in_flight) == 4
    assert min(in_flight[:3]) >= 20
    versions = {one.draft_version for observation in run.observations for one in observation.rounds}
    assert versions >= {1, 2, 3, 5}


def test_logits_are_bitwise_equal_whatever_shares_the_step(target: Checkpoint, prompts: Prompts) -> None:
    decoder = arrange(target.config, target.weights)

    def logits_of(spans: list[list[Span]]) -> torch.Tensor:
        model = CachedDecoder(decoder, num_slots=8, max_context_tokens=512, is_exact=True)
        rows = [model.logits(model.forward(step)[0]) for step in spans]
        return rows[-1]

    prompt = prompts[0][:60]
    alone = logits_of([[Span(0, 0, prompt)]])
    company = [Span(slot, 0, prompts[slot][: 20 + 9 * slot]) for slot in (1, 2, 3)]
    together = logits_of([[*company, Span(0, 0, prompt)]])[-len(prompt) :]
    assert torch.equal(alone, together)
    one_by_one = [[Span(5, position, (token,))] for position, token in enumerate(prompt)]
    model = CachedDecoder(decoder, num_slots=8, max_context_tokens=512, is_exact=True)
    stepped = torch.cat([model.logits(model.forward(step)[0]) for step in one_by_one])
    assert torch.equal(alone, stepped)
    long_company = [Span(1, 0, (prompts[1] * 20)[:500])]
    assert torch.equal(alone, logits_of([[Span(0, 0, prompt), *long_company]])[: len(prompt)])


def test_a_product_whose_order_depends_on_the_row_count_is_caught(target: Checkpoint, prompts: Prompts) -> None:
    model = CachedDecoder(arrange(target.config, target.weights), num_slots=2, max_context_tokens=512, is_exact=False)
    prompt = prompts[0][:60]
    whole = model.logits(model.forward([Span(0, 0, prompt)])[0])
    steps = [[Span(1, at, prompt[at : at + 3])] for at in range(0, len(prompt), 3)]
    assert not torch.equal(whole, torch.cat([model.logits(model.forward(step)[0]) for step in steps]))


def test_cached_logits_agree_with_the_causal_forward(target: Checkpoint, prompts: Prompts) -> None:
    model = CachedDecoder(arrange(target.config, target.weights), num_slots=2, max_context_tokens=512, is_exact=True)
    cached = model.logits(model.forward([Span(1, 0, prompts[3])])[0])
    causal = causal_logits(target.config, target.weights, torch.tensor([prompts[3]]))[0]
    assert (cached - causal).abs().max() < 1e-3


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_filtered_sample_does_not_depend_on_the_draft(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts, data: st.DataObject
) -> None:
    served = Served(
        temperature=data.draw(st.sampled_from([0.3, 0.8, 1.7])),
        top_k=data.draw(st.sampled_from([0, 1, 5, 50])),
        top_p=data.draw(st.sampled_from([0.1, 0.7, 1.0])),
        max_tokens=data.draw(st.integers(1, 12)),
        seed=data.draw(st.integers(0, 2**62)),
        limits=limits(running=3, draft_tokens=data.draw(st.integers(1, 6))),
    )
    few = [prompts[0], prompts[20], prompts[40]]
    plain = serve(target, few, served)
    served.draft = sibling
    assert serve(target, few, served).outputs == plain.outputs
