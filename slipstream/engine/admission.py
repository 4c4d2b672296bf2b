"""Which requests an engine can serve: every refusal names the parameter, the value seen and the value expected."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from slipstream.engine.blocks import blocks_for
from slipstream.engine.plan import BLOCK_TOKENS
from slipstream.engine.request import Request, SamplingParams
from slipstream.errors import RequestError

MAX_LOGPROBS = 20
"""Most likely tokens that a request may ask for at each position."""

MAX_LOGIT_BIAS = 100.0
_MAX_PENALTY = 2.0
_SEED_LIMIT = 2**63
_ID_LIMIT = 2**31


class Admissible(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds a request: the model's vocabulary and context, the cache, and whether tokens' bytes are known."""

    vocab_size: int
    max_context_tokens: int
    num_blocks: int
    knows_token_bytes: bool


def check_request(request: Request, limits: Admissible) -> None:
    """Raise RequestError unless the request can be served within these limits, if it has to, alone."""
    _check_length(request, limits)
    _check_ids("prompt", request.prompt_ids, limits)
    _check_sampling(request.sampling, limits)
    if request.sampling.stop_strings and not limits.knows_token_bytes:
        raise RequestError(
            "stop strings were asked for, but this engine was not told the bytes of its tokens; use stop_token_ids",
            param="stop",
        )
    if "" in request.sampling.stop_strings:
        raise RequestError("a stop string is empty; expected at least one character", param="stop")
    if request.num_logprobs is not None and not 0 <= request.num_logprobs <= MAX_LOGPROBS:
        raise RequestError(f"logprobs is {request.num_logprobs}; expected 0..{MAX_LOGPROBS}", param="logprobs")


def _check_length(request: Request, limits: Admissible) -> None:
    num_prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
    if not num_prompt:
        raise RequestError("prompt is empty; expected at least one token", param="prompt")
    if max_tokens < 1:
        raise RequestError(f"max_tokens is {max_tokens}; expected at least 1", param="max_tokens")
    together = f"prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together {num_prompt + max_tokens}"
    if num_prompt + max_tokens > limits.max_context_tokens:
        raise RequestError(
            f"{together}; the context is {limits.max_context_tokens} tokens: shorten one", param="max_tokens"
        )
    if blocks_for(num_prompt + max_tokens) > limits.num_blocks:
        raise RequestError(
            f"{together}; the K/V cache holds {limits.num_blocks * BLOCK_TOKENS} positions: shorten one, or raise "
            "serving.kv_cache_tokens",
            param="max_tokens",
        )


def _check_sampling(sampling: SamplingParams, limits: Admissible) -> None:
    if not 0 <= sampling.seed < _SEED_LIMIT:
        raise RequestError(f"seed is {sampling.seed}; expected 0 <= seed < 2**63", param="seed")
    if sampling.sample_index < 0:
        raise RequestError(f"sample_index is {sampling.sample_index}; expected 0 or more", param="n")
    if sampling.top_k < 0:
        raise RequestError(f"top_k is {sampling.top_k}; expected 0 (off) or more", param="top_k")
    _check_within("temperature", sampling.temperature, at_least=0.0)
    if not 0.0 < sampling.top_p <= 1.0:
        raise RequestError(f"top_p is {sampling.top_p}; expected 0 < top_p <= 1", param="top_p")
    _check_within("min_p", sampling.min_p, at_least=0.0, at_most=1.0)
    if not (sampling.repetition_penalty > 0.0 and math.isfinite(sampling.repetition_penalty)):
        raise RequestError(
            f"repetition_penalty is {sampling.repetition_penalty}; expected a finite number above 0",
            param="repetition_penalty",
        )
    _check_within("presence_penalty", sampling.presence_penalty, at_least=-_MAX_PENALTY, at_most=_MAX_PENALTY)
    _check_within("frequency_penalty", sampling.frequency_penalty, at_least=-_MAX_PENALTY, at_most=_MAX_PENALTY)
    no_id = _first_outside(sampling.stop_token_ids, _ID_LIMIT)
    if no_id is not None:
        raise RequestError(
            f"stop_token_ids has {no_id}; expected token ids, 0 <= id < {_ID_LIMIT}", param="stop_token_ids"
        )
    _check_ids("logit_bias", (token for token, _ in sampling.logit_bias), limits)
    for _, bias in sampling.logit_bias:
        _check_within("logit_bias", bias, at_least=-MAX_LOGIT_BIAS, at_most=MAX_LOGIT_BIAS)


def _check_within(name: str, value: float, *, at_least: float, at_most: float = math.inf) -> None:
    # Written so that NaN, which compares false with everything, is refused.
    if not (at_least <= value <= at_most and math.isfinite(value)):
        upper = f" <= {at_most:g}" if math.isfinite(at_most) else ", finite"
        raise RequestError(f"{name} is {value}; expected {at_least:g} <= {name}{upper}", param=name)


def _check_ids(name: str, ids: Iterable[int], limits: Admissible) -> None:
    unknown = _first_outside(ids, limits.vocab_size)
    if unknown is not None:
        raise RequestError(f"{name} has token id {unknown}; the vocabulary is 0..{limits.vocab_size - 1}", param=name)


def _first_outside(ids: Iterable[int], end: int) -> int | None:
    """The first that is not from 0 to below `end`."""
    return next((one for one in ids if not 0 <= one < end), None)
