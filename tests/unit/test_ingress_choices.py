"""Several choices of one call over a scripted engine: order, counts, refusals, failures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from services.target.prompt_text import PromptText
from slipstream.engine.request import FinishReason
from slipstream.errors import QueueFull
from tests.unit.ingress_service import PROMPT_TEXT, TARGET, Service

SCRIPTS: tuple[Sequence[tuple[str, FinishReason | None]], ...] = (
    (("SELECT", None), (" a", "stop")),
    (("SELECT", "length"),),
    (("def", None), (" f", None), ("(x)", "stop")),
)
TEXTS = ["SELECT a", "SELECT", "def f(x)"]
REASONS = ["stop", "length", "stop"]
NUM_TOKENS = sum(len(PROMPT_TEXT.encode_raw(text)) for script in SCRIPTS for text, _ in script)


def events(text: str) -> list[Any]:
    """The JSON of every event of a stream that ended well."""
    *parts, end = [part.removeprefix("data: ") for part in text.split("\n\n")[:-1]]
    assert end == "[DONE]"
    return [json.loads(part) for part in parts]


def of_choice(stream: list[Any], index: int) -> list[Any]:
    return [choice for event in stream for choice in event["choices"] if choice["index"] == index]


def test_choices_come_by_index_with_their_own_text_and_reason() -> None:
    body = Service(*SCRIPTS).complete(n=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in body["choices"]] == TEXTS
    assert [choice["finish_reason"] for choice in body["choices"]] == REASONS


def test_usage_counts_the_prompt_once_and_the_tokens_of_all_choices() -> None:
    num_prompt = len(PROMPT_TEXT.encode_raw("hi"))
    usage = Service(*SCRIPTS).complete(n=3).json()["usage"]
    assert usage == {
        "prompt_tokens": num_prompt,
        "completion_tokens": NUM_TOKENS,
        "total_tokens": num_prompt + NUM_TOKENS,
    }
    streamed = Service(*SCRIPTS).complete(n=3, stream=True, stream_options={"include_usage": True})
    assert events(streamed.text)[-1]["usage"] == usage


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_choice_of_a_chat_stream_has_its_role_its_texts_and_its_end(index: int) -> None:
    stream = events(Service(*SCRIPTS).chat(n=3, stream=True).text)
    role, *texts, end = of_choice(stream, index)
    assert role["delta"] == {"role": "assistant", "content": ""}
    assert [text["delta"]["content"] for text in texts] == [text for text, _ in SCRIPTS[index]]
    assert (end["delta"], end["finish_reason"]) == ({}, REASONS[index])
    assert {text["finish_reason"] for text in texts} == {None}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_choice_of_a_completion_stream_has_its_texts_and_its_end(index: int) -> None:
    stream = events(Service(*SCRIPTS).complete(n=3, stream=True).text)
    *texts, end = of_choice(stream, index)
    assert "".join(text["text"] for text in texts) == TEXTS[index]
    assert (end["text"], end["finish_reason"]) == ("", REASONS[index])


def test_samples_differ_in_sample_index_and_id_alone() -> None:
    service = Service()
    service.complete(n=3, temperature=0.7)
    first, *others = service.runner.requests
    for index, other in enumerate(others, start=1):
        assert (other.sampling.sample_index, other.sampling.seed) == (index, first.sampling.seed)
        sampling = msgspec.structs.replace(other.sampling, sample_index=0)
        assert msgspec.structs.replace(other, request_id=first.request_id, sampling=sampling) == first
    stem = first.request_id.removesuffix("#0")
    assert [request.request_id for request in service.runner.requests] == [f"{stem}#{index}" for index in range(3)]


def test_what_shapes_the_distribution_reaches_the_engine() -> None:
    service = Service()
    fields = {"min_p": 0.25, "repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.75}
    service.chat(**fields, logit_bias={"9": 3, "4095": -100}, stop=["x", "yz"], logprobs=True, top_logprobs=4)
    (request,) = service.runner.requests
    assert fields == {name: getattr(request.sampling, name) for name in fields}
    assert request.sampling.logit_bias == ((9, 3.0), (4095, -100.0))
    assert request.sampling.stop_strings == ("x", "yz")
    assert request.num_logprobs == 4


def test_a_bias_beyond_the_vocabulary_is_refused_by_name() -> None:
    response = Service().complete(logit_bias={"5": 1, "4096": 1})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "logit_bias")
    assert "logit_bias has token id 4096, expected ids from 0 to 4095" in response.json()["error"]["message"]


class CountingText(PromptText):
    """Counts how often a prompt is tokenized."""

    def __init__(self) -> None:
        super().__init__(TARGET)
        self.num_prompts = 0

    def encode_raw(self, prompt: str) -> tuple[int, ...]:
        self.num_prompts += 1
        return super().encode_raw(prompt)


def test_the_prompt_of_several_samples_is_tokenized_once() -> None:
    text = CountingText()
    service = Service(prompt_text=text)
    service.complete(n=5)
    assert (len(service.runner.requests), text.num_prompts) == (5, 1)


def test_samples_that_do_not_all_fit_the_queue_are_all_refused() -> None:
    service = Service(refusal=QueueFull("64 requests wait, expected at most 64; retry later"), num_accepted=2)
    response = service.complete(n=4, stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert len(service.runner.requests) == 2
    assert sorted(service.runner.cancelled) == sorted(request.request_id for request in service.runner.requests)


@pytest.mark.parametrize("stream", [False, True])
def test_a_sample_that_fails_ends_the_call_and_frees_the_other_slots(stream: bool) -> None:
    service = Service([("SELECT", None)], [("the engine failed in this step", "error")], [("def", None)])
    response = service.complete(n=3, stream=stream)
    assert "the engine failed in this step" in response.text
    assert "[DONE]" not in response.text
    ids = [request.request_id for request in service.runner.requests]
    assert service.runner.cancelled == [ids[0], ids[2]]


def test_a_stop_string_ends_its_own_choice_and_frees_that_slot_alone() -> None:
    service = Service([("SELECT", None), (" a", None), (" FROM", None)], [("def", None), (" f", "stop")])
    body = service.complete(n=2, stop=" a").json()
    assert [choice["text"] for choice in body["choices"]] == ["SELECT", "def f"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "stop"]
    assert service.runner.cancelled == [service.runner.requests[0].request_id]
