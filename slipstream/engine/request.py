"""What the engine takes in and gives out: `Request`, `SamplingParams`, `TokenBlock`."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]

REPLICA_STOPPING: Final = "the replica is stopping; send the request again"
"""The `error` of a request that ends because its replica stops: nothing failed, another replica may answer it."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the target's token is chosen at each position.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch the filters off. `seed` is any int in [0, 2**63).
    Generation ends after `max_tokens` tokens or at a token of `stop_token_ids`, which is emitted last.
    """

    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    sample_index: int = 0
    stop_token_ids: tuple[int, ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate.

    `may_train` False keeps every trace of it out of the observation log. `speculate` False decodes one token a pass;
    the output is the same. `arrived_at` is `time.monotonic()` at arrival.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str
    domain: str
    may_train: bool
    arrived_at: float
    speculate: bool = True


class TokenBlock(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens one step committed for one request.

    The last block of a request carries `finish_reason` (and `error` if that is the reason); every earlier one None.
    `draft_version` is 0 when the block was decoded without a draft.
    """

    request_id: str
    token_ids: tuple[int, ...]
    draft_version: int
    routing_version: int
    num_proposed: int
    num_accepted: int
    finish_reason: FinishReason | None = None
    error: str = ""
