"""The verification rules as the engine runs them: the target's law is kept, and plain output where that is promised.

Laws are compared by chi-square over the answers of 2,500 short requests, one a seed. The bound is ten standard
deviations above the statistic's mean: alpha is 2e-12 with 63 degrees of freedom. From a total variation of 0.143 on a
bias is caught with three standard deviations to spare. Seeds are fixed: a result never changes by chance.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import pytest
import torch

from slipstream.drafting.drafter import DraftContext, Drafter
from slipstream.drafting.rsd import NoiseKind, RsdDrafter, RsdShape, beam_search, constant_branching
from slipstream.drafting.tree import NO_DRAFT, DraftTree, chain_tree, drafting_nodes, part_of
from slipstream.engine.engine import Engine
from slipstream.engine.request import Request, SamplingParams
from slipstream.engine.sampling import RowsOfRequest, choose_tokens, target_probs
from slipstream.engine.scheduler import EngineLimits
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.models.decoder import causal_logits
from slipstream.telemetry import ReplicaMetrics
from slipstream.verification import sound_nodes
from tests.families import random_checkpoint
from tests.unit.keyed_decoding import excess, smallest_detectable

VOCAB_SIZE = 4
PROMPT = (1, 3, 2)
NUM_REQUESTS = 2500
LENGTH = 3
"""Tokens compared: the prompt's pass gives the first, a tree the second and the third."""

Law = dict[tuple[int, ...], float]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    """A random target and a random draft of four tokens."""
    folder = tmp_path_factory.mktemp("toys")
    target = random_checkpoint("qwen3_moe", folder / "target", seed=1, vocab_size=VOCAB_SIZE)
    draft = random_checkpoint("llama", folder / "draft", seed=2, vocab_size=VOCAB_SIZE)
    return load_checkpoint(target), load_checkpoint(draft)


@pytest.fixture(scope="module")
def law(toys: tuple[Checkpoint, Checkpoint]) -> Law:
    """What the target says of every answer of LENGTH tokens."""
    target, _ = toys
    answers = list(itertools.product(range(VOCAB_SIZE), repeat=LENGTH))
    ids = torch.tensor([[*PROMPT, *answer] for answer in answers])
    logprobs = causal_logits(target.config, target.weights, ids)[:, len(PROMPT) - 1 : -1].double().log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, len(PROMPT) :].unsqueeze(-1)).squeeze(-1).sum(-1)
    return {answer: math.exp(logprob) for answer, logprob in zip(answers, chosen.tolist(), strict=True)}


def drafter_of(
    draft: Checkpoint, shape: RsdShape, noise: NoiseKind = "independent", *, num_slots: int = 128, max_context: int = 64
) -> RsdDrafter:
    return RsdDrafter(
        draft,
        version=1,
        shape=shape,
        noise=noise,
        vocab_size=draft.config.vocab_size,
        num_slots=num_slots,
        max_context_tokens=max_context,
        max_catch_up_tokens=512,
    )


def engine_of(
    target: Checkpoint,
    drafter: Drafter | None,
    rule: str,
    *,
    num_running: int = 128,
    max_context: int = 64,
    num_blocks: int = 1024,
) -> Engine:
    engine = Engine(
        target,
        limits=EngineLimits(
            max_running_requests=num_running,
            max_queued_requests=NUM_REQUESTS,
            max_step_tokens=512,
            max_context_tokens=max_context,
            num_draft_tokens=8,
            num_blocks=num_blocks,
        ),
        target_digest="",
        replica_id="replica-1",
        top_n=1,
        observe=lambda _: None,
        metrics=ReplicaMetrics(),
        rule=rule,
    )
    engine.install_drafter(drafter)
    return engine


def answers_of(engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[int]]:
    """The answers, prompt number i under seed i."""
    answers: list[list[int]] = [[] for _ in prompts]
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        request = Request(
            request_id=f"request-{index}",
            prompt_ids=tuple(prompt),
            sampling=msgspec.structs.replace(sampling, seed=index),
            tenant="",
            domain="default",
            may_train=False,
            arrived_at=0.0,
        )
        engine.submit(request, lambda block, answer=answer: answer.extend(block.token_ids))  # type: ignore[misc]
    while engine.step():
        pass
    return answers


