"""Replay of a matrix: what a replica that just started from it would have had accepted, pass by pass."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from slipstream.acceptance import AcceptanceCounts
from slipstream.drafting.recycling_artifact import StoredMatrix, matrix_digest
from slipstream.learning.matrix_replay import rows_of, score_matrix
from slipstream.records import Observation, SamplingRecord, pack_floats, pack_ids
from slipstream_kernels.adjacency import empty_adjacency, remember
from slipstream_kernels.recycling import noise_of_tokens
from slipstream_kernels.sampling import row_bytes, sample_rows
from tests.observed import VOCAB_SIZE, observation


def matrix_of(*observations: Observation) -> StoredMatrix:
    matrix = empty_adjacency(VOCAB_SIZE)
    for one in observations:
        remember(matrix, *rows_of(one))
    return StoredMatrix(matrix, matrix_digest(matrix))


def counts(start: StoredMatrix | None, one: Observation, *, num_draft_tokens: int = 3) -> AcceptanceCounts:
    return score_matrix(start, one, vocab_size=VOCAB_SIZE, num_draft_tokens=num_draft_tokens).counts


def test_the_rows_are_what_the_target_said_behind_each_token() -> None:
    one = observation("request", num_tokens=3)
    tokens, top_ids, top_logprobs = rows_of(one)
    ids = np.concatenate([np.frombuffer(one.prompt_ids, "<i4"), np.frombuffer(one.output_ids, "<i4")])
    assert tokens.tolist() == ids[3:6].tolist()
    assert top_ids[:, 0].tolist() == ids[4:].tolist()
    assert np.exp(top_logprobs[0]) == pytest.approx([0.9, 0.03, 0.02, 0.01], rel=1e-2)


def test_a_matrix_that_knows_the_way_has_whole_paths_accepted() -> None:
    one = observation("request", num_tokens=12)
    # 1 behind the prompt, then trees of 3 nodes which are chains here: 4, 4, and 3 tokens where max_tokens ends it.
    seen = counts(matrix_of(one), one)
    assert (seen.num_passes, seen.num_proposed, seen.num_accepted) == (4, 9, 8)


def test_a_stop_token_may_be_drafted_and_the_last_token_of_a_limit_is_not() -> None:
    one = observation("request", num_tokens=5)
    by_limit = counts(matrix_of(one), one, num_draft_tokens=4)
    by_stop = counts(matrix_of(one), msgspec.structs.replace(one, finish_reason="stop"), num_draft_tokens=4)
    assert (by_limit.num_passes, by_limit.num_accepted) == (2, 3)
    assert (by_stop.num_passes, by_stop.num_accepted) == (2, 4)


def test_an_empty_matrix_learns_within_the_request_and_nothing_before() -> None:
    counting = observation("request", num_tokens=12)
    assert counts(None, counting).num_accepted == 0
    # 1 2 1 2 ...: each row is of use at the next turn of the circle.
    circling = np.tile([1, 2], 6)
    one = msgspec.structs.replace(
        counting,
        prompt_ids=pack_ids([1, 2, 1, 2]),
        output_ids=pack_ids(circling),
        top_ids=pack_ids(np.stack([circling, circling + 10, circling + 20, circling + 30], axis=1).ravel()),
    )
    assert counts(None, one).num_accepted > 4


def test_replay_leaves_the_matrix_alone_and_a_later_chunk_may_draft_at_once() -> None:
    one = observation("request", num_tokens=8)
    start = matrix_of(observation("request", num_tokens=12))
    before = start.digest
    first = counts(start, one)
    later = counts(start, msgspec.structs.replace(one, chunk=1))
    assert matrix_digest(start.matrix) == before
    assert first == counts(start, one)
    assert later.num_passes < first.num_passes


def test_no_draft_tokens_is_plain_decoding() -> None:
    one = observation("request", num_tokens=6)
    plain = AcceptanceCounts(num_passes=6, num_proposed=0, num_accepted=0)
    assert counts(matrix_of(one), one, num_draft_tokens=0) == plain


def test_overlap_is_the_mass_that_stored_rows_share_with_the_target() -> None:
    one = observation("request", num_tokens=6)
    known = score_matrix(matrix_of(one), one, vocab_size=VOCAB_SIZE, num_draft_tokens=3)
    assert known.overlap_sum / known.num_tokens == pytest.approx(0.96, abs=0.01)
    assert score_matrix(None, one, vocab_size=VOCAB_SIZE, num_draft_tokens=3).overlap_sum == 0.0


def drawn_by(seed: int, *, num_tokens: int) -> Observation:
    """Four tokens are equally likely behind each one, and at temperature 1 this request's noise chose among them."""
    sampling = SamplingRecord(temperature=1.0, top_k=0, top_p=1.0, seed=seed)
    draw = sample_rows([row_bytes(seed=seed, temperature=1.0)], [0])[0]
    ids, top_ids = [1, 2, 3, 4], []
    for position in range(4, 4 + num_tokens):
        top_ids.append([(ids[-1] + step) % VOCAB_SIZE for step in (1, 4, 6, 9)])
        noise_N = noise_of_tokens(torch.tensor(top_ids[-1]), draw, position)
        ids.append(top_ids[-1][int(noise_N.argmax())])
    return msgspec.structs.replace(
        observation("request", num_tokens=num_tokens),
        sampling=sampling,
        prompt_ids=pack_ids(ids[:4]),
        output_ids=pack_ids(ids[4:]),
        top_ids=pack_ids(np.array(top_ids).ravel()),
        top_logprobs=pack_floats(np.full(4 * num_tokens, np.log(0.25)), bits=16),
    )


def test_at_a_temperature_the_tree_follows_the_requests_own_noise() -> None:
    one = drawn_by(3, num_tokens=100)
    start = matrix_of(drawn_by(4, num_tokens=300))
    of_another = msgspec.structs.replace(one, sampling=msgspec.structs.replace(one.sampling, seed=5))
    assert counts(start, one).num_accepted > 1.5 * counts(start, of_another).num_accepted
