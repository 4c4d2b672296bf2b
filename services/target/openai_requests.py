"""What callers may ask: the OpenAI request bodies, checked field by field.

Unknown fields are ignored, because clients add new ones all the time. A field that is known and not served here is
refused when its value would change the answer, naming the field: a silent difference is worse than an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import msgspec

from slipstream.errors import RequestError

Kind = Literal["completion", "chat"]

MAX_STOP_STRINGS: Final = 4
MAX_STOP_CHARACTERS: Final = 256
DEFAULT_COMPLETION_TOKENS: Final = 16
MAX_SAMPLES: Final = 16
MAX_LOGPROBS: Final = 20
MAX_LOGIT_BIASES: Final = 300
MAX_INTEGER: Final = 2**31 - 1
"""Of counts and token ids; what the model has room for is checked later."""

MIN_TEMPERATURE: Final = 1e-4
"""What is below it is taken as 0: sampling is as good as greedy there, and logits divided by it may overflow."""

MIN_REPETITION_PENALTY: Final = 1e-4
"""Logits are divided by it: what is smaller may overflow them."""

ROLES: Final = ("system", "developer", "user", "assistant")

_HARMLESS: Final[Mapping[str, tuple[Any, ...]]] = {
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
}
"""Known fields that are not served, with the values (besides null) that ask for nothing."""


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of a conversation; `role` is one of ROLES."""

    role: str
    content: str