def excess_of(target: Checkpoint, drafter: Drafter, rule: str, law: Law) -> float:
    """The chi-square statistic less its bound; above 0 for a biased decoder."""
    engine = engine_of(target, drafter, rule)
    # One token more than is compared: the last one of a request is never drafted.
    sampling = SamplingParams(seed=0, max_tokens=LENGTH + 1)
    answers = answers_of(engine, [PROMPT] * NUM_REQUESTS, sampling)
    accepted, proposed = (metric(engine, f"{name}_tokens_total", domain="default") for name in ("accepted", "draft"))
    assert 0.1 < accepted / proposed < 0.9  # or the rule had nothing to decide
    return excess(Counter(tuple(answer[:LENGTH]) for answer in answers), law)


RULES_AND_SHAPES = [
    pytest.param("recursive_rejection", constant_branching(2, 2), id="constant branching"),
    pytest.param("recursive_rejection", beam_search(3, 2), id="beams"),
    pytest.param("recursive_rejection", constant_branching(1, 1), id="chain by token"),
    pytest.param("block", constant_branching(1, 1), id="chain by block"),
]


@pytest.mark.parametrize(("rule", "shape"), RULES_AND_SHAPES)
def test_answers_keep_the_targets_joint_law(
    toys: tuple[Checkpoint, Checkpoint], law: Law, rule: str, shape: RsdShape
) -> None:
    target, draft = toys
    assert smallest_detectable(NUM_REQUESTS, VOCAB_SIZE**LENGTH) < 0.15
    assert excess_of(target, drafter_of(draft, shape), rule, law) < 0


class Spoiled:
    """A drafter whose trees are changed before they are verified."""

    version = 1
    digest = ""

    def __init__(self, drafter: RsdDrafter, spoil: Callable[[DraftTree], DraftTree]) -> None:
        self._drafter = drafter
        self._spoil = spoil
        self.release = drafter.release

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        return [self._spoil(tree) if tree.token_ids else tree for tree in self._drafter.propose(contexts)]


def drawn_from_something_else(tree: DraftTree) -> DraftTree:
    """Wrong: the rule is told of a flatter draft than the one candidates were drawn from."""
    assert tree.draft_probs_PV is not None
    flatter = tree.draft_probs_PV.sqrt()
    return msgspec.structs.replace(tree, draft_probs_PV=flatter / flatter.sum(-1, keepdim=True))


def without_an_unlikely_draw(tree: DraftTree) -> DraftTree:
    """Wrong: what was drawn is taken out again where the draft found it unlikely."""
    assert tree.draft_probs_PV is not None
    return tree if max(tree.draft_probs_PV[0, token] for token in tree.token_ids) > 0.4 else NO_DRAFT


def sorted_by_draft(tree: DraftTree) -> DraftTree:
    """Wrong: siblings are tried in the order of their probability."""
    assert tree.draft_probs_PV is not None
    probs_V = tree.draft_probs_PV[0]
    ordered = sorted(tree.token_ids, key=lambda token: -float(probs_V[token]))
    return msgspec.structs.replace(tree, token_ids=tuple(ordered))


@pytest.mark.parametrize(
    ("spoil", "num_siblings"), [(drawn_from_something_else, 1), (without_an_unlikely_draw, 1), (sorted_by_draft, 3)]
)
def test_a_tree_that_is_not_what_it_says_is_caught(
    toys: tuple[Checkpoint, Checkpoint], law: Law, spoil: Callable[[DraftTree], DraftTree], num_siblings: int
) -> None:
    target, draft = toys
    drafter = Spoiled(drafter_of(draft, constant_branching(num_siblings)), spoil)
    assert excess_of(target, drafter, "recursive_rejection", law) > 0


# ----------------------------------------------------------------------------------------------------- unsound drafts


def broken_behind_token_0(tree: DraftTree) -> DraftTree:
    """No distribution behind some nodes: what a model may say behind one token and not behind another."""
    assert tree.draft_probs_PV is not None
    probs_PV = tree.draft_probs_PV.clone()
    for row, node in enumerate(drafting_nodes(tree)):
        if node >= 0 and tree.token_ids[node] == 0:
            probs_PV[row] = math.nan
    return msgspec.structs.replace(tree, draft_probs_PV=probs_PV)


def test_a_draft_that_breaks_on_the_way_is_cut_there_and_keeps_the_law(
    toys: tuple[Checkpoint, Checkpoint], law: Law
) -> None:
    target, draft = toys
    drafter = Spoiled(drafter_of(draft, constant_branching(2, 2)), broken_behind_token_0)
    assert excess_of(target, drafter, "recursive_rejection", law) < 0


