"""Log-probabilities in OpenAI's two shapes: parallel lists for completions, a list of entries for chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from services.target.openai_requests import Kind
from services.target.text_stream import TokenBytes
from slipstream.engine.request import TokenLogprobs

MIN_LOGPROB: Final = -9999.0
"""What stands for minus infinity, which JSON cannot say."""


class ReportedToken(msgspec.Struct, frozen=True, kw_only=True):
    """An emitted token with its log-probabilities; `offset` is where its characters begin in the choice's text."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs


def reported_logprobs(kind: Kind, tokens: Sequence[ReportedToken], token_bytes: TokenBytes) -> dict[str, Any]:
    """The `logprobs` field of a choice, or of an event of it."""
    return _of_chat(tokens, token_bytes) if kind == "chat" else _of_completion(tokens, token_bytes)


def _of_completion(tokens: Sequence[ReportedToken], token_bytes: TokenBytes) -> dict[str, Any]:
    return {
        "tokens": [token_bytes.spelling(token.token_id) for token in tokens],
        "token_logprobs": [_finite(token.logprobs.logprob) for token in tokens],
        "top_logprobs": [_by_spelling(token, token_bytes) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _by_spelling(token: ReportedToken, token_bytes: TokenBytes) -> dict[str, float]:
    """The most likely tokens and the emitted one; of several with the same spelling the most likely."""
    found: dict[str, float] = {}
    for token_id, logprob in (*token.logprobs.top, (token.token_id, token.logprobs.logprob)):
        found.setdefault(token_bytes.spelling(token_id), _finite(logprob))
    return found


def _of_chat(tokens: Sequence[ReportedToken], token_bytes: TokenBytes) -> dict[str, Any]:
    content = []
    for token in tokens:
        top = [_entry(token_id, logprob, token_bytes) for token_id, logprob in token.logprobs.top]
        content.append(_entry(token.token_id, token.logprobs.logprob, token_bytes) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    """A token of a chat; `bytes` is null for a token that stands for none (a special one)."""
    exact = token_bytes[token_id]
    return {
        "token": token_bytes.spelling(token_id),
        "logprob": _finite(logprob),
        "bytes": list(exact) if exact else None,
    }


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
