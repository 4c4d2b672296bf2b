"""The merged drafter in the engine: output never depends on it, and what it learns it learns from real passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import LIMITS, Run, Served, request_for, serve

import slipstream_kernels
from slipstream.drafting.chain import ChainDrafter
from slipstream.drafting.drafter import DraftContext, StepLoad
from slipstream.drafting.economy import REST_STEPS, Economy, Took
from slipstream.drafting.merge import ALL_SOURCES, DraftingOptions, MergedDrafter, Source
from slipstream.drafting.merged_survival import MergedSurvival
from slipstream.drafting.modes import Mode
from slipstream.drafting.recycling_artifact import load_matrix
from slipstream.drafting.step_cost import NodeCosts
from slipstream.drafting.tree import DraftTree
from slipstream.engine.engine import Engine
from slipstream.engine.request import SamplingParams, TokenBlock
from slipstream.errors import ArtifactRejected
from slipstream.models.checkpoint import Checkpoint
from slipstream.telemetry import ReplicaMetrics
from slipstream_kernels.chain import ChainWorth
from slipstream_kernels.merging import Chains

Prompts = list[tuple[int, ...]]

pytestmark = pytest.mark.usefixtures("exact_kernels")

SIZES = msgspec.structs.replace(LIMITS, num_draft_tokens=8)

ALWAYS_WORTH = ChainWorth(0.0, 0.0, *np.ones((2, 8, 12)))

SAMPLINGS = [
    SamplingParams(seed=3, max_tokens=20, temperature=temperature, **filters)  # type: ignore[arg-type]
    for temperature, filters in ((0.0, {}), (1.0, {}), (0.7, {"top_p": 0.8}), (1.5, {"top_k": 20, "min_p": 0.01}))
]


@pytest.fixture(scope="module", params=[0.0, 0.6, 1.0], ids=["greedy", "cooled", "sampled"])
def plain(request: pytest.FixtureRequest, target: Checkpoint, prompts: Prompts) -> tuple[float, Run]:
    """Without drafts, at a temperature."""
    temperature: float = request.param
    return temperature, serve(target, prompts[::4], Served(temperature=temperature, limits=SIZES))


def merged_of(engine: Engine) -> MergedDrafter:
    drafter = engine.drafter
    assert isinstance(drafter, MergedDrafter)
    return drafter


def economy_of(drafter: MergedDrafter) -> Economy:
    assert drafter.economy is not None
    return drafter.economy


@pytest.mark.parametrize("running", [1, 12])
@pytest.mark.parametrize(
    ("sources", "fixed_nodes"),
    [
        (ALL_SOURCES, 0),
        (ALL_SOURCES, 8),
        (("chain",), 4),
        (("recycling",), 8),
        (("lookup",), 8),
        (("pool", "lookup"), 3),
        (("recycling", "lookup", "pool"), 0),
    ],
)
def test_no_choice_of_drafters_changes_a_token(
    target: Checkpoint,
    sibling: Checkpoint,
    prompts: Prompts,
    plain: tuple[float, Run],
    sources: tuple[Source, ...],
    fixed_nodes: int,
    running: int,
) -> None:
    temperature, expected = plain
    sizes = msgspec.structs.replace(SIZES, max_running_requests=running)
    options = DraftingOptions(sources=sources, fixed_nodes=fixed_nodes)
    served = Served(temperature=temperature, limits=sizes, drafting=options, draft=sibling)
    run = serve(target, prompts[::4], served)
    assert run.outputs == expected.outputs
    assert run.num_free_blocks == expected.num_free_blocks
    if fixed_nodes:
        assert run.metric("draft_tokens_total", domain="math") > 0
        assert run.metric("accepted_tokens_total", domain="math") > 0


def test_swaps_of_drafts_and_matrices_change_no_token(
    target: Checkpoint,
    sibling: Checkpoint,
    general: Checkpoint,
    prompts: Prompts,
    plain: tuple[float, Run],
    tmp_path: Path,
) -> None:
    temperature, expected = plain
    installed: list[str] = []

    def swap(engine: Engine, step: int) -> None:
        if step == 6:
            digest = merged_of(engine).recycling.snapshot(tmp_path)
            installed.append(digest)
        if step in (8, 16):
            engine.install_draft(general if step == 8 else None, version=step)
            engine.install_draft(sibling, version=step + 1, domain="math")
            matrix = load_matrix(tmp_path, vocab_size=engine.vocab_size, digest=installed[0])
            engine.install_matrix(matrix, version=step + 2)

    options = DraftingOptions(fixed_nodes=6)
    served = Served(temperature=temperature, limits=SIZES, drafting=options, draft=sibling)
    run = serve(target, prompts[::4], served, swap)
    assert run.outputs == expected.outputs
    versions = {block.draft_version for blocks in run.blocks for block in blocks}
    assert versions >= {0, 1, 9, 17}


def test_a_domain_gets_its_own_draft_and_the_others_that_of_the_default(
    target: Checkpoint, sibling: Checkpoint, general: Checkpoint, prompts: Prompts
) -> None:
    engine = _engine(target, DraftingOptions(sources=("chain",), fixed_nodes=3))
    engine.install_draft(general, version=1)
    engine.install_draft(sibling, version=2, domain="math")
    versions: dict[str, set[int]] = {"math": set(), "other": set()}
    for index, domain in enumerate(("math", "other")):
        request = request_for(index, prompts[index], Served())
        request = msgspec.structs.replace(request, domain=domain, request_id=domain)
        engine.submit(request, lambda block: versions[block.request_id].add(block.draft_version))
    while engine.step():
        pass
    assert versions == {"math": {0, 2}, "other": {0, 1}}
    with pytest.raises(ArtifactRejected, match="one draft for all"):
        _engine(target, None).install_draft(sibling, version=2, domain="math")


def test_repetition_is_learned_and_drafted_without_any_draft_model(target: Checkpoint, prompts: Prompts) -> None:
    engine = _engine(target, DraftingOptions(fixed_nodes=4))
    again = [prompts[3]] * 3
    rates = []
    for index, prompt in enumerate(again):
        blocks: list[TokenBlock] = []
        engine.submit(request_for(index, prompt, Served()), blocks.append)
        while engine.step():
            pass
        rates.append(sum(len(block.token_ids) for block in blocks) / len(blocks))
    assert rates[0] < rates[2], "the pool knows the answer by now"
    assert rates[2] > 3.0


def test_estimates_come_to_say_what_happens(target: Checkpoint, sibling: Checkpoint, prompts: Prompts) -> None:
    engines: list[Engine] = []
    options = DraftingOptions(fixed_nodes=8)
    served = Served(limits=SIZES, drafting=options, draft=sibling, max_tokens=64)
    serve(target, prompts, served, lambda engine, _: engines.append(engine))
    drafter = merged_of(engines[-1])
    greedy, sampled = drafter.merged
    assert greedy.curve.sums[0].sum() > 10_000
    assert sampled.curve.sums[0].sum() == 0, "nothing was drawn above temperature 0"
    assert drafter.calibration_error() <= 0.05
    agreed = np.array([[0.8, 0.8, 0.8]])
    assert greedy.shares(agreed) > MergedSurvival().shares(agreed) + 0.05


class FixedCost:
    """What steps cost, as told instead of measured."""

    mean_error_ratio = 0.0

    def __init__(self, per_node: float) -> None:
        self._per_node = per_node

    def over_nodes(self, *, num_rows: int, max_nodes: int, context_tokens: float) -> NodeCosts:
        seconds = 1.0 + self._per_node * np.arange(max_nodes + 1.0)
        return NodeCosts(seconds, self._per_node, np.full(max_nodes + 1, 0.2))

    def observe(self, *, num_rows: int, context_tokens: float, seconds: float, num_experts: float | None) -> None:
        pass

    def keep_pace(self, ratio: float, *, pace_share: float) -> None:
        pass


def let_steps_cost(drafter: MergedDrafter, per_node: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are said to take 1 s and `per_node` s a node, and to have taken that; drafting takes 0.1 s more."""
    economy = economy_of(drafter)
    settle = economy.settle
    economy.step_cost = FixedCost(per_node)  # type: ignore[assignment]
    monkeypatch.setattr(economy, "settle", lambda took: settle(took._replace(spared_s=0.0)))
    propose, finished, num_nodes, drafting_s = drafter.propose, drafter.finished, 0, 0.0

    def counting(contexts: Sequence[DraftContext]) -> list[DraftTree]:
        nonlocal num_nodes, drafting_s
        trees = propose(contexts)
        num_nodes, drafting_s = sum(len(tree.token_ids) for tree in trees), 0.1
        return trees

    def told(*, step_s: float, pass_s: float, num_tokens: int) -> None:
        nonlocal num_nodes, drafting_s
        took_s = 1.0 + per_node * num_nodes
        finished(step_s=took_s + drafting_s, pass_s=took_s, num_tokens=num_tokens)
        num_nodes, drafting_s = 0, 0.0

    monkeypatch.setattr(drafter, "propose", counting)
    monkeypatch.setattr(drafter, "finished", told)


