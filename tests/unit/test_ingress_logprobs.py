"""Log-probabilities in OpenAI's shapes, over a scripted engine whose values are known."""

from __future__ import annotations

from typing import Any

import pytest

from services.target.openai_logprobs import MIN_LOGPROB
from tests.unit.ingress_service import PROMPT_TEXT, Script, Service
from tests.unit.test_ingress_choices import events, of_choice

SELECT = PROMPT_TEXT.encode_raw("SELECT")
EMOJI = PROMPT_TEXT.encode_raw("🙂")
END = "<|endoftext|>"


def logprobs_of(token_ids: tuple[int, ...]) -> list[float]:
    """What the scripted engine reports."""
    return [-token_id / 1024 for token_id in token_ids]


def spelled(token_ids: tuple[int, ...]) -> list[str]:
    return [PROMPT_TEXT.token_bytes[token_id].decode("utf-8", "replace") for token_id in token_ids]


def test_a_completion_reports_tokens_values_alternatives_and_offsets() -> None:
    script: Script = (("SELECT", None), (f" a{END}", "stop"))
    choice = Service(script).complete(logprobs=2).json()["choices"][0]
    (letter,) = PROMPT_TEXT.encode_raw(" a")
    ids = (*SELECT, letter, 0)
    texts = [*spelled(SELECT), " a", END]
    assert choice["logprobs"] == {
        "tokens": texts,
        "token_logprobs": logprobs_of(ids),
        "top_logprobs": [
            # The end token is impossible as an alternative and certain where it was emitted; the first value stands.
            {"x": -0.125, END: MIN_LOGPROB} | ({} if text == END else {text: value})
            for text, value in zip(texts, logprobs_of(ids), strict=True)
        ],
        "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
    }
    assert choice["text"] == "SELECT a"


def test_a_chat_reports_entries_with_exact_bytes() -> None:
    choice = Service([("🙂", None), (END, "stop")]).chat(logprobs=True, top_logprobs=2).json()["choices"][0]
    top = [
        {"token": "x", "logprob": -0.125, "bytes": [120]},
        {"token": END, "logprob": MIN_LOGPROB, "bytes": None},
    ]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [*spelled(EMOJI), END]
    assert [entry["logprob"] for entry in content] == logprobs_of((*EMOJI, 0))
    assert [entry["top_logprobs"] for entry in content] == [top] * len(content)
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == "🙂"
    assert content[-1]["bytes"] is None
    assert choice["logprobs"]["refusal"] is None


def test_what_did_not_ask_gets_null() -> None:
    assert Service().complete().json()["choices"][0]["logprobs"] is None
    assert Service().chat().json()["choices"][0]["logprobs"] is None


def test_a_character_in_parts_is_reported_part_by_part_before_its_text() -> None:
    assert len(EMOJI) > 1
    service = Service([("SELECT", None), *(((one,), None) for one in EMOJI), (END, "stop")])
    *parts, last, end = of_choice(events(service.complete(logprobs=0, stream=True).text), 0)
    emoji = parts[-len(EMOJI) :]
    assert [part["text"] for part in emoji] == [""] * (len(EMOJI) - 1) + ["🙂"]
    assert [part["logprobs"]["token_logprobs"] for part in emoji] == [[value] for value in logprobs_of(EMOJI)]
    assert {offset for part in emoji for offset in part["logprobs"]["text_offset"]} == {len("SELECT")}
    assert (last["text"], last["logprobs"]["tokens"]) == ("", [END])
    assert (end["logprobs"], end["finish_reason"]) == (None, "stop")


def test_tokens_are_reported_while_their_text_may_be_a_stop_string() -> None:
    ids = PROMPT_TEXT.encode_raw(" FROM")
    service = Service([("SELECT", None), (" FROM", None), (" a", "length")])
    parts = of_choice(events(service.complete(logprobs=0, stop=" FROM b", stream=True).text), 0)
    assert [part["text"] for part in parts] == ["SELECT", "", " FROM a", ""]
    assert parts[1]["logprobs"]["token_logprobs"] == logprobs_of(ids)


def test_what_follows_a_stop_string_in_its_block_is_not_reported() -> None:
    service = Service([("SELECT a FROM b WHERE c", "length")])
    body = service.complete(logprobs=1, stop=" FROM").json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("SELECT a", "stop")
    assert "".join(choice["logprobs"]["tokens"]) == "SELECT a FROM"
    assert len(choice["logprobs"]["tokens"]) == body["usage"]["completion_tokens"]


SCRIPTS: tuple[Script, ...] = (
    (("SELECT 🙂 a", None), (" FROM b", None), (f" c{END}", "stop")),
    (("def f", None), ("(x)", "length")),
)


@pytest.mark.parametrize("index", [0, 1])
def test_the_streamed_completion_is_the_whole_one_in_parts(index: int) -> None:
    fields: dict[str, Any] = {"n": 2, "logprobs": 3, "stop": [" FROM x"]}
    whole = Service(*SCRIPTS).complete(**fields).json()["choices"][index]
    parts = of_choice(events(Service(*SCRIPTS).complete(**fields, stream=True).text), index)
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
    reports = [part["logprobs"] for part in parts if part["logprobs"]]
    assert {field: [one for report in reports for one in report[field]] for field in whole["logprobs"]} == whole[
        "logprobs"
    ]


@pytest.mark.parametrize("index", [0, 1])
def test_the_streamed_chat_is_the_whole_one_in_parts(index: int) -> None:
    fields: dict[str, Any] = {"n": 2, "logprobs": True, "top_logprobs": 3, "stop": [" FROM x"]}
    whole = Service(*SCRIPTS).chat(**fields).json()["choices"][index]
    parts = of_choice(events(Service(*SCRIPTS).chat(**fields, stream=True).text), index)
    assert "".join(part["delta"].get("content", "") for part in parts) == whole["message"]["content"]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
    reported = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
    assert reported == whole["logprobs"]["content"]
