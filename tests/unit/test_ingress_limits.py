"""How much text one request may bring, and where the work on it is done."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from services.target.prompt_text import PromptText
from tests.unit.ingress_service import TARGET, Service


class WatchedText(PromptText):
    """Notes which thread tokenizes what."""

    def __init__(self) -> None:
        super().__init__(TARGET)
        self.threads: list[threading.Thread] = []

    def encode_raw(self, prompt: str) -> tuple[int, ...]:
        self.threads.append(threading.current_thread())
        return super().encode_raw(prompt)


TOO_LONG = [
    ("completions", {"prompt": "é" * 1057}, "prompt has 2114 bytes, expected at most 2112: the context holds 64"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "é" * 528}, {"role": "user", "content": "x" * 1057}]},
        "messages has 2113 bytes, expected at most 2112",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x"}] * 65},
        "messages has 65 entries, expected at most 64",
    ),
]


@pytest.mark.parametrize(("path", "fields", "message"), TOO_LONG, ids=["prompt", "messages", "number of messages"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    path: str, fields: dict[str, Any], message: str
) -> None:
    text = WatchedText()
    response = Service(prompt_text=text).send("POST", f"/v1/{path}", json={"model": "m"} | fields)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert not text.threads


@pytest.mark.parametrize(("num_characters", "is_on_the_loop"), [(4096, True), (4097, False)])
def test_a_long_text_is_tokenized_beside_the_event_loop(num_characters: int, is_on_the_loop: bool) -> None:
    text = WatchedText()
    response = Service(prompt_text=text, max_context_tokens=4200).complete(prompt="x" * num_characters)
    assert response.status_code == 200
    assert [thread is threading.current_thread() for thread in text.threads] == [is_on_the_loop]