class GenerationCall(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request body.

    `prompt` is text, token ids or messages (a chat). `max_tokens` None means: the rest of the context. `temperature` is
    0 (greedy) or at least MIN_TEMPERATURE. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filters off; penalties are
    neutral at `repetition_penalty` 1 and 0 for the others. `logit_bias` holds (token id, bias), ids ascending. `seed`
    None asks for a random one. `num_samples` is the number of choices of the answer. `num_logprobs` None asks for no
    log-probabilities, N for those of the emitted tokens and of the N most likely ones.
    """

    kind: Kind
    model: str
    prompt: str | tuple[int, ...] | tuple[ChatMessage, ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int | None
    stop: tuple[str, ...]
    num_samples: int
    num_logprobs: int | None
    stream: bool
    include_usage: bool


def parse_completion(data: bytes) -> GenerationCall:
    """The body of `POST /v1/completions`; raises RequestError naming the field, value seen and value expected."""
    body = _json_object(data)
    max_tokens = _integer(body, "max_tokens", low=1, high=MAX_INTEGER)
    return _call(body, kind="completion", prompt=_prompt(body), max_tokens=max_tokens or DEFAULT_COMPLETION_TOKENS)


def parse_chat(data: bytes) -> GenerationCall:
    """The body of `POST /v1/chat/completions`; raises RequestError like `parse_completion`."""
    body = _json_object(data)
    old = _integer(body, "max_tokens", low=1, high=MAX_INTEGER)
    new = _integer(body, "max_completion_tokens", low=1, high=MAX_INTEGER)
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens is {old} and max_completion_tokens is {new}: expected one of them, or the same value",
            param="max_completion_tokens",
        )
    return _call(body, kind="chat", prompt=_messages(body), max_tokens=old if new is None else new)


def _call(
    body: Mapping[str, Any],
    *,
    kind: Kind,
    prompt: str | tuple[int, ...] | tuple[ChatMessage, ...],
    max_tokens: int | None,
) -> GenerationCall:
    _refuse_unserved(body)
    model = _typed(body, "model", str, "a string")
    if model is None:
        raise RequestError("model is missing, expected the name that GET /v1/models lists", param="model")
    seed = _integer(body, "seed", low=0, high=2**63 - 1)
    stream = bool(_typed(body, "stream", bool, "true or false"))
    return GenerationCall(
        kind=kind,
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=_temperature(body),
        top_p=_top_p(body),
        top_k=_integer(body, "top_k", low=0, high=MAX_INTEGER) or 0,
        min_p=_number(body, "min_p", low=0.0, high=1.0) or 0.0,
        repetition_penalty=_number(body, "repetition_penalty", low=MIN_REPETITION_PENALTY, high=2.0) or 1.0,
        presence_penalty=_number(body, "presence_penalty", low=-2.0, high=2.0) or 0.0,
        frequency_penalty=_number(body, "frequency_penalty", low=-2.0, high=2.0) or 0.0,
        logit_bias=_logit_bias(body),
        seed=seed,
        stop=_stop(body),
        num_samples=_num_samples(body),
        num_logprobs=_num_logprobs_of_chat(body) if kind == "chat" else _num_logprobs_of_completion(body),
        stream=stream,
        include_usage=_include_usage(body, stream=stream),
    )


def _temperature(body: Mapping[str, Any]) -> float:
    temperature = _number(body, "temperature", low=0.0, high=2.0)
    if temperature is None:
        return 1.0
    return 0.0 if temperature < MIN_TEMPERATURE else temperature


def _top_p(body: Mapping[str, Any]) -> float:
    top_p = _number(body, "top_p", low=0.0, high=1.0)
    if top_p == 0:
        raise RequestError("top_p is 0, expected a number above 0 and at most 1", param="top_p")
    return 1.0 if top_p is None else top_p


def _num_samples(body: Mapping[str, Any]) -> int:
    num_samples = _integer(body, "n", low=1, high=MAX_SAMPLES) or 1
    best_of = _integer(body, "best_of", low=1, high=MAX_SAMPLES)
    if best_of is not None and best_of != num_samples:
        raise RequestError(
            f"best_of is {best_of}, expected {num_samples} as n: every sample is returned; leave it out",
            param="best_of",
        )
    return num_samples


def _num_logprobs_of_completion(body: Mapping[str, Any]) -> int | None:
    if _integer(body, "top_logprobs", low=0, high=MAX_LOGPROBS):
        raise RequestError(
            f"top_logprobs is {body['top_logprobs']}, which chats take; expected it left out, and the number in "
            "logprobs",
            param="top_logprobs",
        )
    if body.get("logprobs") is False:
        return None
    return _integer(body, "logprobs", low=0, high=MAX_LOGPROBS)


def _num_logprobs_of_chat(body: Mapping[str, Any]) -> int | None:
    number = _integer(body, "top_logprobs", low=0, high=MAX_LOGPROBS)
    if _typed(body, "logprobs", bool, "true or false"):
        return number or 0
    if number:
        raise RequestError(
            f"top_logprobs is {number} without logprobs: true, expected both; send logprobs: true or leave it out",
            param="top_logprobs",
        )
    return None


def _logit_bias(body: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """(token id, bias) pairs in the order of the ids; whether the model has the ids is checked later."""
    biases: dict[str, Any] = _typed(body, "logit_bias", dict, "an object of token ids and biases") or {}
    if len(biases) > MAX_LOGIT_BIASES:
        raise RequestError(
            f"logit_bias has {len(biases)} entries, expected at most {MAX_LOGIT_BIASES}", param="logit_bias"
        )
    return tuple(sorted((_token_id(key), _bias(biases, key)) for key in biases))


def _token_id(key: str) -> int:
    # One spelling per id, or one token could have two biases.
    if not (key.isascii() and key.isdecimal() and len(key) <= len(str(MAX_INTEGER)) and str(int(key)) == key):
        raise RequestError(
            f"logit_bias has the key {_shown(key)}, expected a token id in decimal digits", param="logit_bias"
        )
    return int(key)


def _bias(biases: Mapping[str, Any], key: str) -> float:
    value = biases[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
        raise RequestError(
            f"logit_bias of token {key} is {_shown(value)}, expected a number from -100 to 100", param="logit_bias"
        )
    return float(value)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is no JSON ({error}), expected a JSON object") from error
    if not isinstance(body, dict):
        raise RequestError(f"the body is {_shown(body)}, expected a JSON object")
    return body


def _refuse_unserved(body: Mapping[str, Any]) -> None:
    for field, harmless in _HARMLESS.items():
        value = body.get(field)
        if value is None or any(value == allowed and type(value) is type(allowed) for allowed in harmless):
            continue
        expected = " or ".join(msgspec.json.encode(allowed).decode() for allowed in harmless) or "null"
        raise RequestError(
            f"{field} is {_shown(value)}, which is not supported; leave it out or send {expected}", param=field
        )


def _prompt(body: Mapping[str, Any]) -> str | tuple[int, ...]:
    value = body.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(_is_integer(item) and 0 <= item <= MAX_INTEGER for item in value):
        return tuple(value)
    if value in (None, "", []):
        raise RequestError(
            f"prompt is {'missing' if value is None else 'empty'}, expected text or token ids", param="prompt"
        )
    if isinstance(value, list) and all(isinstance(item, str | list) for item in value):
        raise RequestError(f"prompt holds {len(value)} prompts, expected one; send one request each", param="prompt")
    raise RequestError(f"prompt is {_shown(value)}, expected a string or a list of token ids", param="prompt")


def _messages(body: Mapping[str, Any]) -> tuple[ChatMessage, ...]:
    value = body.get("messages")
    if not isinstance(value, list) or not value:
        seen = "missing" if value is None else _shown(value)
        raise RequestError(f"messages is {seen}, expected a non-empty list of messages", param="messages")
    messages = tuple(_message(item, f"messages[{index}]") for index, item in enumerate(value))
    if not any(message.content for message in messages):
        raise RequestError("every message is empty, expected text in at least one", param="messages")
    return messages


def _message(item: Any, field: str) -> ChatMessage:
    if not isinstance(item, dict):
        raise RequestError(f"{field} is {_shown(item)}, expected an object with role and content", param=field)
    role = item.get("role")
    if role not in ROLES:
        raise RequestError(f"{field}.role is {_shown(role)}, expected one of {', '.join(ROLES)}", param=f"{field}.role")
    return ChatMessage(role, _content(item.get("content"), f"{field}.content"))


def _content(value: Any, field: str) -> str:
    """Text, or a list of text parts joined; other kinds of parts are refused."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)
    raise RequestError(f"{field} is {_shown(value)}, expected a string or a list of text parts", param=field)


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    if value is None:
        return ()
    strings: Sequence[Any] = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise RequestError(f"stop is {_shown(value)}, expected a string or a list of strings", param="stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(strings)} strings, expected at most {MAX_STOP_STRINGS}", param="stop")
    for item in strings:
        if not 0 < len(item) <= MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop has a string of {len(item)} characters, expected 1 to {MAX_STOP_CHARACTERS}", param="stop"
            )
    return tuple(strings)


