"""What the engine promises beside exact tokens: limits, ends, cancellation, observations."""

from __future__ import annotations

import math
import random
import threading

import msgspec
import numpy as np
import pytest
import torch
from conftest import LIMITS, Served, make_engine, request_for, serve

from slipstream.acceptance import acceptance_length, acceptance_rate, count
from slipstream.engine.engine import Engine
from slipstream.engine.request import Request, SamplingParams, TokenBlock
from slipstream.engine.runner import EngineRunner
from slipstream.errors import ArtifactRejected, EngineStopped, QueueFull, RequestError
from slipstream.models.checkpoint import Checkpoint
from slipstream.models.decoder import causal_logits, initial_draft
from slipstream.records import Observation, decode_observation, encode, observation_id, unpack_floats, unpack_ids
from slipstream.telemetry import ReplicaMetrics

Prompts = list[tuple[int, ...]]


def a_request(prompt: tuple[int, ...], *, name: str = "one", **sampling: object) -> Request:
    params = SamplingParams(**{"seed": 1, "max_tokens": 8, "temperature": 0.0} | sampling)  # type: ignore[arg-type]
    return Request(
        request_id=name,
        prompt_ids=prompt,
        sampling=params,
        tenant="anonymous",
        domain="math",
        may_train=True,
        arrived_at=0.0,
    )


def test_max_tokens_is_exact_and_a_stop_token_ends_the_block(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts
) -> None:
    for max_tokens in (1, 2, 3, 7):
        run = serve(target, prompts[:4], Served(draft=sibling, max_tokens=max_tokens))
        assert [len(output) for output in run.outputs] == [max_tokens] * 4
        assert {blocks[-1].finish_reason for blocks in run.blocks} == {"length"}
    run = serve(target, prompts[16:32], Served(draft=sibling, max_tokens=200))
    stopped = [
        output for output, blocks in zip(run.outputs, run.blocks, strict=True) if blocks[-1].finish_reason == "stop"
    ]
    assert len(stopped) >= 8
    assert all(output[-1] == 0 and 0 not in output[:-1] for output in stopped)


def test_every_output_token_comes_in_one_block_and_only_the_last_block_says_why(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts
) -> None:
    run = serve(target, prompts[:6], Served(draft=sibling))
    for blocks in run.blocks:
        assert [block.finish_reason for block in blocks[:-1]] == [None] * (len(blocks) - 1)
        assert all(block.token_ids for block in blocks)
        assert all(len(block.token_ids) <= block.num_accepted + 1 for block in blocks)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (a_request(()), ["empty", "at least one token"]),
        (a_request((1, 2), max_tokens=0), ["max_tokens is 0", "at least 1"]),
        (a_request((1, 2), max_tokens=2000), ["2 tokens", "2002", "1024"]),
        (a_request((1, 5000)), ["5000", "4095"]),
        (a_request((1,), seed=2**63), ["seed", "2**63"]),
        (a_request((1,), temperature=-0.5), ["temperature is -0.5", "0 <= temperature"]),
        (a_request((1,), temperature=math.nan), ["temperature is nan", "finite"]),
        (a_request((1,), temperature=math.inf), ["temperature is inf", "finite"]),
        (a_request((1,), top_k=-1), ["top_k is -1", "0 (off)"]),
        (a_request((1,), top_p=0.0), ["top_p is 0.0", "0 < top_p <= 1"]),
        (a_request((1,), top_p=math.nan), ["top_p is nan", "0 < top_p <= 1"]),
        (a_request((1,), min_p=1.1), ["min_p is 1.1", "0 <= min_p <= 1"]),
        (a_request((1,), repetition_penalty=0.0), ["repetition_penalty is 0.0", "above 0"]),
        (a_request((1,), stop_token_ids=(7, 2**31)), ["stop_token_ids has 2147483648", "0 <= id < 2147483648"]),
        (a_request((1,), presence_penalty=2.5), ["presence_penalty is 2.5", "-2 <= presence_penalty <= 2"]),
        (a_request((1,), frequency_penalty=-2.5), ["frequency_penalty is -2.5", "-2 <= frequency_penalty <= 2"]),
        (a_request((1,), logit_bias=((4096, 1.0),)), ["logit_bias", "4096", "4095"]),
        (a_request((1,), logit_bias=((1, -100.5),)), ["logit_bias is -100.5", "-100 <= logit_bias <= 100"]),
        (a_request((1,), stop_strings=("end",)), ["stop strings", "stop_token_ids"]),
        (msgspec.structs.replace(a_request((1,)), num_logprobs=21), ["logprobs is 21", "0..20"]),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_values(
    target: Checkpoint, request_: Request, words: list[str]
) -> None:
    engine = make_engine(target, Served(), [], ReplicaMetrics())
    with pytest.raises(RequestError) as error:
        engine.submit(request_, lambda _: None)
    assert all(word in str(error.value) for word in words)
    assert error.value.param


