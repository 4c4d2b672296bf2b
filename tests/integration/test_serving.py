"""The official OpenAI client against the running service."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from slipstream.models.checkpoint import load_checkpoint, target_digest
from slipstream.records import Observation, decode_observation
from slipstream.stores.redis import RedisLog, RedisPointers
from slipstream.versions import DEFAULT_DOMAIN, ServingPointer
from tests.integration.conftest import KEY, PRIVATE_KEY, Serving
from tests.integration.serving_process import MODEL, ROOT
from tests.servers import eventually

pytestmark = pytest.mark.processes

QUESTION = "Write SQL. What college team did Ryan Golden come from?"
PROMPT = f"<|user|>{QUESTION}<|assistant|>"
ANSWER = 'SELECT COLLEGE FROM table WHERE PLAYER = "ryan golden"'
LEFT = 'slipstream_requests_total{code="499"}'
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


def complete(serving: Serving, **fields: Any) -> Any:
    defaults: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    return serving.client.completions.create(**(defaults | fields))


def metric(serving: Serving, name: str) -> float:
    text = httpx.get(f"{serving.service.url}/metrics", headers=AUTHORIZED, timeout=30).text
    lines = (line.rpartition(" ") for line in text.splitlines())
    return sum(float(value) for series, _, value in lines if series == name or series.startswith(name + "{"))


def is_idle(serving: Serving) -> bool:
    return metric(serving, "slipstream_requests_running") + metric(serving, "slipstream_requests_waiting") == 0


def test_the_client_lists_and_finds_the_model(serving: Serving) -> None:
    assert [model.id for model in serving.client.models.list()] == [MODEL]
    assert serving.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        serving.client.models.retrieve("another")


def test_the_client_completes_with_the_models_own_answer(serving: Serving) -> None:
    answer = complete(serving)
    assert answer.choices[0].text == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_equals_the_raw_prompt(serving: Serving) -> None:
    answer = serving.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    assert answer.choices[0].message.content == ANSWER


def test_a_stream_is_the_whole_answer_in_parts(serving: Serving) -> None:
    chunks = list(complete(serving, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == ANSWER
    assert len(chunks) > 4
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage.completion_tokens == complete(serving).usage.completion_tokens


def test_a_chat_stream_begins_with_the_role(serving: Serving) -> None:
    chunks = list(
        serving.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer_and_no_seed_does_not(serving: Serving) -> None:
    fields = {"temperature": 1.5, "max_tokens": 30, "prompt": "<|user|>Write Python. Sort a list.<|assistant|>"}
    seeded = [complete(serving, seed=5, **fields).choices[0].text for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert complete(serving, **fields).choices[0].text != complete(serving, **fields).choices[0].text


def test_a_stop_string_cuts_the_answer(serving: Serving) -> None:
    answer = complete(serving, stop=[" WHERE"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("SELECT COLLEGE FROM table", "stop")


def test_the_limit_cuts_the_answer(serving: Serving) -> None:
    answer = complete(serving, max_tokens=3)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_speculation_off_gives_the_same_text(serving: Serving) -> None:
    answer = complete(serving, extra_headers={"X-Slipstream-Speculation": "off"})
    assert answer.choices[0].text == ANSWER


def test_a_wrong_key_is_turned_away(serving: Serving) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        serving.client_with("wrong").models.list()
    assert raised.value.code == "invalid_api_key"


BAD_INPUT: list[tuple[str, dict[str, Any], int, str]] = [
    ("unknown model", {"model": "gpt-5"}, 404, f"model is 'gpt-5', expected '{MODEL}'"),
    ("empty prompt", {"prompt": ""}, 400, "prompt is empty, expected text or token ids"),
    ("negative max_tokens", {"max_tokens": -1}, 400, "max_tokens is -1, expected an integer from 1 to 2147483647"),
    ("huge max_tokens", {"max_tokens": 10**9}, 400, "max_tokens is 1000000000, expected at most 1004"),
    ("prompt over the context", {"prompt": [5] * 2000}, 400, "prompt has 2000 tokens, expected 1 to 1023"),
    ("wrong type", {"temperature": "hot"}, 400, 'temperature is "hot", expected a number from 0 to 2'),
    ("unserved field", {"echo": True}, 400, "echo is true, which is not supported"),
    ("bad domain", {"extra_headers": {"X-Slipstream-Domain": "A B"}}, 400, "X-Slipstream-Domain is 'A B'"),
]


@pytest.mark.parametrize(
    ("fields", "status", "message"), [row[1:] for row in BAD_INPUT], ids=[row[0] for row in BAD_INPUT]
)
def test_bad_input_is_explained(serving: Serving, fields: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        complete(serving, **fields)
    assert raised.value.status_code == status
    assert message in str(raised.value)


def test_broken_json_is_explained(serving: Serving) -> None:
    response = httpx.post(f"{serving.service.url}/v1/completions", content=b'{"model":', headers=AUTHORIZED, timeout=30)
    assert response.status_code == 400
    assert "expected a JSON object" in response.json()["error"]["message"]


LONG: dict[str, Any] = {"model": MODEL, "prompt": "def", "max_tokens": 1000, "temperature": 2, "seed": 6}
"""Under this seed the target does not end before the limit."""


def test_a_full_queue_is_429_with_retry_after_until_a_slot_is_free(serving: Serving) -> None:
    eventually(lambda: is_idle(serving))
    streams = [serving.client.completions.create(**LONG, stream=True) for _ in range(8)]
    with pytest.raises(openai.RateLimitError) as raised:
        complete(serving)
    assert int(raised.value.response.headers["retry-after"]) > 0
    assert raised.value.code == "queue_full"
    for stream in streams:
        stream.close()
    eventually(lambda: is_idle(serving))
    assert complete(serving).choices[0].text == ANSWER


def leave_a_stream(serving: Serving, body: dict[str, Any]) -> None:
    with serving.client.completions.create(**body, stream=True) as stream:
        next(iter(stream))


def leave_a_whole_answer(serving: Serving, body: dict[str, Any]) -> None:
    """Send the request on a socket of its own and hang up while it runs."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", serving.service.port)) as connection:
        connection.sendall(head.encode() + data)
        eventually(lambda: metric(serving, "slipstream_requests_running") == 1)


