"""Request bodies: what is accepted, and what a caller reads when it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.target.openai_requests import MIN_TEMPERATURE, ChatMessage, parse_chat, parse_completion
from slipstream.errors import RequestError


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hello"} | fields).encode()


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]} | fields).encode()


def test_defaults_are_those_of_the_openai_api() -> None:
    call = parse_completion(completion())
    assert (call.temperature, call.top_p, call.top_k, call.seed) == (1.0, 1.0, 0, None)
    assert (call.min_p, call.repetition_penalty, call.presence_penalty, call.frequency_penalty) == (0, 1, 0, 0)
    assert (call.logit_bias, call.num_samples, call.num_logprobs) == ((), 1, None)
    assert (call.max_tokens, call.stop, call.stream, call.include_usage) == (16, (), False, False)
    assert parse_chat(chat()).max_tokens is None


def test_null_means_default() -> None:
    names = "temperature top_p top_k min_p seed stop stream n best_of logprobs top_logprobs max_tokens logit_bias "
    fields = dict.fromkeys((names + "repetition_penalty presence_penalty frequency_penalty echo").split())
    assert parse_completion(completion(**fields)) == parse_completion(completion())


def test_unknown_fields_are_ignored() -> None:
    assert parse_completion(completion(verbosity="low", prompt_cache_key="x")) == parse_completion(completion())


def test_values_that_ask_for_nothing_unserved_are_accepted() -> None:
    harmless = {"logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}, "tools": [], "echo": False}
    assert parse_chat(chat(**harmless)) == parse_chat(chat())
    assert parse_completion(completion(**harmless)) == parse_completion(completion())


def test_what_shapes_the_distribution_is_read() -> None:
    bias = {"4095": -100, "7": 2.5}
    penalties = {"repetition_penalty": 1.25, "presence_penalty": -2, "frequency_penalty": 2}
    for call in (
        parse_completion(completion(min_p=0.5, logit_bias=bias, **penalties)),
        parse_chat(chat(min_p=0.5, logit_bias=bias, **penalties)),
    ):
        assert (call.min_p, call.logit_bias) == (0.5, ((7, 2.5), (4095, -100.0)))
        assert (call.repetition_penalty, call.presence_penalty, call.frequency_penalty) == (1.25, -2, 2)


def test_samples_are_counted_by_n_which_best_of_may_repeat() -> None:
    assert parse_completion(completion(n=16, best_of=16)).num_samples == 16
    assert parse_chat(chat(n=3)).num_samples == 3


@pytest.mark.parametrize("number", [0, 1, 20])
def test_log_probabilities_are_a_number_in_completions_and_a_switch_with_a_number_in_chats(number: int) -> None:
    assert parse_completion(completion(logprobs=number)).num_logprobs == number
    assert parse_chat(chat(logprobs=True, top_logprobs=number)).num_logprobs == number
    assert parse_chat(chat(logprobs=True)).num_logprobs == 0


@pytest.mark.parametrize("prompt", ["text", ["text"]])
def test_one_text_prompt_may_come_in_a_list(prompt: Any) -> None:
    assert parse_completion(completion(prompt=prompt)).prompt == "text"


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
def test_token_ids_are_a_prompt(prompt: Any) -> None:
    assert parse_completion(completion(prompt=prompt)).prompt == (1, 2, 3)


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = parse_chat(chat(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": parts}]))
    assert call.prompt == (ChatMessage("system", "s"), ChatMessage("user", "ab"))


def test_either_name_of_the_limit_is_read_and_a_contradiction_is_refused() -> None:
    assert parse_chat(chat(max_completion_tokens=5)).max_tokens == 5
    assert parse_chat(chat(max_tokens=5, max_completion_tokens=5)).max_tokens == 5
    with pytest.raises(RequestError, match="max_tokens is 4 and max_completion_tokens is 5"):
        parse_chat(chat(max_tokens=4, max_completion_tokens=5))


@pytest.mark.parametrize("temperature", [0, -0.0, 5e-324, 1e-310, 9.9e-5])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float) -> None:
    assert str(parse_completion(completion(temperature=temperature)).temperature) == "0.0"


def test_the_smallest_temperature_that_samples_is_kept() -> None:
    assert parse_completion(completion(temperature=MIN_TEMPERATURE)).temperature == MIN_TEMPERATURE == 1e-4


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": []}, "prompt", "prompt is empty"),
    ({"prompt": None}, "prompt", "prompt is missing"),
    ({"prompt": ["a", "b"]}, "prompt", "holds 2 prompts, expected one"),
    ({"prompt": 7}, "prompt", "prompt is 7, expected a string"),
    ({"prompt": [1, -2]}, "prompt", r"prompt is \[1,-2\]"),
    ({"prompt": [True]}, "prompt", r"prompt is \[true\]"),
    ({"model": None}, "model", "model is missing"),
    ({"model": 3}, "model", "model is 3, expected a string"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, expected an integer from 1 to 2147483647"),
    ({"max_tokens": -5}, "max_tokens", "max_tokens is -5"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5"),
    ({"max_tokens": "many"}, "max_tokens", 'max_tokens is "many"'),
    ({"max_tokens": True}, "max_tokens", "max_tokens is true"),
    ({"temperature": -0.1}, "temperature", "expected a number from 0 to 2"),
    ({"temperature": 2.1}, "temperature", "expected a number from 0 to 2"),
    ({"temperature": "hot"}, "temperature", 'temperature is "hot"'),
    ({"top_p": 0}, "top_p", "top_p is 0, expected a number above 0"),
    ({"top_p": 1.1}, "top_p", "top_p is 1.1"),
    ({"top_k": -1}, "top_k", "top_k is -1"),
    ({"top_k": 2**31}, "top_k", "top_k is 2147483648, expected an integer from 0 to 2147483647"),
    ({"top_k": 10**22}, "top_k", "top_k is 10000000000000000000000, expected an integer from 0 to 2147483647"),
    ({"top_k": 10**4000}, "top_k", r"top_k is 10+\.\.\., expected"),
    ({"seed": -1}, "seed", "seed is -1"),
    ({"seed": 2**63}, "seed", "seed is 9223372036854775808"),
    ({"seed": 10**4000}, "seed", r"seed is 10+\.\.\., expected"),
    ({"temperature": 10**4000}, "temperature", r"temperature is 10+\.\.\., expected"),
    ({"top_p": 10**4000}, "top_p", r"top_p is 10+\.\.\., expected"),
    ({"max_tokens": 10**4000}, "max_tokens", r"max_tokens is 10+\.\.\., expected"),
    ({"prompt": [10**4000]}, "prompt", r"prompt is \[10+\.\.\., expected"),
    ({"stop": ["a"] * 5}, "stop", "stop has 5 strings, expected at most 4"),
    ({"stop": [""]}, "stop", "0 characters"),
    ({"stop": 3}, "stop", "stop is 3"),
    ({"stream": "yes"}, "stream", 'stream is "yes", expected true or false'),
    ({"stream_options": {"include_usage": True}}, "stream_options", "without stream: true"),
    ({"n": 0}, "n", "n is 0, expected an integer from 1 to 16"),
    ({"n": 17}, "n", "n is 17, expected an integer from 1 to 16"),
    ({"n": 1.0}, "n", "n is 1.0, expected an integer"),
    ({"best_of": 3}, "best_of", "best_of is 3, expected 1 as n"),
    ({"n": 3, "best_of": 2}, "best_of", "best_of is 2, expected 3 as n"),
    ({"logprobs": -1}, "logprobs", "logprobs is -1, expected an integer from 0 to 20"),
    ({"logprobs": 21}, "logprobs", "logprobs is 21, expected an integer from 0 to 20"),
    ({"logprobs": True}, "logprobs", "logprobs is true, expected an integer from 0 to 20"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs is 2, which chats take"),
    ({"presence_penalty": 2.1}, "presence_penalty", "presence_penalty is 2.1, expected a number from -2 to 2"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "frequency_penalty is -2.1, expected a number from -2 to 2"),
    ({"frequency_penalty": "some"}, "frequency_penalty", 'frequency_penalty is "some"'),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0, expected a number from 0.0001 to 2"),
    ({"repetition_penalty": 2.1}, "repetition_penalty", "repetition_penalty is 2.1"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty", "repetition_penalty is 5e-324"),
    ({"min_p": -0.1}, "min_p", "min_p is -0.1, expected a number from 0 to 1"),
    ({"min_p": 1.1}, "min_p", "min_p is 1.1"),
    ({"logit_bias": [5]}, "logit_bias", r"logit_bias is \[5\], expected an object"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias of token 5 is 101, expected a number from -100 to 100"),
    ({"logit_bias": {"5": None}}, "logit_bias", "logit_bias of token 5 is null"),
    ({"logit_bias": {"5": True}}, "logit_bias", "logit_bias of token 5 is true"),
    ({"logit_bias": {"5": 10**4000}}, "logit_bias", r"logit_bias of token 5 is 10+\.\.\., expected"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", 'logit_bias has the key "-1", expected a token id in decimal digits'),
    ({"logit_bias": {"05": 1}}, "logit_bias", 'logit_bias has the key "05"'),
    ({"logit_bias": {"the": 1}}, "logit_bias", 'logit_bias has the key "the"'),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", r'logit_bias has the key "1+\.\.\., expected'),
    ({"logit_bias": {str(one): 1 for one in range(301)}}, "logit_bias", "301 entries, expected at most 300"),
    ({"echo": True}, "echo", "echo is true, which is not supported"),
    ({"suffix": "end"}, "suffix", 'suffix is "end", which is not supported'),
    ({"tools": [{}]}, "tools", "tools is"),
    ({"audio": {}}, "audio", "audio is {}, which is not supported; leave it out or send null"),
    ({"response_format": {"type": "json_object"}}, "response_format", "response_format is"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
def test_a_bad_completion_names_field_value_and_expectation(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        parse_completion(completion(**fields))
    assert raised.value.param == param


BAD_CHAT_LOGPROBS: list[tuple[dict[str, Any], str, str]] = [
    ({"logprobs": 5}, "logprobs", "logprobs is 5, expected true or false"),
    ({"top_logprobs": 5}, "top_logprobs", "top_logprobs is 5 without logprobs: true"),
    ({"logprobs": False, "top_logprobs": 5}, "top_logprobs", "top_logprobs is 5 without logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21, expected an integer from 0 to 20"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "top_logprobs is -1"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_CHAT_LOGPROBS, ids=lambda value: str(value)[:40])
def test_bad_log_probabilities_of_a_chat_are_refused_by_name(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        parse_chat(chat(**fields))
    assert raised.value.param == param


BAD_CHATS: list[tuple[Any, str, str]] = [
    ([], "messages", "expected a non-empty list"),
    (None, "messages", "messages is missing"),
    ("hi", "messages", 'messages is "hi"'),
    (["hi"], "messages[0]", r"messages\[0\] is \"hi\", expected an object"),
    ([{"role": "tool", "content": "x"}], "messages[0].role", 'role is "tool", expected one of'),
    ([{"role": "user"}], "messages[0].content", "content is null"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content", "expected a string or a list"),
    ([{"role": "user", "content": ""}], "messages", "every message is empty"),
]


@pytest.mark.parametrize(("messages", "param", "message"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_bad_messages_name_field_value_and_expectation(messages: Any, param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        parse_chat(chat(messages=messages))
    assert raised.value.param == param


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError, match="expected a JSON object"):
        parse_completion(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "stream",
        "n",
        "best_of",
        "logprobs",
        "top_logprobs",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "stream_options",
    ]
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(fields, json_values))
def test_any_json_is_parsed_or_refused_by_name(body: dict[str, Any]) -> None:
    for parse in (parse_completion, parse_chat):
        try:
            call = parse(json.dumps(body).encode())
        except RequestError as error:
            refused_field = error.param
            assert refused_field
        else:
            assert call.prompt
            assert 0 <= call.temperature <= 2
            assert 0 < call.top_p <= 1
            assert 0 < call.repetition_penalty <= 2
            assert 1 <= call.num_samples <= 16