def test_a_request_that_can_never_fit_the_cache_is_refused(target: Checkpoint) -> None:
    served = Served(limits=msgspec.structs.replace(LIMITS, num_blocks=4))
    engine = make_engine(target, served, [], ReplicaMetrics())
    engine.submit(a_request((1,) * 56, max_tokens=8), lambda _: None)
    with pytest.raises(RequestError, match="together 65; the K/V cache holds 64 positions"):
        engine.submit(a_request((1,) * 57, max_tokens=8), lambda _: None)


def test_the_queue_is_bounded(target: Checkpoint, prompts: Prompts) -> None:
    served = Served(limits=msgspec.structs.replace(LIMITS, max_running_requests=2, max_queued_requests=3))
    engine = make_engine(target, served, [], ReplicaMetrics())
    for index in range(5):
        engine.submit(request_for(index, prompts[index], served), lambda _: None)
    with pytest.raises(QueueFull, match="limit is 3"):
        engine.submit(request_for(5, prompts[5], served), lambda _: None)


def test_a_cancelled_request_frees_its_slot_and_gets_nothing_more(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts
) -> None:
    served = Served(draft=sibling, max_tokens=100, limits=msgspec.structs.replace(LIMITS, max_running_requests=1))
    observations: list[Observation] = []
    engine = make_engine(target, served, observations, ReplicaMetrics())
    first: list[TokenBlock] = []
    second: list[TokenBlock] = []
    engine.submit(request_for(0, prompts[0], served), first.append)
    engine.submit(request_for(1, prompts[1], served), second.append)
    engine.step()
    engine.step()
    num_blocks = len(first)
    engine.cancel("request-0")
    while engine.step():
        pass
    assert len(first) == num_blocks
    assert second[-1].finish_reason is not None
    assert engine.num_running == 0
    left = next(one for one in observations if one.request_id == "request-0")
    assert left.finish_reason == "cancelled"
    assert unpack_ids(left.output_ids).tolist() == [token for block in first for token in block.token_ids]


def test_an_observation_says_what_the_target_said(target: Checkpoint, sibling: Checkpoint, prompts: Prompts) -> None:
    run = serve(target, prompts[:5], Served(draft=sibling, temperature=1.0, max_tokens=40))
    assert len(run.observations) == 5
    for observation in run.observations:
        assert decode_observation(encode(observation)) == observation
        index = int(observation.request_id.split("-")[1])
        output = unpack_ids(observation.output_ids)
        assert tuple(unpack_ids(observation.prompt_ids)) == prompts[index]
        assert output.tolist() == run.outputs[index]
        ids = torch.tensor([[*prompts[index], *output.tolist()]])
        logprobs = causal_logits(target.config, target.weights, ids)[0].log_softmax(-1)[len(prompts[index]) - 1 : -1]
        emitted = logprobs.gather(1, torch.tensor(output, dtype=torch.int64).unsqueeze(1)).squeeze(1)
        assert np.abs(unpack_floats(observation.output_logprobs, bits=32) - emitted.numpy()).max() < 1e-3
        top = logprobs.topk(16, dim=-1)
        kept = unpack_floats(observation.top_logprobs, bits=16).reshape(-1, 16)
        assert np.abs(kept - top.values.numpy()).max() < 0.02
        assert observation.first_position == len(prompts[index])
        assert observation.routing is not None
        assert len(observation.routing.expert_ids) == 2 * len(output) * 4 * 2


def test_the_rounds_of_an_observation_add_up_to_its_output(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts
) -> None:
    run = serve(target, prompts[:8], Served(draft=sibling, max_tokens=30))
    for observation in run.observations:
        output = unpack_ids(observation.output_ids).tolist()
        starts = [one.start for one in observation.rounds]
        ends = [*starts[1:], len(output)]
        assert starts[0] == 0
        for one, end in zip(observation.rounds, ends, strict=True):
            accepted = output[one.start : one.start + one.num_accepted]
            assert list(one.proposed[: one.num_accepted]) == accepted
            assert end - one.start in (one.num_accepted, one.num_accepted + 1)
    counts = count(one for observation in run.observations for one in observation.rounds)
    assert counts.num_accepted == run.metric("accepted_tokens_total", domain="math")
    assert counts.num_proposed == run.metric("draft_tokens_total", domain="math")
    assert counts.num_passes == run.metric("verification_passes_total", domain="math")
    assert 0 < acceptance_rate(counts) < 1 < acceptance_length(counts)