@pytest.mark.parametrize(("per_node", "is_off"), [(1.5, True), (0.01, False)])
def test_speculation_is_off_where_nodes_cost_more_than_they_bring(
    target: Checkpoint,
    sibling: Checkpoint,
    prompts: Prompts,
    per_node: float,
    is_off: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = _engine(target, DraftingOptions(), max_running_requests=1)
    drafter = merged_of(engine)
    let_steps_cost(drafter, per_node, monkeypatch)
    engine.install_draft(sibling, version=1)
    for index, prompt in enumerate(prompts[:16]):
        engine.submit(request_for(index, prompt, Served(max_tokens=64)), lambda _: None)
    while engine.step():
        pass
    counts = economy_of(drafter).modes.counts
    assert (counts[Mode.OFF] > 0.5 * counts.total()) == is_off
    assert (counts[Mode.CHAIN] > 0.5 * counts.total()) == (not is_off)


def test_choosing_a_mode_and_learning_are_a_part_of_what_a_step_takes_beside_its_pass(
    target: Checkpoint, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _engine(target, DraftingOptions(), max_running_requests=4)
    economy = economy_of(merged_of(engine))
    settle, seen = economy.settle, list[Took]()

    def watching(took: Took) -> None:
        seen.append(took)
        settle(took)

    monkeypatch.setattr(economy, "settle", watching)
    for index, prompt in enumerate(prompts[:4]):
        engine.submit(request_for(index, prompt, Served(max_tokens=32)), lambda _: None)
    while engine.step():
        pass
    assert len(seen) > 16
    assert all(0 < one.spared_s < one.step_s - one.pass_s for one in seen)


def test_while_speculation_is_off_few_steps_are_asked_about_until_a_draft_comes(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _engine(target, DraftingOptions(), max_running_requests=1)
    drafter = merged_of(engine)
    let_steps_cost(drafter, 1.5, monkeypatch)
    counts, wants, num_asked = economy_of(drafter).modes.counts, drafter.wants, 0

    def counting(load: StepLoad, *, can_draft: bool) -> bool:
        nonlocal num_asked
        num_asked += 1
        return wants(load, can_draft=can_draft)

    monkeypatch.setattr(drafter, "wants", counting)
    for index, prompt in enumerate(prompts[:24]):
        engine.submit(request_for(index, prompt, Served(max_tokens=64)), lambda _: None)
    num_steps = 0
    while not (drafter.rests and num_steps > 600):
        assert engine.step()
        num_steps += 1
    assert counts[Mode.OFF] > 0.5 * num_steps
    assert num_asked < 0.5 * num_steps
    assert counts.total() <= num_steps + REST_STEPS
    engine.install_draft(sibling, version=1)
    engine.step()
    assert counts[Mode.CHAIN] == 1


def test_what_a_tenant_wrote_is_found_by_that_tenant_alone(target: Checkpoint, prompts: Prompts) -> None:
    engine = _engine(target, DraftingOptions(sources=("pool",), fixed_nodes=4))
    accepted: dict[str, int] = {}
    for index, tenant in enumerate(("writer", "writer", "reader")):
        request = msgspec.structs.replace(
            request_for(index, prompts[3], Served()), tenant=tenant, request_id=f"{tenant}-{index}"
        )
        blocks: list[TokenBlock] = []
        engine.submit(request, blocks.append)
        while engine.step():
            pass
        accepted[request.request_id] = sum(block.num_accepted for block in blocks)
    assert accepted["writer-1"] > 10
    assert accepted["writer-0"] == accepted["reader-2"] == 0


@pytest.mark.parametrize("source", ["pool", "recycling"])
@pytest.mark.parametrize("max_tenants", [None, 2])
def test_what_may_not_be_learned_from_is_not_found_again(
    target: Checkpoint, prompts: Prompts, source: Source, max_tenants: int | None
) -> None:
    accepted: dict[bool, int] = {}
    for may_train in (True, False):
        engine = _engine(target, DraftingOptions(sources=(source,), fixed_nodes=4, max_tenants=max_tenants))
        for index in range(2):
            blocks: list[TokenBlock] = []
            engine.submit(request_for(index, prompts[3], Served(may_train=may_train)), blocks.append)
            while engine.step():
                pass
        accepted[may_train] = sum(block.num_accepted for block in blocks)
    assert accepted[True] > 10
    assert accepted[False] == 0


def test_a_budget_needs_to_know_what_steps_cost() -> None:
    with pytest.raises(ValueError, match="either fixed_nodes or an economy"):
        MergedDrafter(DraftingOptions(), vocab_size=8, num_slots=1, max_nodes=4, economy=None)


def _engine(target: Checkpoint, options: DraftingOptions | None, **sizes: int) -> Engine:
    return Engine(
        target,
        limits=msgspec.structs.replace(SIZES, **sizes),
        target_digest=target.digest,
        replica_id="replica-1",
        top_n=4,
        observe=lambda _: None,
        metrics=ReplicaMetrics(),
        drafting=options,
    )


@pytest.mark.parametrize(("num_requests", "window"), [(1, 10), (3, 30)])
def test_a_draft_that_fell_behind_reads_a_window_and_drafts_what_it_would_have_drafted_there(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts, num_requests: int, window: int
) -> None:
    text = [*prompts[3], *prompts[4], *prompts[5]]
    assert len(text) > 80
    in_window, fresh = _chains(sibling, window), _chains(sibling, None)
    sampling = SamplingParams(seed=1, max_tokens=9, temperature=0.0)

    def contexts(tokens: Sequence[int]) -> list[DraftContext]:
        return [DraftContext(slot, tokens, sampling, 5, 5) for slot in range(num_requests)]

    assert (
        in_window.draft(contexts(text), max_tokens=5).token_ids_BSR.tolist()
        == fresh.draft(contexts(text[-40:]), max_tokens=5).token_ids_BSR.tolist()
    )
    assert not in_window.was_level
    again, short = contexts([*text, 5, 7]), contexts([*text[-40:], 5, 7])
    assert in_window.propose(again) == fresh.propose(short)
    assert in_window.was_level


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draft_goes_on_as_if_it_had_read_the_text_where_another_token_came(
    sibling: Checkpoint, prompts: Prompts, sampling: SamplingParams
) -> None:
    drafter, fresh = _chains(sibling, None), _chains(sibling, None)
    contexts = [DraftContext(slot, prompts[slot], sampling, 6, 6) for slot in range(2)]
    drafted = drafter.draft(contexts, max_tokens=6, worth=ALWAYS_WORTH).token_ids_BSR[:, :, 0].tolist()
    for num_right, num_behind in ((2, 2), (2, 0), (0, 0), (6, 0)):
        for slot, ids in enumerate(drafted):
            wrong = [token ^ 1 for token in ids[num_right : num_right + 1]]
            behind = ids[num_right + 1 : num_right + 1 + num_behind]
            text = [*contexts[slot].token_ids, *ids[:num_right], *wrong, *behind]
            contexts[slot] = msgspec.structs.replace(contexts[slot], token_ids=text)
        chains = drafter.draft(contexts, max_tokens=6, worth=ALWAYS_WORTH)
        assert drafter.was_level, "what was right is not computed again"
        for one, other in zip(chains, fresh.draft(contexts, max_tokens=6, worth=ALWAYS_WORTH), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)
        for slot in range(2):
            fresh.release(slot)
        drafted = chains.token_ids_BSR[:, :, 0].tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_chains_that_are_not_worth_a_pass_end_alike_in_one_call_and_token_by_token(
    sibling: Checkpoint, prompts: Prompts, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = [DraftContext(slot, prompts[slot], sampling, 6, 6) for slot in range(3)]
    estimates = np.random.default_rng(1).random((2, 8, 12)) ** 0.2
    bars = ((0.0, 0.0), (0.7, 0.0), (0.2, 1.1), (0.0, 9.0))
    worths = [ChainWorth(min_survival, pass_tokens, *estimates) for min_survival, pass_tokens in bars]

    def drafted() -> list[Chains]:
        return [_chains(sibling, None).draft(contexts, max_tokens=6, worth=worth) for worth in worths]

    at_once = drafted()
    monkeypatch.setattr("slipstream.drafting.chain.NativeDecoder", type("NoDecoder", (), {}))
    for one, other in zip(at_once, drafted(), strict=True):
        assert one.lengths_B.tolist() == other.lengths_B.tolist()
        for row, length in enumerate(one.lengths_B):
            assert one.token_ids_BSR[row, :length].tolist() == other.token_ids_BSR[row, :length].tolist()
            np.testing.assert_allclose(one.scores_BSR[row, :length], other.scores_BSR[row, :length], rtol=1e-9)
    lengths = [one.lengths_B.tolist() for one in at_once]
    assert lengths[0] == [6, 6, 6]
    assert min(lengths[1]) < max(lengths[1]), "each by what its own tokens survive"
    assert 1 < min(lengths[2]) == max(lengths[2]) < 6, "all together by what a pass costs"
    assert lengths[3] == [1, 1, 1]


@pytest.mark.usefixtures("compiled_kernels")
def test_chains_are_the_same_for_any_number_of_threads(sibling: Checkpoint, prompts: Prompts) -> None:
    samplings = (
        SamplingParams(seed=3, max_tokens=20, temperature=0.0),
        SamplingParams(seed=4, max_tokens=20, temperature=1.0),
        SamplingParams(seed=5, max_tokens=20, temperature=1.5, top_k=20, top_p=0.8),
    )
    contexts = [
        DraftContext(slot, prompts[slot], one, limit, limit)
        for slot, (one, limit) in enumerate(zip(samplings, (6, 2, 5), strict=True))
    ]
    drafted = []
    for num_threads in (1, 2, 3):
        slipstream_kernels.set_num_threads(num_threads)
        drafted.append(_chains(sibling, None).draft(contexts, max_tokens=6, worth=ALWAYS_WORTH))
    for chains in drafted:
        assert chains.lengths_B.tolist() == [6, 2, 5]
        for row, length in enumerate(chains.lengths_B):
            assert np.array_equal(chains.token_ids_BSR[row, :length], drafted[0].token_ids_BSR[row, :length])
            assert np.array_equal(chains.scores_BSR[row, :length], drafted[0].scores_BSR[row, :length])


def test_a_chain_is_drawn_with_the_filters_of_its_request(sibling: Checkpoint, prompts: Prompts) -> None:
    greedy, filtered = (
        SamplingParams(seed=3, max_tokens=20, temperature=temperature, top_k=1) for temperature in (0.0, 5.0)
    )
    contexts = [DraftContext(slot, prompts[0], one, 6, 6) for slot, one in enumerate((greedy, filtered))]
    chains = _chains(sibling, None).draft(contexts, max_tokens=6, worth=ALWAYS_WORTH)
    assert chains.token_ids_BSR[0, :, 0].tolist() == chains.token_ids_BSR[1, :, 0].tolist()
    assert (chains.token_ids_BSR[1, :, 1] == -1).all()
    assert (chains.scores_BSR[1] == [1.0, 0.0]).all()
    unfiltered = msgspec.structs.replace(contexts[1], sampling=msgspec.structs.replace(filtered, top_k=0))
    of_fixed_length = [_chains(sibling, None).propose([one])[0].token_ids for one in (contexts[1], unfiltered)]
    assert of_fixed_length[0] == of_fixed_length[1], "as the gate's replay has them"


@pytest.mark.parametrize("is_at_once", [True, False])
def test_a_chain_ends_with_the_token_that_ends_the_output(
    sibling: Checkpoint, prompts: Prompts, is_at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_at_once:
        monkeypatch.setattr("slipstream.drafting.chain.NativeDecoder", type("NoDecoder", (), {}))
    sampling = SamplingParams(seed=3, max_tokens=20)
    contexts = [DraftContext(slot, prompts[slot], sampling, 6, 6) for slot in range(3)]
    whole = _chains(sibling, None).draft(contexts, max_tokens=6, worth=ALWAYS_WORTH).token_ids_BSR[:, :, 0].tolist()
    stopping = msgspec.structs.replace(sampling, stop_token_ids=(4095, whole[1][2]))
    contexts[1] = msgspec.structs.replace(contexts[1], sampling=stopping)
    ended = _chains(sibling, None).draft(contexts, max_tokens=6, worth=ALWAYS_WORTH)
    assert ended.lengths_B.tolist() == [6, 1 + whole[1].index(whole[1][2]), 6]
    for ids, like, length in zip(ended.token_ids_BSR[:, :, 0].tolist(), whole, ended.lengths_B.tolist(), strict=True):
        assert ids[:length] == like[:length]
    of_fixed_length = _chains(sibling, None).propose(contexts)
    assert [len(tree.token_ids) for tree in of_fixed_length] == [6, 6, 6], "as the gate's replay has them"


def _chains(draft: Checkpoint, window: int | None) -> ChainDrafter:
    return ChainDrafter(draft, version=1, num_slots=3, max_context_tokens=512, max_catch_up_tokens=512, window=window)


def test_metrics_say_what_was_decided_and_how_well_it_was_known(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts
) -> None:
    served = Served(limits=SIZES, drafting=DraftingOptions(), draft=sibling, max_tokens=96)
    run = serve(target, prompts, served)
    steps = sum(run.metric("drafting_steps_total", mode=mode) for mode in ("off", "floor", "chain"))
    assert steps > 30
    assert 0 < run.metric("survival_calibration_error") < 0.3
    assert run.metric("step_time_error_ratio") > 0
