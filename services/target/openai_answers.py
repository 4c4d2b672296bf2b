"""What callers get: the OpenAI answer shapes, whole or as server-sent events.

A stream is, for every choice, one event per block of tokens that has text (or log-probabilities, if they were asked
for), then an event with the finish reason; the events of several choices interleave. Then comes the usage event if it
was asked for, then `[DONE]`. Without `include_usage` no event carries a `usage` field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from services.target.openai_logprobs import ReportedToken, reported_logprobs
from services.target.openai_requests import GenerationCall, Kind
from services.target.text_stream import TokenBytes

FinishReason = Literal["stop", "length"]

STREAM_END: Final = b"data: [DONE]\n\n"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same in every part of one answer; `created` is in seconds since the epoch."""

    answer_id: str
    kind: Kind
    model: str
    created: int
    num_choices: int
    has_logprobs: bool
    include_usage: bool
    token_bytes: TokenBytes


class ChoicePart(msgspec.Struct, frozen=True, kw_only=True):
    """What one block of tokens adds to one choice; `finish_reason` is None in all but a choice's last part.

    `tokens` are the tokens of the block if log-probabilities were asked for, whether or not their text is in it.
    """

    index: int
    text: str
    tokens: tuple[ReportedToken, ...] = ()
    finish_reason: FinishReason | None = None


def answer_for(call: GenerationCall, *, request_id: str, created: int, token_bytes: TokenBytes) -> Answer:
    """The frame of the answer to `call`; `request_id` is the call's."""
    prefix = "chatcmpl" if call.kind == "chat" else "cmpl"
    return Answer(
        answer_id=f"{prefix}-{request_id}",
        kind=call.kind,
        model=call.model,
        created=created,
        num_choices=call.num_samples,
        has_logprobs=call.num_logprobs is not None,
        include_usage=call.include_usage,
        token_bytes=token_bytes,
    )


def usage(*, num_prompt: int, num_output: int) -> dict[str, int]:
    """Token counts; output counts every token the target emitted, those that ended the choices included."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}


def whole(answer: Answer, parts: Sequence[ChoicePart], counts: dict[str, int]) -> bytes:
    """The JSON body of an answer that is not streamed: all its parts, put together by choice."""
    choices = [_whole_choice(answer, index, parts) for index in range(answer.num_choices)]
    return msgspec.json.encode(_frame(answer, "chat.completion") | {"choices": choices, "usage": counts})


def role_events(answer: Answer) -> bytes:
    """The first event of each choice of a chat; nothing for a completion."""
    if answer.kind != "chat":
        return b""
    delta = {"role": "assistant", "content": ""}
    return b"".join(_event(answer, index, delta) for index in range(answer.num_choices))


def part_events(answer: Answer, part: ChoicePart) -> bytes:
    """The event of a part with text or log-probabilities, and the last one of its choice; nothing if it has neither."""
    is_chat, events = answer.kind == "chat", b""
    if part.text or part.tokens:
        text = {"content": part.text} if is_chat else part.text
        events += _event(answer, part.index, text, tokens=part.tokens)
    if part.finish_reason is not None:
        events += _event(answer, part.index, {} if is_chat else "", finish_reason=part.finish_reason)
    return events


def usage_event(answer: Answer, counts: dict[str, int]) -> bytes:
    """The event with the token counts; nothing unless it was asked for."""
    if not answer.include_usage:
        return b""
    return _sse(_frame(answer, "chat.completion.chunk") | {"choices": [], "usage": counts})


def error_body(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> bytes:
    """The JSON body of every error; `kind` is OpenAI's error type."""
    return msgspec.json.encode(_error(message, kind, code, param))


def error_event(message: str, *, kind: str, code: str | None = None) -> bytes:
    """The event that ends a stream which failed; no `[DONE]` follows."""
    return _sse(_error(message, kind, code, None))


def model_card(name: str, created: int) -> dict[str, Any]:
    """One entry of `GET /v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "slipstream"}


def _error(message: str, kind: str, code: str | None, param: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _frame(answer: Answer, chat_object: str) -> dict[str, Any]:
    object_name = chat_object if answer.kind == "chat" else "text_completion"
    return {"id": answer.answer_id, "object": object_name, "created": answer.created, "model": answer.model}


def _whole_choice(answer: Answer, index: int, parts: Sequence[ChoicePart]) -> dict[str, Any]:
    own = [part for part in parts if part.index == index]
    text = "".join(part.text for part in own)
    logprobs = None
    if answer.has_logprobs:
        tokens = [token for part in own for token in part.tokens]
        logprobs = reported_logprobs(answer.kind, tokens, answer.token_bytes)
    said: dict[str, Any] = {"text": text}
    if answer.kind == "chat":
        said = {"message": {"role": "assistant", "content": text}}
    return {"index": index} | said | {"logprobs": logprobs, "finish_reason": own[-1].finish_reason}


def _event(
    answer: Answer,
    index: int,
    said: dict[str, str] | str,
    *,
    tokens: Sequence[ReportedToken] = (),
    finish_reason: FinishReason | None = None,
) -> bytes:
    choice: dict[str, Any] = {"index": index, "delta" if answer.kind == "chat" else "text": said}
    logprobs = reported_logprobs(answer.kind, tokens, answer.token_bytes) if tokens else None
    choice |= {"logprobs": logprobs, "finish_reason": finish_reason}
    chunk = _frame(answer, "chat.completion.chunk") | {"choices": [choice]}
    if answer.include_usage:
        chunk["usage"] = None
    return _sse(chunk)


def _sse(payload: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"
