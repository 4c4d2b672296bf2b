"""Replay of a draft against logged requests: by hand, and against what the engine really did."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from slipstream.acceptance import AcceptanceCounts, count
from slipstream.engine.engine import Engine
from slipstream.engine.request import Request, SamplingParams
from slipstream.engine.scheduler import EngineLimits
from slipstream.learning.shadow import ComparedVersions, ReplayScore, by_request, compare, score, simulated_rounds
from slipstream.models.checkpoint import Checkpoint, checkpoint_digest, load_checkpoint
from slipstream.models.decoder import initial_draft
from slipstream.records import Observation
from slipstream.telemetry import ReplicaMetrics
from tests.observed import VOCAB_SIZE, observation

MODELS = Path(__file__).parents[2] / "deploy" / "models"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def rounds_of(matches: str, **options: bool) -> list[tuple[int, int, int]]:
    flags = {"begins_request": False, "ends_by_limit": True} | options
    rounds = simulated_rounds([mark == "y" for mark in matches], num_draft_tokens=3, **flags)
    return [(one.start, len(one.proposed), one.num_accepted) for one in rounds]


def test_rounds_begin_again_behind_the_targets_own_token() -> None:
    # yy accepted, n is the target's; then n at once; then yyy accepted and one token of the target.
    assert rounds_of("yynnyyyny") == [(0, 3, 2), (3, 3, 0), (4, 3, 3), (8, 0, 0)]


def test_the_pass_that_ends_the_prompt_drafts_nothing() -> None:
    assert rounds_of("yyyyyy", begins_request=True) == [(0, 0, 0), (1, 3, 3), (5, 0, 0)]


def test_the_last_token_is_drafted_only_if_a_stop_token_ended_the_request() -> None:
    assert rounds_of("yyy") == [(0, 2, 2)]
    assert rounds_of("yyy", ends_by_limit=False) == [(0, 3, 3)]


def test_plain_decoding_has_acceptance_length_one_and_rate_zero() -> None:
    plain = by_request([score(None, observation("a"), num_draft_tokens=4)])["a"]
    assert (plain.acceptance_length, plain.acceptance_rate, plain.overlap) == (1.0, 0.0, 0.0)


def prompts() -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.from_file(str(MODELS / "mix-moe-11m" / "tokenizer.json"))
    questions = [f"Tom has {n} apples and buys {n + 3} more. How many apples does he have?" for n in range(3, 11)]
    questions += [f"Write SQL. What is the score when the round is {n}?" for n in range(1, 9)]
    return [tuple(tokenizer.encode(f"<|user|>{question}<|assistant|>").ids) for question in questions]


def served(draft: Checkpoint, *, temperature: float) -> list[Observation]:
    """What the engine logged while it served real prompts with this draft."""
    observed: list[Observation] = []
    engine = Engine(
        load_checkpoint(MODELS / "mix-moe-11m"),
        limits=EngineLimits(
            max_running_requests=32,
            max_queued_requests=32,
            max_step_tokens=512,
            max_context_tokens=1024,
            num_draft_tokens=4,
        ),
        target_digest="served",
        replica_id="replica",
        top_n=16,
        observe=observed.append,
        metrics=ReplicaMetrics(),
    )
    engine.install_draft(draft, version=1)
    for index, prompt in enumerate(prompts()):
        sampling = SamplingParams(seed=index, max_tokens=40, temperature=temperature, stop_token_ids=(0,))
        request = Request(
            request_id=f"request-{index}",
            prompt_ids=prompt,
            sampling=sampling,
            tenant="anonymous",
            domain="sql" if index >= 8 else "math",
            may_train=True,
            arrived_at=time.monotonic(),
        )
        engine.submit(request, lambda block: None)
    while engine.step():
        pass
    return sorted(observed, key=lambda one: one.request_id)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replay_of_a_draft_finds_what_the_engine_accepted_from_it(temperature: float) -> None:
    sibling = load_checkpoint(MODELS / "draft-2m-sibling")
    observations = served(sibling, temperature=temperature)
    assert {one.finish_reason for one in observations} == {"stop", "length"}
    replayed = [score(sibling, one, num_draft_tokens=4).counts for one in observations]
    logged = [count(one.rounds) for one in observations]
    assert [one.num_passes for one in replayed] == [one.num_passes for one in logged]
    assert [one.accepted_per_position for one in replayed] == [one.accepted_per_position for one in logged]
    assert sum(one.num_accepted for one in logged) > 50


def test_overlap_is_one_for_the_target_itself_up_to_what_was_not_kept() -> None:
    sibling = load_checkpoint(MODELS / "draft-2m-sibling")
    target = load_checkpoint(MODELS / "mix-moe-11m")
    observations = served(sibling, temperature=0.0)[:4]
    of_target = [score(target, one, num_draft_tokens=4) for one in observations]
    of_sibling = [score(sibling, one, num_draft_tokens=4) for one in observations]
    for one, other in zip(of_target, of_sibling, strict=True):
        assert 0.85 < one.overlap_sum / one.num_tokens <= 1.001
        assert other.overlap_sum < one.overlap_sum


def test_positions_beyond_the_drafts_table_get_no_candidate() -> None:
    config, weights = initial_draft(VOCAB_SIZE, seed=0)
    draft = Checkpoint(config, weights, checkpoint_digest(config, weights))
    long = observation("a", num_tokens=config.max_position_embeddings + 20)
    result = score(draft, long, num_draft_tokens=4)
    assert result.num_tokens == config.max_position_embeddings + 20


def scored(request_id: str, domain: str, *, passes: int, accepted: int) -> ReplayScore:
    counts = AcceptanceCounts(num_passes=passes, num_proposed=4 * passes, num_accepted=accepted)
    return ReplayScore(request_id=request_id, domain=domain, counts=counts, num_tokens=10, overlap_sum=5.0)


def test_comparison_pairs_requests_and_keeps_domains_apart() -> None:
    challenger = [
        scored("a", "math", passes=10, accepted=10),
        scored("b", "sql", passes=10, accepted=20),
        scored("a", "math", passes=10, accepted=0),
    ]
    champion = [scored(one.request_id, one.domain, passes=10, accepted=10) for one in challenger]
    of = ComparedVersions(domain="default", challenger_version=2, champion_version=1, look=1)
    report = compare(challenger, champion, of=of, num_recent=1, at=0.0)
    # Request a: 1 + 10/20 against 1 + 20/20; request b: 1 + 20/10 against 1 + 10/10; the newest request is b.
    assert report.recent == (1.0,)
    assert [(one.domain, one.differences) for one in report.domains] == [("math", (-0.5,)), ("sql", (1.0,))]
    assert report.domains[0].challenger_acceptance_rate == 0.125
    assert report.challenger_overlap == 0.5


def test_scores_of_different_requests_are_refused() -> None:
    of = ComparedVersions(domain="default", challenger_version=2, look=1)
    with pytest.raises(ValueError, match="score both on one list"):
        compare([scored("a", "math", passes=1, accepted=0)], [], of=of, num_recent=1, at=0.0)
