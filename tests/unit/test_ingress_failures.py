"""Requests that fail on our side: what the caller reads, and what is counted."""

from __future__ import annotations

import json

import pytest

from services.target.prompt_text import PromptText
from services.target.text_stream import TokenBytes
from slipstream.engine.request import REPLICA_STOPPING
from slipstream.errors import EngineStopped
from tests.unit.ingress_service import TARGET, Service


def test_a_failure_within_a_stream_is_an_error_event_without_done() -> None:
    service = Service([("SELECT", None), ("the engine failed in this step", "error")])
    response = service.complete(stream=True)
    last = response.text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: ")) == {
        "error": {
            "message": "the engine failed in this step",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    assert "[DONE]" not in response.text
    assert (service.count(500), service.num_unexpected()) == (1, 0)


def test_a_failure_of_the_engine_is_a_500_with_its_reason() -> None:
    service = Service([("SELECT", None), ("the engine failed in this step", "error")])
    response = service.complete()
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the engine failed in this step"
    assert (service.count(500), service.num_unexpected()) == (1, 0)


def test_a_stopping_replica_is_503() -> None:
    response = Service(refusal=EngineStopped("stopping")).complete(stream=True)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")


def test_a_replica_that_stops_under_a_request_is_503_with_retry_after() -> None:
    service = Service([("SELECT", None), (REPLICA_STOPPING, "error")])
    response = service.complete()
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["code"] == "replica_stopping"
    assert (service.count(503), service.num_unexpected()) == (1, 0)


def test_a_replica_that_stops_under_a_stream_ends_it_with_its_own_error_event() -> None:
    service = Service([("SELECT", None), (REPLICA_STOPPING, "error")])
    response = service.complete(stream=True)
    last = response.text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_stopping"
    assert "[DONE]" not in response.text
    assert service.count(503) == 1


def test_an_unforeseen_failure_is_counted_and_hides_its_text(caplog: pytest.LogCaptureFixture) -> None:
    service = Service(refusal=KeyError("internal detail"))
    response = service.complete()
    assert response.status_code == 500
    assert "internal detail" not in response.text
    assert "internal detail" in caplog.text
    assert (service.count(500), service.num_unexpected()) == (1, 1)


class TornBytes(TokenBytes):
    """A vocabulary that fails on its first token."""

    def __init__(self) -> None:
        self.longest = 33

    def __getitem__(self, token_id: int) -> bytes:
        raise LookupError("internal detail")


def test_an_unforeseen_failure_within_a_stream_is_counted_and_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    prompt_text = PromptText(TARGET)
    prompt_text.token_bytes = TornBytes()
    service = Service(prompt_text=prompt_text)
    response = service.complete(stream=True)
    assert response.status_code == 200
    assert response.text.count("data: ") == 1
    assert json.loads(response.text.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "internal detail" not in response.text
    assert "internal detail" in caplog.text
    assert (service.count(500), service.num_unexpected()) == (1, 1)


def test_a_value_nested_to_any_depth_is_the_callers_error() -> None:
    service = Service()
    for depth in range(100, 1200):
        body = f'{{"model": "m", "prompt": "x", "temperature": {"[" * depth}{"]" * depth}}}'
        assert service.send("POST", "/v1/completions", content=body).status_code == 400
    assert service.num_unexpected() == 0
