"""What callers ask for, over a real engine and target: choices, penalties, filters, stop strings, log-probabilities."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from httpx2 import ASGITransport

from services.target.callers import Callers
from services.target.ingress import Ingress, ServedModel
from slipstream.engine.engine import Engine
from slipstream.engine.runner import EngineRunner
from slipstream.engine.scheduler import EngineLimits
from slipstream.models.checkpoint import load_checkpoint
from slipstream.models.decoder import causal_logits
from slipstream.telemetry import ReplicaMetrics
from tests.servers import eventually
from tests.unit.ingress_service import PROMPT_TEXT, TARGET

PROMPT = "<|user|>Write SQL. What college team did Ryan Golden come from?<|assistant|>"
CHAT = [{"role": "user", "content": "Write SQL. What college team did Ryan Golden come from?"}]
ANSWER = 'SELECT COLLEGE FROM table WHERE PLAYER = "ryan golden"'


class Served:
    """A target served in this process, asked through the official client."""

    def __init__(self) -> None:
        target = load_checkpoint(TARGET)
        self.metrics = ReplicaMetrics()
        limits = EngineLimits(
            max_running_requests=8,
            max_queued_requests=4,
            max_step_tokens=256,
            max_context_tokens=256,
            num_draft_tokens=2,
            num_blocks=256,
        )
        engine = Engine(
            target,
            limits=limits,
            target_digest=target.digest,
            replica_id="replica-1",
            top_n=16,
            observe=lambda _: None,
            metrics=self.metrics,
            token_bytes=PROMPT_TEXT.token_bytes.__getitem__,
        )
        self.runner = EngineRunner(engine)
        self.runner.start()
        model = ServedModel(
            name="m",
            created=11,
            vocab_size=engine.vocab_size,
            max_context_tokens=engine.max_context_tokens,
            stop_token_ids=target.config.eos_token_ids,
        )
        self._app = Ingress(
            model, prompt_text=PROMPT_TEXT, runner=self.runner, metrics=self.metrics, callers=Callers(None)
        ).app()

    def complete(self, **fields: Any) -> Any:
        return asyncio.run(self._ask("completions", {"prompt": PROMPT, "max_tokens": 24} | fields))

    def chat(self, **fields: Any) -> Any:
        return asyncio.run(self._ask("chat.completions", {"messages": CHAT, "max_tokens": 24} | fields))

    async def _ask(self, resource: str, fields: dict[str, Any]) -> Any:
        """The answer, or the events of a streamed one; fields that the client does not know are sent as they are."""
        ours = {name: fields.pop(name) for name in ("min_p", "repetition_penalty", "top_k") if name in fields}
        http = openai.DefaultAsyncHttpxClient(transport=ASGITransport(self._app))
        async with openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="none", max_retries=0, http_client=http
        ) as client:
            create = (client.completions if resource == "completions" else client.chat.completions).create
            answer = await create(model="m", extra_body=ours, **fields)
            return [event async for event in answer] if fields.get("stream") else answer


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    service = Served()
    yield service
    service.runner.stop(30)


def texts(answer: Any) -> list[str]:
    return [choice.text for choice in answer.choices]


def test_three_samples_differ_and_the_first_is_what_one_sample_gives(served: Served) -> None:
    fields = {"temperature": 1.5, "seed": 5, "max_tokens": 16}
    three = served.complete(n=3, **fields)
    assert len(set(texts(three))) == 3
    assert texts(served.complete(**fields)) == texts(three)[:1]
    assert texts(served.complete(n=2, **fields)) == texts(three)[:2]


def test_greedy_samples_are_equal(served: Served) -> None:
    assert texts(served.complete(n=3, temperature=0)) == [ANSWER] * 3


def test_streamed_choices_are_the_whole_ones_in_parts(served: Served) -> None:
    fields: dict[str, Any] = {"n": 3, "temperature": 1.2, "seed": 3, "stop": [" WHERE"], "logprobs": 2}
    whole = served.complete(**fields)
    events = served.complete(**fields, stream=True, stream_options={"include_usage": True})
    assert events[-1].usage == whole.usage
    assert sum(len(choice.logprobs.tokens) for choice in whole.choices) == whole.usage.completion_tokens
    for choice in whole.choices:
        parts = [event.choices[0] for event in events if event.choices and event.choices[0].index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason
        reported = [part.logprobs.token_logprobs for part in parts if part.logprobs]
        # Bitwise with own kernels, but these tests also run without a compiler.
        assert [value for values in reported for value in values] == pytest.approx(
            choice.logprobs.token_logprobs, abs=1e-4
        )


def test_the_events_of_choices_interleave(served: Served) -> None:
    events = served.complete(n=2, temperature=0, stream=True)
    indices = [event.choices[0].index for event in events]
    assert indices.index(1) < len(indices) - 1 - indices[::-1].index(0)
    assert indices.index(0) < len(indices) - 1 - indices[::-1].index(1)


def raw_logprobs(prompt_ids: list[int], output_ids: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] at each output position, from the target's own causal forward pass."""
    target = load_checkpoint(TARGET)
    logits_BTV = causal_logits(target.config, target.weights, torch.tensor([[*prompt_ids, *output_ids]]))
    return logits_BTV[0, len(prompt_ids) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("shaping", [{}, {"temperature": 0.7, "top_k": 5, "presence_penalty": 1.0}])
def test_reported_values_are_those_of_the_unshaped_target(served: Served, shaping: dict[str, Any]) -> None:
    fields = {"temperature": 0, "seed": 4} | shaping
    answer = served.chat(logprobs=True, top_logprobs=5, **fields)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    prompt_ids = list(PROMPT_TEXT.encode_raw(PROMPT))
    output_ids = [token_of(entry) for entry in content]
    expected_TV = raw_logprobs(prompt_ids, output_ids)
    seen = torch.tensor([entry.logprob for entry in content])
    torch.testing.assert_close(seen, expected_TV[range(len(content)), output_ids], atol=1e-3, rtol=0)
    top = torch.tensor([[other.logprob for other in entry.top_logprobs] for entry in content])
    torch.testing.assert_close(top, expected_TV.topk(5).values, atol=1e-3, rtol=0)


def token_of(entry: Any) -> int:
    if entry.bytes is None:
        (token_id,) = PROMPT_TEXT.encode_raw(entry.token)
        return token_id
    exact = bytes(entry.bytes)
    (token_id,) = [one for one in range(4096) if PROMPT_TEXT.token_bytes[one] == exact]
    return token_id


def test_the_bytes_of_a_chats_tokens_are_its_text(served: Served) -> None:
    choice = served.chat(temperature=0, logprobs=True).choices[0]
    joined = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert joined.decode() == choice.message.content == ANSWER
    assert all(entry.top_logprobs == [] for entry in choice.logprobs.content)


def test_a_completions_offsets_find_its_tokens_in_the_text(served: Served) -> None:
    choice = served.complete(temperature=0, logprobs=0).choices[0]
    report = choice.logprobs
    for token, offset in zip(report.tokens[:-1], report.text_offset[:-1], strict=True):
        assert choice.text[offset:].startswith(token)
    assert report.tokens[-1] == "<|endoftext|>"


SHAPINGS: list[dict[str, Any]] = [
    {"presence_penalty": 2.0},
    {"frequency_penalty": 2.0},
    {"repetition_penalty": 2.0},
    {"min_p": 0.9},
    {"logit_bias": {str(PROMPT_TEXT.encode_raw("def")[0]): -100}},
]


@pytest.mark.parametrize("shaping", SHAPINGS, ids=lambda shaping: next(iter(shaping)))
def test_what_shapes_the_distribution_changes_the_answer_and_the_seed_repeats_it(
    served: Served, shaping: dict[str, Any]
) -> None:
    fields = {"temperature": 1.0, "seed": 11, "max_tokens": 48, "prompt": "<|user|>Write SQL. Count.<|assistant|>"}
    shaped = texts(served.complete(**fields, **shaping))
    assert shaped != texts(served.complete(**fields))
    assert shaped == texts(served.complete(**fields, **shaping))


def test_a_bias_of_minus_100_bans_a_token_and_of_100_forces_it(served: Served) -> None:
    (banned,) = PROMPT_TEXT.encode_raw(" FROM")
    assert " FROM" not in served.complete(temperature=0, logit_bias={str(banned): -100}).choices[0].text
    forced = served.complete(temperature=0, logit_bias={str(banned): 100}, max_tokens=4, logprobs=0).choices[0]
    assert forced.text == " FROM" * 4
    assert all(-math.inf < value < -1 for value in forced.logprobs.token_logprobs[:1])


def test_a_stop_string_ends_the_request_in_the_engine(served: Served) -> None:
    answer = served.complete(temperature=0, stop=[" WHERE"], logprobs=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("SELECT COLLEGE FROM table", "stop")
    assert "".join(choice.logprobs.tokens) == "SELECT COLLEGE FROM table WHERE"
    assert answer.usage.completion_tokens == len(choice.logprobs.tokens)


def test_samples_beyond_the_queue_are_refused_together_and_leave_no_place_taken(served: Served) -> None:
    with pytest.raises(openai.RateLimitError) as raised:
        served.complete(n=13, max_tokens=200)
    assert raised.value.code == "queue_full"
    eventually(lambda: served.runner.num_running + served.runner.num_waiting == 0)
    assert texts(served.complete(n=12, temperature=0)) == [ANSWER] * 12
