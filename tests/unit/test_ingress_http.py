"""The HTTP face over a scripted engine: golden bytes, errors, identity, headers, a client that leaves."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from services.target import ingress
from services.target.callers import Callers
from services.target.ingress import BYTES_BESIDE_THE_TEXT, MAX_BODY_BYTES
from slipstream.config import Tenant
from slipstream.errors import QueueFull
from tests.unit.ingress_service import HASHED, KEY, PROMPT_TEXT, Service


def normalised(text: str) -> str:
    return re.sub(r'"created":\d+', '"created":0', re.sub(r"(cmpl-)[0-9a-f]{32}", r"\1ID", text))


def event(body: str) -> str:
    return f"data: {body}\n\n"


CHAT_HEAD = '{"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"m","choices":'
TEXT_HEAD = '{"id":"cmpl-ID","object":"text_completion","created":0,"model":"m","choices":'


def test_a_chat_stream_has_these_bytes() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    response = Service().send("POST", "/v1/chat/completions", json=body)
    choices = [
        ('{"role":"assistant","content":""}', "null"),
        ('{"content":"SELECT"}', "null"),
        ('{"content":" a"}', "null"),
        ("{}", '"stop"'),
    ]
    expected = [
        event(f'{CHAT_HEAD}[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}]}}')
        for delta, reason in choices
    ]
    assert normalised(response.text) == "".join(expected) + "data: [DONE]\n\n"
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert len(set(re.findall(r'"id":"([^"]+)"', response.text))) == 1


def test_a_completion_stream_with_usage_has_these_bytes() -> None:
    response = Service().complete(stream=True, stream_options={"include_usage": True})
    choices = [('"SELECT"', "null"), ('" a"', "null"), ('""', '"stop"')]
    expected = [
        event(f'{TEXT_HEAD}[{{"index":0,"text":{text},"logprobs":null,"finish_reason":{reason}}}],"usage":null}}')
        for text, reason in choices
    ]
    num_output = len(PROMPT_TEXT.encode_plain("SELECT")) + len(PROMPT_TEXT.encode_plain(" a"))
    num_prompt = len(PROMPT_TEXT.encode_plain("hi"))
    usage = (
        f'{{"prompt_tokens":{num_prompt},"completion_tokens":{num_output},"total_tokens":{num_prompt + num_output}}}'
    )
    expected.append(event(f'{TEXT_HEAD}[],"usage":{usage}}}'))
    assert normalised(response.text) == "".join(expected) + "data: [DONE]\n\n"


def test_a_whole_answer_has_text_reason_and_counts() -> None:
    body = Service([("SELECT", None), (" a", "length")]).complete().json()
    assert body["choices"] == [{"index": 0, "text": "SELECT a", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


def test_a_stop_string_ends_the_answer_and_frees_the_slot() -> None:
    service = Service([("SELECT", None), (" a", None), (" FROM", None)])
    body = service.complete(stop="a").json()
    assert body["choices"][0]["text"] == "SELECT "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert service.runner.cancelled == [service.runner.requests[0].request_id]


def test_a_full_queue_is_429_in_openai_shape_with_retry_after() -> None:
    service = Service(refusal=QueueFull("64 requests wait, expected at most 64; retry later"))
    response = service.complete()
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["code"] == "queue_full"
    assert service.count(429) == 1


def test_unknown_model_path_and_method_name_themselves() -> None:
    service = Service()
    unknown = service.complete(model="gpt-5")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "'gpt-5', expected 'm'" in unknown.json()["error"]["message"]
    assert service.send("GET", "/v1/models/other").status_code == 404
    assert service.send("GET", "/nothing").status_code == 404
    assert service.send("DELETE", "/v1/models").status_code == 405


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 64}, "max_tokens is 64, expected at most 63: the context holds 64 tokens and prompt has 1"),
        ({"prompt": [5] * 64}, "prompt has 64 tokens, expected 1 to 63"),
        ({"prompt": [4096]}, "token id 4096, expected ids from 0 to 4095"),
    ],
)
def test_what_does_not_fit_the_target_is_refused_with_the_numbers(fields: dict[str, Any], message: str) -> None:
    response = Service().complete(**({"prompt": [5]} | fields))
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_chat_may_use_the_rest_of_the_context() -> None:
    service = Service()
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    service.send("POST", "/v1/chat/completions", json=body)
    request = service.runner.requests[0]
    assert request.sampling.max_tokens == 64 - len(request.prompt_ids)


def test_a_body_that_does_not_come_is_408_and_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "BODY_TIMEOUT_S", 0.01)
    service = Service()

    async def stalled() -> Any:
        yield b'{"model": '
        await asyncio.Event().wait()

    response = service.send("POST", "/v1/completions", content=stalled())
    assert response.status_code == 408
    assert "10 bytes of the body came within 0.01 seconds" in response.json()["error"]["message"]
    assert service.count(408) == 1


def test_a_body_that_no_text_of_the_context_needs_is_413() -> None:
    longest = 64 * PROMPT_TEXT.token_bytes.longest
    whole = json.dumps({"model": "m", "prompt": "\u00e9" * (longest // 2)})
    assert Service().send("POST", "/v1/completions", content=whole).status_code == 400  # two tokens a character
    too_long = b" " * (6 * longest + BYTES_BESIDE_THE_TEXT + 1)
    assert Service().send("POST", "/v1/completions", content=too_long).status_code == 413


def test_a_body_over_the_limit_is_413() -> None:
    service = Service()
    assert service.send("POST", "/v1/completions", content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413

    async def endless() -> Any:
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            yield b" " * 2**20

    assert service.send("POST", "/v1/completions", content=endless()).status_code == 413


def test_headers_reach_the_engine() -> None:
    service = Service()
    headers = {"X-Slipstream-Domain": "sql", "X-Slipstream-No-Train": "1", "X-Slipstream-Speculation": "off"}
    service.complete(headers=headers)
    service.complete()
    first, second = service.runner.requests
    assert (first.domain, first.may_train, first.speculate) == ("sql", False, False)
    assert (second.domain, second.may_train, second.speculate) == ("default", True, True)
    assert first.request_id != second.request_id
    assert first.sampling.seed != second.sampling.seed


@pytest.mark.parametrize(
    ("name", "value"),
    [("X-Slipstream-Domain", "No Spaces"), ("X-Slipstream-No-Train", "yes"), ("X-Slipstream-Speculation", "maybe")],
)
def test_a_malformed_header_is_refused_by_name(name: str, value: str) -> None:
    response = Service().complete(headers={name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"].lower() == name.lower()
    assert value in response.json()["error"]["message"]


def test_answers_carry_versions_and_a_request_id() -> None:
    response = Service().complete()
    assert response.headers["x-slipstream-draft-version"] == "7"
    assert response.headers["x-slipstream-routing-version"] == "0"
    assert len(response.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic " + KEY, "Bearer ", KEY])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/nothing"])
def test_everything_but_health_is_closed_without_a_key(path: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    response = Service(keys=True).send("GET", path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_a_key_opens_the_service_and_names_the_tenant() -> None:
    service = Service(keys=True)
    assert service.complete(headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert (service.runner.requests[0].tenant, service.runner.requests[0].may_train) == ("acme", True)
    assert {service.send("GET", path).status_code for path in ("/health", "/ready")} == {200}


def test_a_tenant_may_be_excluded_from_learning() -> None:
    tenants = {"shy": Tenant(key_sha256=HASHED, train=False)}
    caller = Callers(tenants).identify(f"Bearer {KEY}")
    assert caller is not None
    assert not caller.may_train


def test_ready_follows_the_engine_and_health_does_not() -> None:
    service = Service()
    service.runner.healthy = False
    assert service.send("GET", "/ready").status_code == 503
    assert service.send("GET", "/health").status_code == 200


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_all_its_samples(stream: bool, num_samples: int) -> None:
    service = Service([("SELECT", None)])  # a first block, and never an end
    body = json.dumps({"model": "m", "prompt": "hi", "stream": stream, "n": num_samples}).encode()
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not received:
            received.append(True)
            return {"type": "http.request", "body": body, "more_body": False}
        while not (left.is_set() if stream else len(service.runner.requests) == num_samples):
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if b"SELECT" in message.get("body", b""):
            left.set()

    async def call() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        await asyncio.wait_for(service.app(scope, receive, send), 10)  # type: ignore[arg-type]

    received: list[bool] = []
    asyncio.run(call())
    assert len(service.runner.requests) == num_samples
    assert service.runner.cancelled == [request.request_id for request in service.runner.requests]
    assert service.count(499) == 1