def all_nan(tree: DraftTree) -> DraftTree:
    assert tree.draft_probs_PV is not None
    return msgspec.structs.replace(tree, draft_probs_PV=tree.draft_probs_PV * math.nan)


def of_another_vocabulary(tree: DraftTree) -> DraftTree:
    assert tree.draft_probs_PV is not None
    return msgspec.structs.replace(tree, draft_probs_PV=tree.draft_probs_PV[:, :-1])


def one_row_short(tree: DraftTree) -> DraftTree:
    assert tree.draft_probs_PV is not None
    return msgspec.structs.replace(tree, draft_probs_PV=tree.draft_probs_PV[:-1])


@pytest.mark.parametrize("rule", ["recursive_rejection", "block"])
@pytest.mark.parametrize("spoil", [all_nan, of_another_vocabulary, one_row_short])
def test_a_draft_without_distributions_is_counted_and_decoded_plainly(
    toys: tuple[Checkpoint, Checkpoint], rule: str, spoil: Callable[[DraftTree], DraftTree]
) -> None:
    target, draft = toys
    engine = engine_of(target, Spoiled(drafter_of(draft, constant_branching(1, 1)), spoil), rule)
    answers = answers_of(engine, [PROMPT] * 20, SamplingParams(seed=0, max_tokens=5))
    assert {len(answer) for answer in answers} == {5}
    assert metric(engine, "accepted_tokens_total", domain="default") == 0
    # The prompt's pass drafts nothing, and the last token is never drafted.
    assert metric(engine, "unsound_drafts_total") == 20 * 3


def metric(engine: Engine, name: str, **labels: str) -> float:
    return engine.metrics.registry.get_sample_value(f"slipstream_{name}", labels) or 0.0


def test_nodes_below_what_is_no_distribution_go_and_the_node_itself_stays() -> None:
    probs = [[0.5, 0.5], [math.nan, 1.0], [0.25, 0.75], [0.9, 0.2]]
    tree = DraftTree(
        token_ids=(0, 1, 1, 0, 1, 1),
        parents=(-1, -1, 0, 1, 3, 2),
        drafter="test",
        version=1,
        draft_probs_PV=torch.tensor(probs, dtype=torch.float64)[[0, 1, 2, 2, 3]],
    )
    assert drafting_nodes(tree) == [-1, 0, 1, 2, 3]
    nodes = sound_nodes(tree, vocab_size=2)
    assert nodes == [0, 1, 3]
    part = part_of(tree, nodes)
    assert (part.token_ids, part.parents) == ((0, 1, 0), (-1, -1, 1))
    assert part.draft_probs_PV is not None
    assert part.draft_probs_PV.tolist() == [probs[0], probs[2]]


class Noting:
    """A drafter that notes what it is asked for."""

    version = 1
    digest = ""

    def __init__(self, drafter: RsdDrafter) -> None:
        self._drafter = drafter
        self.asked: list[tuple[int, int]] = []
        self.release = drafter.release

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        self.asked += [(one.sampling.seed, one.num_passes) for one in contexts]
        return self._drafter.propose(contexts)


def test_a_preempted_request_draws_with_fresh_noise(toys: tuple[Checkpoint, Checkpoint]) -> None:
    target, draft = toys
    drafter = Noting(drafter_of(draft, beam_search(2, 2)))
    engine = engine_of(target, drafter, "recursive_rejection", num_running=4, num_blocks=9)
    answers = answers_of(
        engine, [[1, 2, 3] * 6 + [first] for first in range(4)] * 2, SamplingParams(seed=0, max_tokens=40)
    )
    assert {len(answer) for answer in answers} == {40}
    assert metric(engine, "preemptions_total") > 0
    assert len(set(drafter.asked)) == len(drafter.asked)


