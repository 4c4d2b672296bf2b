"""Records survive the wire, damage is always a RecordError, and released bytes stay readable."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.errors import RecordError
from slipstream.records import (
    HELD_OUT_RATIO,
    SCHEMA_VERSION,
    Observation,
    Round,
    RoutingTrace,
    SamplingRecord,
    decode_observation,
    decode_routing_trace,
    encode,
    is_held_out,
    observation_id,
    pack_floats,
    pack_ids,
    sample_id,
    unpack_floats,
    unpack_ids,
)

GOLDEN = Path(__file__).parent / "golden"

TRACE = RoutingTrace(
    num_layers=2,
    num_experts=8,
    experts_per_token=2,
    routing_version=0,
    expert_ids=np.arange(12, dtype="<u2").tobytes(),
)

OBSERVATION = Observation(
    request_id="cmpl-0123456789abcdef",
    chunk=1,
    at=1750000000.25,
    tenant="anonymous",
    domain="math",
    sampling=SamplingRecord(temperature=1.0, top_k=0, top_p=0.95, seed=2**63 - 1, sample_index=2),
    target_digest="0" * 64,
    prompt_ids=pack_ids([1, 2, 3, 65_000]),
    output_ids=pack_ids([7, 8, 2]),
    output_logprobs=pack_floats([-0.5, -1.25, -3.0], bits=32),
    top_n=2,
    top_ids=pack_ids([7, 9, 8, 1, 2, 3]),
    top_logprobs=pack_floats([-0.5, -2.0, -1.25, -1.5, -3.0, -0.125], bits=16),
    first_position=4,
    rounds=(
        Round(start=0, draft_version=3, proposed=(7, 9), num_accepted=1),
        Round(start=2, draft_version=4, proposed=(), num_accepted=0),
    ),
    finish_reason="stop",
    replica_id="replica-1",
    routing=TRACE,
)


def test_the_golden_bytes_of_schema_version_1_mean_what_they_meant() -> None:
    assert decode_observation((GOLDEN / "observation_v1.msgpack").read_bytes()) == OBSERVATION
    assert decode_routing_trace((GOLDEN / "routing_trace_v1.msgpack").read_bytes()) == TRACE


def test_this_build_still_writes_the_golden_bytes() -> None:
    assert SCHEMA_VERSION == 1, "a new schema version adds golden files of its own and keeps these readable"
    assert encode(OBSERVATION) == (GOLDEN / "observation_v1.msgpack").read_bytes()
    assert encode(TRACE) == (GOLDEN / "routing_trace_v1.msgpack").read_bytes()


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    num_tokens, top_n = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    token_ids = st.integers(0, 2**31 - 1)
    logprobs = st.floats(-60_000.0, 0.0, width=16)

    def listed(values: st.SearchStrategy[int] | st.SearchStrategy[float], size: int) -> list[float]:
        return draw(st.lists(values, min_size=size, max_size=size))

    rounds = st.builds(
        Round,
        start=st.integers(0, 100),
        draft_version=st.integers(0, 1000),
        proposed=st.lists(token_ids, max_size=4).map(tuple),
        num_accepted=st.integers(0, 4),
    )
    return Observation(
        request_id=draw(st.text(max_size=20)),
        chunk=draw(st.integers(0, 1000)),
        at=draw(st.floats(0, 4e9)),
        tenant=draw(st.text(max_size=8)),
        domain=draw(st.text(max_size=8)),
        sampling=SamplingRecord(
            temperature=draw(st.floats(0, 2)), top_k=0, top_p=1.0, seed=draw(st.integers(0, 2**63 - 1))
        ),
        target_digest="digest",
        prompt_ids=pack_ids(listed(token_ids, draw(st.integers(0, 5)))),
        output_ids=pack_ids(listed(token_ids, num_tokens)),
        output_logprobs=pack_floats(listed(logprobs, num_tokens), bits=32),
        top_n=top_n,
        top_ids=pack_ids(listed(token_ids, num_tokens * top_n)),
        top_logprobs=pack_floats(listed(logprobs, num_tokens * top_n), bits=16),
        first_position=draw(st.integers(0, 10_000)),
        rounds=tuple(draw(st.lists(rounds, max_size=3))),
        finish_reason="length",
        replica_id=draw(st.text(max_size=8)),
    )


@given(observation=observations())
def test_an_observation_comes_back_as_it_went(observation: Observation) -> None:
    assert decode_observation(encode(observation)) == observation


@given(ids=st.lists(st.integers(-(2**31), 2**31 - 1)), bits=st.sampled_from([16, 32]))
def test_packed_arrays_come_back_as_they_went(ids: list[int], bits: int) -> None:
    assert unpack_ids(pack_ids(ids)).tolist() == ids
    floats = [float(np.float16(one % 1000)) for one in ids]
    assert unpack_floats(pack_floats(floats, bits=bits), bits=bits).tolist() == floats


def test_every_truncation_is_a_record_error() -> None:
    whole = encode(OBSERVATION)
    for num_bytes in range(len(whole)):
        with pytest.raises(RecordError):
            decode_observation(whole[:num_bytes])


@settings(max_examples=500)
@given(data=st.data())
def test_damage_is_a_record_error_or_an_observation_whose_arrays_unpack(data: st.DataObject) -> None:
    damaged = bytearray(encode(OBSERVATION))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        observation = decode_observation(bytes(damaged))
    except RecordError:
        return
    num_tokens = len(unpack_ids(observation.output_ids))
    unpack_ids(observation.prompt_ids)
    assert len(unpack_floats(observation.output_logprobs, bits=32)) == num_tokens
    assert len(unpack_ids(observation.top_ids)) == num_tokens * observation.top_n


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_record_error_or_a_record(data: bytes) -> None:
    for decode in (decode_observation, decode_routing_trace):
        try:
            decode(data)
        except RecordError as error:
            assert "skipped" in str(error) or "upgrade" in str(error)  # noqa: PT017 - most bytes must raise, not all


@pytest.mark.parametrize("field", ["prompt_ids", "output_ids", "output_logprobs", "top_ids", "top_logprobs"])
def test_an_array_of_the_wrong_length_is_named(field: str) -> None:
    longer = msgspec.structs.replace(OBSERVATION, **{field: getattr(OBSERVATION, field) + b"\0\0\0"})
    with pytest.raises(RecordError, match=field):
        decode_observation(encode(longer))


def test_a_trace_with_rows_missing_is_a_record_error() -> None:
    shorter = msgspec.structs.replace(TRACE, expert_ids=TRACE.expert_ids[:-8])
    with pytest.raises(RecordError, match="16 bytes, expected 3 rows of 8 bytes"):
        decode_observation(encode(msgspec.structs.replace(OBSERVATION, routing=shorter)))
    with pytest.raises(RecordError, match="whole number of rows"):
        decode_routing_trace(encode(msgspec.structs.replace(TRACE, expert_ids=b"123")))


def test_a_newer_schema_version_is_refused_with_advice() -> None:
    newer = msgspec.structs.replace(OBSERVATION, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(RecordError, match=f"schema version {SCHEMA_VERSION + 1}.*upgrade"):
        decode_observation(encode(newer))


def test_fields_of_a_later_build_are_ignored() -> None:
    fields = msgspec.msgpack.decode(encode(OBSERVATION))
    fields["invented_later"] = {"anything": [1, 2, 3]}
    fields["rounds"][0]["tree"] = b"\x00"
    assert decode_observation(msgspec.msgpack.encode(fields)) == OBSERVATION


@pytest.mark.parametrize("poison", [b"\x91" * 100_000, b"\x81\xa1\x80", b""])
def test_poison_of_every_kind_is_a_record_error(poison: bytes) -> None:
    fields = encode(OBSERVATION)
    for data in (poison, fields[:1] + b"\xff" + fields[2:] + poison, b"\x81\xa1x" + poison):
        with pytest.raises(RecordError):
            decode_observation(data)


def test_a_missing_field_is_named() -> None:
    fields = msgspec.msgpack.decode(encode(OBSERVATION))
    del fields["domain"]
    with pytest.raises(RecordError, match="domain"):
        decode_observation(msgspec.msgpack.encode(fields))


def test_chunks_of_one_request_have_different_ids_and_one_side_of_the_split() -> None:
    other = msgspec.structs.replace(OBSERVATION, chunk=2)
    assert observation_id(OBSERVATION) == "cmpl-0123456789abcdef/1"
    assert observation_id(other) == "cmpl-0123456789abcdef/2"
    assert is_held_out(OBSERVATION.request_id) == is_held_out(other.request_id)


def test_the_held_out_split_never_changes_and_has_its_ratio() -> None:
    # Frozen: a distiller and an evaluator of different builds must agree.
    assert [number for number in range(24) if is_held_out(f"request-{number}")] == [0, 13]
    share = sum(is_held_out(f"cmpl-{number}") for number in range(20_000)) / 20_000
    # Five standard deviations of a share of 20,000 draws.
    assert abs(share - HELD_OUT_RATIO) < 5 * (HELD_OUT_RATIO * (1 - HELD_OUT_RATIO) / 20_000) ** 0.5


def test_all_samples_of_a_call_are_on_the_same_side() -> None:
    for call in ("request-0", "request-1", "request-13"):
        assert {is_held_out(sample_id(call, index)) for index in range(8)} == {is_held_out(call)}