def test_a_no_train_request_leaves_no_observation(target: Checkpoint, prompts: Prompts) -> None:
    assert serve(target, prompts[:3], Served(may_train=False, max_tokens=5)).observations == []


def test_a_long_request_is_cut_into_chunks(target: Checkpoint, sibling: Checkpoint, prompts: Prompts) -> None:
    served = Served(draft=sibling, temperature=1.5, max_tokens=600, seed=3)
    run = serve(target, prompts[:2], served)
    longest = max(run.outputs, key=len)
    assert len(longest) > 512
    chunks = [one for one in run.observations if one.request_id == f"request-{run.outputs.index(longest)}"]
    assert [observation_id(one).split("/")[1] for one in chunks] == ["0", "1"]
    assert unpack_ids(chunks[1].prompt_ids).tolist()[-512:] == longest[:512]
    assert [token for one in chunks for token in unpack_ids(one.output_ids).tolist()] == longest
    assert all(0 <= one.start < len(unpack_ids(chunk.output_ids)) for chunk in chunks for one in chunk.rounds)


def test_a_draft_of_another_vocabulary_or_with_nan_is_refused(target: Checkpoint) -> None:
    engine = make_engine(target, Served(), [], ReplicaMetrics())
    config, weights = initial_draft(512, seed=0)
    with pytest.raises(ArtifactRejected, match="512 tokens, the target 4096"):
        engine.install_draft(Checkpoint(config, weights, "digest"), version=2)
    config, weights = initial_draft(4096, seed=0)
    weights["model.norm.weight"][0] = torch.nan
    with pytest.raises(ArtifactRejected, match=r"model\.norm\.weight"):
        engine.install_draft(Checkpoint(config, weights, "digest"), version=2)
    assert engine.draft_version == 0


class BreaksOnce(Engine):
    """An engine whose third step fails, as a bug or a full memory would make it."""

    num_steps = 0

    def step(self) -> bool:
        self.num_steps += 1
        if self.num_steps == 3:
            raise RuntimeError("out of memory")
        return super().step()


def test_a_step_that_breaks_fails_its_requests_and_the_next_ones_are_served(
    target: Checkpoint, prompts: Prompts
) -> None:
    engine = BreaksOnce(
        target,
        limits=LIMITS,
        target_digest="t",
        replica_id="r",
        top_n=4,
        observe=lambda _: None,
        metrics=ReplicaMetrics(),
    )
    runner = EngineRunner(engine)
    runner.start()
    ended = threading.Event()
    blocks: list[TokenBlock] = []

    def on_block(block: TokenBlock) -> None:
        blocks.append(block)
        if block.finish_reason:
            ended.set()

    runner.submit(a_request(prompts[0], max_tokens=50), on_block)
    assert ended.wait(60)
    assert blocks[-1].finish_reason == "error"
    assert "may be sent again" in blocks[-1].error
    ended.clear()
    runner.submit(a_request(prompts[0], name="two", max_tokens=3), on_block)
    assert ended.wait(60)
    assert blocks[-1].finish_reason == "length"
    assert runner.is_healthy()
    runner.stop(10)
    with pytest.raises(EngineStopped):
        runner.submit(a_request(prompts[0], name="three"), on_block)


@pytest.mark.usefixtures("exact_kernels")
def test_log_probabilities_are_the_targets_own_whatever_was_drafted(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts
) -> None:
    asked = {"temperature": 0.7, "max_tokens": 24, "num_logprobs": 3, "may_train": False, "top_k": 5}
    plain = serve(target, prompts[:4], Served(**asked))
    drafted = serve(target, prompts[:4], Served(draft=sibling, **asked))
    assert plain.outputs == drafted.outputs
    for index, output in enumerate(plain.outputs):
        said = [[one for block in run.blocks[index] for one in block.logprobs] for run in (plain, drafted)]
        assert said[0] == said[1]
        ids = torch.tensor([[*prompts[index], *output]])
        logprobs = causal_logits(target.config, target.weights, ids)[0].log_softmax(-1)[len(prompts[index]) - 1 : -1]
        for one, token, logprobs_V in zip(said[0], output, logprobs, strict=True):
            assert abs(one.logprob - float(logprobs_V[token])) < 1e-3
            top = logprobs_V.topk(3)
            assert [token for token, _ in one.top] == top.indices.tolist()
            assert np.abs(np.array([logprob for _, logprob in one.top]) - top.values.numpy()).max() < 1e-3


