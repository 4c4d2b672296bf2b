"""What crosses a process boundary: `Observation` and `RoutingTrace`, their encoding and the held-out split.

Records are frozen msgspec structs in msgpack. Integers and floats per token travel as packed little-endian bytes
(`pack_ids`, `pack_floats`), a tenth of the cost of msgpack lists. Fields are only ever added, with defaults; a new
meaning takes a new schema version. `tests/unit/golden/` keeps the bytes of every released version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from slipstream.errors import RecordError

SCHEMA_VERSION = 1
HELD_OUT_RATIO = 0.2
"""Share of requests kept from training and used to judge drafts."""

MAX_RECORD_BYTES = 1_000_000
"""The log refuses longer records; `engine.observer` cuts long requests into chunks well below this."""


class SamplingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The sampling parameters a request ran under; `temperature` 0 is greedy, `top_k` 0 means no limit."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    sample_index: int = 0


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One verification pass of a request.

    `start` is the index into the observation's output of the pass's first emitted token; the pass emitted
    `num_accepted + 1` tokens (fewer if the request ended inside the block). `proposed` are the drafted tokens: a
    chain in its order, a tree's nodes with parents first.
    """

    start: int
    draft_version: int
    proposed: tuple[int, ...]
    num_accepted: int


class RoutingTrace(msgspec.Struct, frozen=True, kw_only=True):
    """Experts the target used for each output position of an observation.

    `expert_ids` packs `expert_ids_TLK` as unsigned 16-bit integers, row-major; T rows, one per output token, being
    the target positions whose logits produced that token.
    """

    num_layers: int
    num_experts: int
    experts_per_token: int
    routing_version: int
    expert_ids: bytes
    schema_version: int = SCHEMA_VERSION


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """One finished request, or one chunk of a long one, as the replica saw it.

    `prompt_ids` is everything before this chunk's first output token (int32); `output_ids` the chunk's output
    (int32, T of them). `output_logprobs` is float32 [T], `top_ids` int32 [T, N] and `top_logprobs` float16 [T, N]:
    the target's log-probabilities over the whole vocabulary, before temperature and filters.
    `at` is seconds since the epoch. `first_position` is the absolute position of the first output token.
    """

    request_id: str
    chunk: int
    at: float
    tenant: str
    domain: str
    sampling: SamplingRecord
    target_digest: str
    prompt_ids: bytes
    output_ids: bytes
    output_logprobs: bytes
    top_n: int
    top_ids: bytes
    top_logprobs: bytes
    first_position: int
    rounds: tuple[Round, ...]
    finish_reason: str
    replica_id: str
    routing: RoutingTrace | None = None
    schema_version: Annotated[int, msgspec.Meta(ge=1)] = SCHEMA_VERSION


def observation_id(observation: Observation) -> str:
    """The name under which consumers recognise a redelivered observation."""
    return f"{observation.request_id}/{observation.chunk}"


def sample_id(request_id: str, sample_index: int) -> str:
    """The id of one of several samples of a call."""
    return f"{request_id}#{sample_index}"


def is_held_out(request_id: str) -> bool:
    """Whether a request is kept for judging drafts: a hash, so that every process agrees without talking.

    All samples of a call (`sample_id`) are on the same side: they share its prompt.
    """
    call_id = request_id.partition("#")[0]
    bucket = int.from_bytes(hashlib.blake2b(call_id.encode(), digest_size=8).digest(), "big")
    return bucket < HELD_OUT_RATIO * 2**64


def pack_ids(ids: Sequence[int] | npt.NDArray[Any]) -> bytes:
    """Token ids as little-endian int32, row-major."""
    return np.asarray(ids, dtype="<i4").tobytes()


def unpack_ids(packed: bytes) -> npt.NDArray[np.int32]:
    """The flat int32 array that `pack_ids` packed; read-only."""
    return np.frombuffer(packed, dtype="<i4")


def pack_floats(values: Sequence[float] | npt.NDArray[Any], *, bits: int) -> bytes:
    """Floats as little-endian float32 (`bits=32`) or float16 (`bits=16`), row-major."""
    return np.asarray(values, dtype={16: "<f2", 32: "<f4"}[bits]).tobytes()


def unpack_floats(packed: bytes, *, bits: int) -> npt.NDArray[np.float32]:
    """The flat array that `pack_floats` packed, as float32."""
    return np.frombuffer(packed, dtype={16: "<f2", 32: "<f4"}[bits]).astype(np.float32)


_encoder = msgspec.msgpack.Encoder()
_observation_decoder = msgspec.msgpack.Decoder(Observation)
_routing_decoder = msgspec.msgpack.Decoder(RoutingTrace)


def encode(record: Observation | RoutingTrace) -> bytes:
    """Msgpack bytes of a record."""
    return _encoder.encode(record)


def decode_observation(data: bytes) -> Observation:
    """The observation in `data`.

    Raises RecordError if the bytes are no observation, have a newer schema version, or contradict themselves
    (array lengths that do not belong together).
    """
    observation: Observation = _decode(_observation_decoder, data)
    num_tokens = len(observation.output_ids) // 4
    expected = {
        "prompt_ids": len(observation.prompt_ids) // 4 * 4,
        "output_ids": 4 * num_tokens,
        "output_logprobs": 4 * num_tokens,
        "top_ids": 4 * num_tokens * observation.top_n,
        "top_logprobs": 2 * num_tokens * observation.top_n,
    }
    for field, num_bytes in expected.items():
        if len(getattr(observation, field)) != num_bytes:
            raise RecordError(
                f"observation {observation.request_id!r}: {field} has {len(getattr(observation, field))} bytes, "
                f"expected {num_bytes} for {num_tokens} output tokens; the record is damaged and is skipped"
            )
    if observation.routing is not None:
        _check_trace(observation.routing, num_tokens=num_tokens)
    return observation


def decode_routing_trace(data: bytes) -> RoutingTrace:
    """The routing trace in `data`; raises RecordError like `decode_observation`."""
    trace: RoutingTrace = _decode(_routing_decoder, data)
    _check_trace(trace, num_tokens=None)
    return trace


def _check_trace(trace: RoutingTrace, *, num_tokens: int | None) -> None:
    """Raise RecordError unless the ids are whole rows, one for each of `num_tokens` (None: any number)."""
    row_bytes = 2 * trace.num_layers * trace.experts_per_token
    num_bytes = len(trace.expert_ids)
    if row_bytes <= 0 or num_bytes % row_bytes or num_tokens not in (None, num_bytes // row_bytes):
        raise RecordError(
            f"routing trace: expert_ids has {num_bytes} bytes, expected {num_tokens or 'a whole number of'} rows of "
            f"{row_bytes} bytes; the record is damaged and is skipped"
        )


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    try:
        record = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"{len(data)} bytes are no record: {error}; the record is skipped") from error
    if record.schema_version > SCHEMA_VERSION:
        raise RecordError(
            f"record has schema version {record.schema_version}, this build reads up to {SCHEMA_VERSION}; upgrade it"
        )
    return record
