"""Observations made by hand: a small vocabulary, a rule that a draft can learn."""

from __future__ import annotations

import random

import msgspec
import numpy as np

from slipstream.records import Observation, SamplingRecord, pack_floats, pack_ids

VOCAB_SIZE = 64
TARGET_DIGEST = "f" * 64
TOP_N = 4


def observation(request_id: str, *, domain: str = "count", num_tokens: int = 12, chunk: int = 0) -> Observation:
    """A greedy request whose target counts upwards, sure of it: token i + 1 follows token i with probability 0.9."""
    start = random.Random(request_id).randrange(VOCAB_SIZE)
    ids = (start + np.arange(4 + num_tokens)) % VOCAB_SIZE
    output = ids[4:]
    top_ids = (output[:, None] + np.array([0, 3, 5, 7])) % VOCAB_SIZE
    top_logprobs = np.tile(np.log([0.9, 0.03, 0.02, 0.01]), (num_tokens, 1))
    return Observation(
        request_id=request_id,
        chunk=chunk,
        at=1.0,
        tenant="anonymous",
        domain=domain,
        sampling=SamplingRecord(temperature=0.0, top_k=0, top_p=1.0, seed=0),
        target_digest=TARGET_DIGEST,
        prompt_ids=pack_ids(ids[:4]),
        output_ids=pack_ids(output),
        output_logprobs=pack_floats(top_logprobs[:, 0], bits=32),
        top_n=TOP_N,
        top_ids=pack_ids(top_ids.ravel()),
        top_logprobs=pack_floats(top_logprobs.ravel(), bits=16),
        first_position=4,
        rounds=(),
        finish_reason="length",
        replica_id="replica",
    )


def of_another_target(one: Observation) -> Observation:
    return msgspec.structs.replace(one, target_digest="0" * 64)