# ------------------------------------------------------------------------------------------------- equality, whatever


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("rule", ["recursive_rejection", "block"])
def test_without_draft_probabilities_every_rule_gives_plain_output(
    toys: tuple[Checkpoint, Checkpoint], rule: str
) -> None:
    target, draft = toys
    sampling = SamplingParams(seed=0, max_tokens=12)
    plain = answers_of(engine_of(target, None, "equality"), [PROMPT] * 30, sampling)
    assert answers_of(engine_of(target, None, rule), [PROMPT] * 30, sampling) == plain
    engine = engine_of(target, drafter_of(draft, constant_branching(2, 2), "shared"), rule)
    assert answers_of(engine, [PROMPT] * 30, sampling) == plain
    assert metric(engine, "accepted_tokens_total", domain="default") > 0


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize(("rule", "shape"), RULES_AND_SHAPES)
def test_greedy_requests_get_plain_output_under_every_rule(
    toys: tuple[Checkpoint, Checkpoint], rule: str, shape: RsdShape
) -> None:
    target, draft = toys
    prompts = [(first, second, 2) for first in range(4) for second in range(4)]
    sampling = SamplingParams(seed=0, max_tokens=12, temperature=0)
    plain = answers_of(engine_of(target, None, "equality"), prompts, sampling)
    assert answers_of(engine_of(target, drafter_of(draft, shape), rule), prompts, sampling) == plain


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", [constant_branching(2, 2), beam_search(2, 3)], ids=["constant branching", "beams"])
def test_trees_drawn_with_the_requests_noise_change_nothing(
    target: Checkpoint, sibling: Checkpoint, prompts: list[tuple[int, ...]], shape: RsdShape, temperature: float
) -> None:
    sampling = SamplingParams(
        seed=0, max_tokens=24, temperature=temperature, top_k=200, top_p=0.95, repetition_penalty=1.1
    )
    some = prompts[::8]
    plain = answers_of(engine_of(target, None, "equality", num_running=8, max_context=512), some, sampling)
    drafter = drafter_of(sibling, shape, "shared", num_slots=4, max_context=512)
    engine = engine_of(target, drafter, "equality", num_running=4, max_context=512)
    assert answers_of(engine, some, sampling) == plain
    assert metric(engine, "accepted_tokens_total", domain="default") > 10


@pytest.mark.usefixtures("exact_kernels")
def test_a_draft_that_is_the_target_is_accepted_whole_with_shared_noise(
    target: Checkpoint, prompts: list[tuple[int, ...]]
) -> None:
    drafter = drafter_of(target, beam_search(2, 3), "shared", num_slots=8, max_context=512)
    engine = engine_of(target, drafter, "equality", num_running=8, max_context=512)
    answers_of(engine, prompts[:6], SamplingParams(seed=0, max_tokens=17, temperature=0.8))
    # The first token comes from the prompt's pass, then four with each.
    assert metric(engine, "verification_passes_total", domain="default") == 6 * 5


# --------------------------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.5, "top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1, "temperature": 1.4}, {"temperature": 0.0}],
)
def test_target_probabilities_are_what_tokens_are_drawn_from(filters: dict[str, float]) -> None:
    num_draws = 4000
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(4))
    logits_V[3] = math.nan
    sampling = SamplingParams(seed=0, max_tokens=1, frequency_penalty=0.5, **filters)  # type: ignore[arg-type]
    rows = [
        RowsOfRequest(msgspec.structs.replace(sampling, seed=seed), (1, 2, 2), 1, NO_DRAFT) for seed in range(num_draws)
    ]
    probs_V = target_probs(logits_V.unsqueeze(0), rows[:1])[0]
    drawn = choose_tokens(logits_V.expand(num_draws, -1).contiguous(), rows)
    counts = Counter(token for (token,) in drawn)
    assert float(probs_V.sum()) == pytest.approx(1)
    assert set(counts) == set(probs_V.nonzero().flatten().tolist())
    assert excess(counts, {token: prob for token, prob in enumerate(probs_V.tolist()) if prob}) <= 0


def test_target_probabilities_follow_penalties_along_a_tree() -> None:
    logits_XV = torch.zeros(3, 4)
    sampling = SamplingParams(seed=0, max_tokens=1, presence_penalty=math.log(2))
    tree = chain_tree([1, 2], drafter="test", version=1)
    probs_XV = target_probs(logits_XV, [RowsOfRequest(sampling, (0,), 1, tree)])
    assert probs_XV[0].tolist() == pytest.approx([1 / 4] * 4)
    assert probs_XV[1].tolist() == pytest.approx([2 / 7, 1 / 7, 2 / 7, 2 / 7])
    assert probs_XV[2].tolist() == pytest.approx([2 / 6, 1 / 6, 1 / 6, 2 / 6])


def test_a_rule_of_another_name_is_refused(toys: tuple[Checkpoint, Checkpoint]) -> None:
    with pytest.raises(ValueError, match="'recursive'; expected one of equality, recursive_rejection, block"):
        engine_of(toys[0], None, "recursive")