def _include_usage(body: Mapping[str, Any], *, stream: bool) -> bool:
    options = _typed(body, "stream_options", dict, "an object")
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options is set without stream: true; leave it out or stream", param="stream_options")
    return bool(_typed(options, "include_usage", bool, "true or false"))


_T = TypeVar("_T")


def _typed(body: Mapping[str, Any], field: str, kind: type[_T], expected: str) -> _T | None:
    value = body.get(field)
    if value is None or isinstance(value, kind):
        return value
    raise RequestError(f"{field} is {_shown(value)}, expected {expected}", param=field)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(body: Mapping[str, Any], field: str, *, low: int, high: int) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    if not _is_integer(value) or not low <= value <= high:
        raise RequestError(f"{field} is {_shown(value)}, expected an integer from {low} to {high}", param=field)
    return int(value)


def _number(body: Mapping[str, Any], field: str, *, low: float, high: float) -> float | None:
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{field} is {_shown(value)}, expected a number from {low:g} to {high:g}", param=field)
    return float(value)


def _shown(value: Any) -> str:
    """The value as JSON, cut: an error message must not carry a whole prompt back."""
    try:
        text = msgspec.json.encode(value).decode()
    except RecursionError:  # what can be read may be one level too deep to be written
        text = "nested too deeply"
    return text if len(text) <= 60 else f"{text[:60]}..."