def test_a_request_may_ask_for_more_log_probabilities_than_are_observed(target: Checkpoint, prompts: Prompts) -> None:
    run = serve(target, prompts[:2], Served(max_tokens=6, num_logprobs=20))
    silent = serve(target, prompts[:2], Served(max_tokens=6))
    assert {len(one.top) for blocks in run.blocks for block in blocks for one in block.logprobs} == {20}
    assert all(block.logprobs == () for blocks in silent.blocks for block in blocks)
    same = [msgspec.structs.replace(one, at=0.0) for one in run.observations]
    assert same == [msgspec.structs.replace(one, at=0.0) for one in silent.observations]
    none = serve(target, prompts[:1], Served(max_tokens=6, num_logprobs=0, may_train=False))
    assert [one.top for block in none.blocks[0] for one in block.logprobs] == [()] * 6


@pytest.mark.usefixtures("exact_kernels")
def test_samples_of_a_call_differ_share_the_prompt_and_equal_themselves_alone(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts
) -> None:
    prompt = max(prompts, key=len)
    requests = [
        msgspec.structs.replace(a_request(prompt, name=f"call-{n}", temperature=1.0, max_tokens=16, sample_index=n))
        for n in range(6)
    ]
    metrics = ReplicaMetrics()
    engine = make_engine(target, Served(draft=sibling), [], metrics)
    together = answers(engine, requests)
    assert len({tuple(tokens) for tokens in together}) >= 5
    hits = metrics.registry.get_sample_value("slipstream_prefix_hit_tokens_total")
    assert hits == 5 * ((len(prompt) - 1) // 16 * 16)
    alone = [answers(make_engine(target, Served(), [], ReplicaMetrics()), [request])[0] for request in requests]
    assert alone == together


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    blocks: list[list[TokenBlock]] = [[] for _ in requests]
    for request, some in zip(requests, blocks, strict=True):
        engine.submit(request, some.append)
    while engine.step():
        pass
    return [[token for block in some for token in block.token_ids] for some in blocks]


def test_many_requests_that_come_and_leave_at_random_lose_no_block_and_no_end(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts
) -> None:
    rng = random.Random(5)
    sizes = msgspec.structs.replace(LIMITS, num_blocks=70, max_step_tokens=96)
    observations: list[Observation] = []
    engine = make_engine(target, Served(draft=sibling, limits=sizes), observations, ReplicaMetrics())
    ended: dict[str, str] = {}
    cancelled: set[str] = set()
    for number in range(240):
        prompt = rng.choice(prompts) * rng.choice([1, 1, 1, 3])
        name = f"request-{number}"
        request = a_request(prompt, name=name, seed=number, temperature=1.0, max_tokens=rng.randrange(1, 30))

        def on_block(block: TokenBlock) -> None:
            if block.finish_reason is not None:
                assert block.request_id not in ended
                ended[block.request_id] = block.finish_reason

        engine.submit(request, on_block)
        if rng.random() < 0.2:
            left = f"request-{rng.randrange(max(number - 20, 0), number + 1)}"
            cancelled.add(left)
            engine.cancel(left)
        while engine.num_running + engine.num_waiting > 32 or rng.random() < 0.3:
            engine.step()
    while engine.step():
        pass
    assert engine.num_free_blocks == 70
    assert {f"request-{number}" for number in range(240)} - set(ended) <= cancelled
    assert len(ended) > 150
    assert set(ended.values()) <= {"stop", "length"}


def test_a_broken_step_gives_every_block_back(target: Checkpoint, prompts: Prompts) -> None:
    engine = make_engine(target, Served(), [], ReplicaMetrics())
    blocks: list[TokenBlock] = []
    for number in range(4):
        engine.submit(request_for(number, prompts[number], Served()), blocks.append)
    engine.step()
    engine.step()
    assert engine.num_free_blocks < LIMITS.num_blocks
    engine.fail_all("broken")
    assert engine.num_free_blocks == LIMITS.num_blocks
    assert [block.error for block in blocks[-4:]] == ["broken"] * 4
    assert answers(engine, [a_request(prompts[0], name="next")]) == answers(
        make_engine(target, Served(), [], ReplicaMetrics()), [a_request(prompts[0])]
    )