@pytest.mark.parametrize("leave", [leave_a_stream, leave_a_whole_answer], ids=["streamed", "whole"])
def test_a_client_that_leaves_frees_its_slot(
    serving: Serving, leave: Callable[[Serving, dict[str, Any]], None]
) -> None:
    eventually(lambda: is_idle(serving))
    left = metric(serving, LEFT)
    tokens = metric(serving, "slipstream_generation_tokens_total")
    leave(serving, LONG)
    eventually(lambda: is_idle(serving) and metric(serving, LEFT) > left)
    assert metric(serving, LEFT) == left + 1
    assert metric(serving, "slipstream_generation_tokens_total") - tokens < 900


def observations(serving: Serving, until: Callable[[Observation], bool]) -> list[Observation]:
    """Everything in the log, read until an observation satisfies `until`."""
    found: list[Observation] = []
    subscription = RedisLog(serving.valkey_url).subscribe(f"test-{time.monotonic_ns()}")

    def has_come() -> bool:
        entries = subscription.poll(max_records=100, timeout_s=0.2)
        found.extend(decode_observation(entry.record) for entry in entries)
        return any(map(until, found))

    eventually(has_come)
    return found


def test_observations_carry_tenant_and_domain_and_no_train_leaves_none(serving: Serving) -> None:
    private = serving.client_with(PRIVATE_KEY)
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4}
    serving.client.completions.create(
        **body, extra_headers={"X-Slipstream-Domain": "secret", "X-Slipstream-No-Train": "1"}
    )
    private.completions.create(**body, extra_headers={"X-Slipstream-Domain": "secret"})
    serving.client.completions.create(**body, extra_headers={"X-Slipstream-Domain": "sql"})
    found = observations(serving, lambda one: one.domain == "sql")
    assert {one.tenant for one in found} == {"acme"}
    assert "secret" not in {one.domain for one in found}


def test_a_moved_pointer_changes_the_version_and_not_the_answer(serving: Serving) -> None:
    before = complete(serving)
    source = ROOT / "deploy" / "models" / "draft-2m-sibling"
    artifact = serving.state_dir / "artifacts" / "draft" / "1"
    artifact.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, artifact)
    pointers = RedisPointers(serving.valkey_url)
    pointer = ServingPointer(
        role="draft",
        domain=DEFAULT_DOMAIN,
        version=1,
        artifact_uri=artifact.as_uri(),
        digest=load_checkpoint(artifact).digest,
        target_digest=target_digest(ROOT / "deploy" / "models" / MODEL),
        generation=1,
        fencing_token=pointers.issue_fencing_token(),
        reason="test",
        set_at=time.time(),
    )
    pointers.advance(pointer, expected_generation=0)

    def version() -> str:
        return serving.client.completions.with_raw_response.create(model=MODEL, prompt="x", max_tokens=1).headers[
            "x-slipstream-draft-version"
        ]

    eventually(lambda: version() == "1")
    assert complete(serving).choices[0].text == before.choices[0].text
    assert metric(serving, "slipstream_accepted_tokens_total") > 0


def test_answers_carry_one_request_id_and_malformed_ones_are_replaced(serving: Serving) -> None:
    def ids(incoming: str) -> list[str]:
        headers = AUTHORIZED | {"x-request-id": incoming}
        return httpx.get(f"{serving.service.url}/v1/models", headers=headers, timeout=30).headers.get_list(
            "x-request-id"
        )

    assert ids("my-id.7") == ["my-id.7"]
    (replaced,) = ids("no spaces allowed")
    assert replaced != "no spaces allowed"


def test_health_and_ready_are_public_and_metrics_are_not(serving: Serving) -> None:
    for path in ("/health", "/ready"):
        assert httpx.get(serving.service.url + path, timeout=30).status_code == 200
    assert httpx.get(f"{serving.service.url}/metrics", timeout=30).status_code == 401
