"""What the engine takes in and gives out: `Request`, `SamplingParams`, `TokenBlock`."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]

REPLICA_STOPPING: Final = "the replica is stopping; send the request again"
"""The `error` of a request that ends because its replica stops: nothing failed, another replica may answer it."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the target's token is chosen at each position.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch the filters off. `seed` is any int in
    [0, 2**63), `sample_index` tells the n samples of one call apart. Penalties are neutral at `repetition_penalty` 1
    and 0 for the others; `logit_bias` holds (token id, bias) pairs. Generation ends after `max_tokens` tokens, at a
    token of `stop_token_ids`, or with the token that completes one of `stop_strings`; that token is emitted last.
    """

    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    sample_index: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate.

    `may_train` False keeps every trace of it out of the observation log. `speculate` False decodes one token a pass;
    the output is the same. `num_logprobs` asks for the log-probability of every emitted token and of that many most
    likely ones; None for none. `arrived_at` is `time.monotonic()` at arrival.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str
    domain: str
    may_train: bool
    arrived_at: float
    speculate: bool = True
    num_logprobs: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The target's own log-probability of an emitted token, before temperature, penalties and filters.

    `top` holds (token id, log-probability) of the most likely tokens, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenBlock(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens one step committed for one request.

    The last block of a request carries `finish_reason` (and `error` if that is the reason); every earlier one None.
    `draft_version` is 0 when the block was decoded without a draft. `logprobs` has an entry per token if the request
    asked for them, else none.
    """

    request_id: str
    token_ids: tuple[int, ...]
    draft_version: int
    routing_version: int
    num_proposed: int
    num_accepted: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
