"""What callers get: the OpenAI answer shapes, whole or as server-sent events.

A stream is one event per block of tokens that has text, then an event with the finish reason, then the usage event
if it was asked for, then `[DONE]`. Without `include_usage` no event carries a `usage` field.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from services.target.openai_requests import GenerationCall, Kind

FinishReason = Literal["stop", "length"]

STREAM_END: Final = b"data: [DONE]\n\n"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same in every part of one answer; `created` is in seconds since the epoch."""

    answer_id: str
    kind: Kind
    model: str
    created: int
    include_usage: bool


def answer_for(call: GenerationCall, *, request_id: str, created: int) -> Answer:
    """The frame of the answer to `call`; `request_id` is the engine's."""
    prefix = "chatcmpl" if call.kind == "chat" else "cmpl"
    return Answer(
        answer_id=f"{prefix}-{request_id}",
        kind=call.kind,
        model=call.model,
        created=created,
        include_usage=call.include_usage,
    )


def usage(*, num_prompt: int, num_output: int) -> dict[str, int]:
    """Token counts; output counts every token the target emitted, the one that ended the answer included."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}


def whole(answer: Answer, *, text: str, finish_reason: FinishReason, counts: dict[str, int]) -> bytes:
    """The JSON body of an answer that is not streamed."""
    choice: dict[str, Any] = {"index": 0}
    if answer.kind == "chat":
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    choice |= {"logprobs": None, "finish_reason": finish_reason}
    return msgspec.json.encode(_frame(answer, "chat.completion") | {"choices": [choice], "usage": counts})


def role_event(answer: Answer) -> bytes:
    """The first event of a chat; nothing for a completion."""
    return _event(answer, {"role": "assistant", "content": ""}) if answer.kind == "chat" else b""


def text_event(answer: Answer, text: str) -> bytes:
    """The event of a block with text."""
    return _event(answer, {"content": text} if answer.kind == "chat" else text)


def finish_event(answer: Answer, finish_reason: FinishReason) -> bytes:
    """The last event with a choice."""
    return _event(answer, {} if answer.kind == "chat" else "", finish_reason)


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


def _event(answer: Answer, part: dict[str, str] | str, finish_reason: FinishReason | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "delta" if answer.kind == "chat" else "text": part}
    choice |= {"logprobs": None, "finish_reason": finish_reason}
    chunk = _frame(answer, "chat.completion.chunk") | {"choices": [choice]}
    if answer.include_usage:
        chunk["usage"] = None
    return _sse(chunk)


def _sse(payload: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"
