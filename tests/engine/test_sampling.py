"""Every choice is what its definition says, and the tokens are exact draws from the target whatever the tree."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, ncx2
from torch import Tensor

from slipstream.drafting.tree import NO_DRAFT, ROOT, DraftTree
from slipstream.engine.request import SamplingParams
from slipstream.engine.sampling import RowsOfRequest, adjusted, choose_tokens, draft_tokens
from slipstream.verification import verify
from slipstream_kernels.noise import gumbel_noise
from slipstream_kernels.sampling import choose, choose_reference, row_bytes, sample_rows


def tree_of(nodes: Sequence[tuple[int, int]]) -> DraftTree:
    """The tree of (parent, token) nodes."""
    parents, tokens = tuple(parent for parent, _ in nodes), tuple(token for _, token in nodes)
    return DraftTree(token_ids=tokens, parents=parents, drafter="test", version=1)


def gumbel_of(seed: int, position: int, vocab_size: int) -> list[float]:
    columns = {"seeds_X": seed, "sample_indices_X": 0, "redraws_X": 0, "positions_X": position}
    tensors = {name: torch.tensor([value]) for name, value in columns.items()}
    noise: list[float] = gumbel_noise(**tensors, vocab_size=vocab_size)[0].tolist()
    return noise


# ------------------------------------------------------------------------------------------------- filters, naively


def kept_naively(logits: Sequence[float], sampling: SamplingParams) -> set[int] | None:
    """The tokens that top-k, top-p and min-p keep by their definitions; None where rounding would decide."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order
    if sampling.top_k:
        border = logits[order[min(sampling.top_k, len(order)) - 1]]
        kept = [token for token in kept if logits[token] >= border]
    weights = {token: math.exp((logits[token] - logits[order[0]]) / sampling.temperature) for token in kept}
    total = sum(weights.values())
    if sampling.top_p < 1:
        before = [sum(weights[token] for token in kept[:rank]) / total for rank in range(len(kept))]
        if any(abs(share - sampling.top_p) < 1e-9 for share in before):
            return None
        num_kept = sum(share < sampling.top_p for share in before)
        at_border = {logits[token] for token in kept if abs(weights[token] - weights[kept[num_kept - 1]]) < 1e-9}
        if len(at_border) > 1:
            return None
        kept = kept[:num_kept]
    if any(abs(weights[token] - sampling.min_p) < 1e-9 for token in kept):
        return None
    return {token for token in kept if weights[token] >= sampling.min_p}


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_the_choice_is_the_best_of_what_the_filters_keep(data: st.DataObject) -> None:
    # Few distinct logits make equals at the border common.
    values = st.one_of(st.integers(-4, 4).map(lambda number: number / 2), st.floats(-8, 8, width=32))
    logits = data.draw(st.lists(values, min_size=1, max_size=40))
    sampling = SamplingParams(
        seed=data.draw(st.integers(0, 2**63 - 1)),
        max_tokens=1,
        temperature=data.draw(st.sampled_from([0.3, 1.0, 1.7])),
        top_k=data.draw(st.sampled_from([0, 1, 2, 5, 60])),
        top_p=data.draw(st.sampled_from([1.0, 0.93, 0.51, 0.1])),
        min_p=data.draw(st.sampled_from([0.0, 0.03, 0.31, 1.0])),
    )
    kept = kept_naively(logits, sampling)
    if kept is None:
        return
    noise = gumbel_of(sampling.seed, 3, len(logits))
    expected = max(kept, key=lambda token: (logits[token] / sampling.temperature + noise[token], -token))
    rows = RowsOfRequest(sampling, [0, 0, 0], 1, NO_DRAFT)
    assert choose_tokens(torch.tensor([logits]), [rows]) == [[expected]]


def test_filters_keep_what_their_definition_says_on_one_example() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log().expand(500, -1)

    def seen(**fields: Any) -> set[int]:
        rows = sample_rows([row_bytes(seed=x, temperature=1.0, **fields) for x in range(500)], [1] * 500)
        return set(choose(logits, rows).tolist())

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=1) == {0}
    assert seen(top_k=2) == {0, 1, 2}
    assert seen(top_p=0.6) == {0, 1}
    assert seen(top_p=0.01) == {0}
    assert seen(min_p=0.3) == {0, 1, 2}
    assert seen(top_k=2, top_p=0.7, min_p=0.1) == {0, 1}


def test_top_p_takes_tokens_for_equally_likely_whose_logits_differ_by_less_than_a_unit() -> None:
    rows = sample_rows([row_bytes(seed=0, temperature=1.0, top_p=0.1)] * 2, [1] * 2)
    logits = torch.tensor([[-1e-30, 0.0], [-1e-6, 0.0]])
    assert choose(logits, rows).tolist() == choose_reference(logits, rows).tolist() == [0, 1]


# ----------------------------------------------------------------------------------------------- penalties, naively


def path_tokens(tree: DraftTree, node: int) -> list[int]:
    tokens: list[int] = []
    while node != ROOT:
        tokens.insert(0, tree.token_ids[node])
        node = tree.parents[node]
    return tokens


def adjusted_naively(logits: Sequence[float], sampling: SamplingParams, prompt: list[int], output: list[int]) -> Tensor:
    adjusted = [*logits]
    for token, bias in sampling.logit_bias:
        adjusted[token] += bias
    for token in {*prompt, *output}:
        factor = sampling.repetition_penalty
        adjusted[token] = adjusted[token] / factor if adjusted[token] > 0 else adjusted[token] * factor
    for token, count in Counter(output).items():
        adjusted[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    return torch.tensor(adjusted)


TOKENS = st.integers(0, 7)
PENALISED = st.builds(
    SamplingParams,
    seed=st.integers(0, 9),
    max_tokens=st.just(9),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.6, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]),
    logit_bias=st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.5, 2.0]), max_size=3).map(
        lambda some: tuple(some.items())
    ),
)


@st.composite
def requests(draw: st.DrawFn) -> RowsOfRequest:
    """A request over 8 tokens with a tree of up to 6 nodes, duplicates and all."""
    prompt, output = draw(st.lists(TOKENS, min_size=1, max_size=6)), draw(st.lists(TOKENS, max_size=6))
    nodes = [(draw(st.integers(ROOT, node - 1)), draw(TOKENS)) for node in range(draw(st.integers(0, 6)))]
    return RowsOfRequest(draw(PENALISED), [*prompt, *output], len(prompt), tree_of(nodes))


@settings(deadline=None, max_examples=200)
@given(st.lists(requests(), min_size=1, max_size=3), st.integers(0, 99))
def test_penalties_count_what_lies_behind_each_node(some: list[RowsOfRequest], seed: int) -> None:
    num_rows = sum(1 + len(request.tree.token_ids) for request in some)
    logits = torch.randn(num_rows, 8, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    rows = iter(adjusted(logits, some))
    raw = iter(logits.tolist())
    for request in some:
        prompt, output = list(request.token_ids[: request.num_prompt]), list(request.token_ids[request.num_prompt :])
        for node in range(-1, len(request.tree.token_ids)):
            behind = output + path_tokens(request.tree, node)
            expected = adjusted_naively(next(raw), request.sampling, prompt, behind)
            torch.testing.assert_close(next(rows), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(logits, before)  # log-probabilities are reported of the raw logits


def test_logits_pass_through_untouched_where_no_request_asks_for_more() -> None:
    logits = torch.zeros(1, 8)
    plain = RowsOfRequest(SamplingParams(seed=0, max_tokens=1, top_k=3, min_p=0.1), [1], 1, NO_DRAFT)
    assert adjusted(logits, [plain]) is logits


def test_a_draft_equal_to_the_target_proposes_the_targets_tokens() -> None:
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 0.7):
        sampling = SamplingParams(seed=5, max_tokens=1, temperature=temperature)
        proposals = draft_tokens(logits, [sampling] * 500, range(1, 501)).tolist()
        rows = [RowsOfRequest(sampling, [0] * position, 1, NO_DRAFT) for position in range(1, 501)]
        assert [[token] for token in proposals] == choose_tokens(logits, rows)


# ------------------------------------------------------------------------------------------------ the distribution
#
# Chi-square with n = 200,000 draws, alpha = 1e-4 and fixed seeds, of single tokens (7 degrees of freedom) and of pairs
# of neighbouring positions (15). The power against the smallest total variation they must see is computed below.

NUM_DRAWS = 200_000
ALPHA = 1e-4
SMALLEST_TOTAL_VARIATION = 0.01
LOGITS = torch.tensor([1.2, -0.3, 0.0, 2.1, -1.5, 0.7, -0.2, 0.4])
PROBS = LOGITS.double().softmax(-1)

# A target that remembers one token: row 4 holds the logits of the first position, row t those behind token t.
CHAIN = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
PAIR_PROBS = (CHAIN[4].double().softmax(-1).unsqueeze(1) * CHAIN[:4].double().softmax(-1)).flatten()


def statistic(tokens: Tensor, probs: Tensor) -> float:
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    expected = probs * len(tokens)
    return float(((counts - expected) ** 2 / expected).sum())


def critical(probs: Tensor) -> float:
    return float(chi2.isf(ALPHA, len(probs) - 1))


@pytest.mark.parametrize("probs", [PROBS, PAIR_PROBS], ids=["tokens", "pairs"])
def test_the_test_has_the_power_it_claims(probs: Tensor) -> None:
    # The least favourable shift of total variation t moves mass t between the two most likely cells.
    top = probs.sort(descending=True).values[:2]
    noncentrality = NUM_DRAWS * SMALLEST_TOTAL_VARIATION**2 * float((1 / top).sum())
    assert ncx2.sf(critical(probs), len(probs) - 1, noncentrality) > 0.99


def sampled(logits_XV: Tensor, positions: Sequence[int]) -> Tensor:
    return choose(logits_XV, sample_rows([row_bytes(seed=11, temperature=1.0)] * len(positions), positions)).long()


def draw(rule: Callable[[Tensor, Sequence[int]], Tensor]) -> Tensor:
    """Tokens of NUM_DRAWS positions whose logits are all LOGITS."""
    return rule(LOGITS.expand(NUM_DRAWS, -1), range(NUM_DRAWS))


def test_the_sampler_draws_from_the_target() -> None:
    assert statistic(draw(sampled), PROBS) < critical(PROBS)


def test_neighbouring_positions_are_independent() -> None:
    tokens, probs = draw(sampled), torch.outer(PROBS, PROBS).flatten()
    assert statistic(tokens[0::2] * len(PROBS) + tokens[1::2], probs) < critical(probs)


def keeps_likely_drafts(logits_XV: Tensor, positions: Sequence[int]) -> Tensor:
    """Wrong: takes the draft's token whenever the target gives it a fair chance."""
    draws = [SamplingParams(seed=11, max_tokens=1)] * len(positions)
    proposals = draft_tokens((logits_XV * 0.8).roll(1, -1), draws, positions).long()
    is_likely = logits_XV.softmax(-1).gather(1, proposals.unsqueeze(1)).squeeze(1) > 0.15
    return torch.where(is_likely, proposals, sampled(logits_XV, positions))


def noise_too_small(logits_XV: Tensor, positions: Sequence[int]) -> Tensor:
    """Wrong: noise at 0.95 of its scale."""
    return sampled(logits_XV / 0.95, positions)


@pytest.mark.parametrize("rule", [keeps_likely_drafts, noise_too_small])
def test_a_biased_rule_fails_the_same_test(rule: Callable[[Tensor, Sequence[int]], Tensor]) -> None:
    assert statistic(draw(rule), PROBS) > critical(PROBS)


# ----------------------------------------------------------------------- the joint law of two tokens, through verify

FIRST_POSITION = 2


def random_trees() -> list[DraftTree]:
    """Trees of 0 to 6 nodes over 4 tokens, drawn without a look at anything."""
    chance = random.Random(5)
    sizes = chance.choices(range(7), k=NUM_DRAWS)
    return [tree_of([(chance.randrange(ROOT, node), chance.randrange(4)) for node in range(size)]) for size in sizes]


def knowing_trees() -> list[DraftTree]:
    """Trees that know the noise: first the choice of another law under the same noise, behind it every token."""
    draft = (CHAIN[4] * 0.5).roll(1).expand(NUM_DRAWS, -1)
    draws = [SamplingParams(seed=seed, max_tokens=1) for seed in range(NUM_DRAWS)]
    proposals = draft_tokens(draft, draws, [FIRST_POSITION] * NUM_DRAWS).tolist()
    return [tree_of([(ROOT, proposal), *((0, token) for token in range(4))]) for proposal in proposals]


Rule = Callable[[RowsOfRequest, Tensor, list[int]], list[int]]
"""The block of a request, from its rows, their logits, and the tokens chosen behind them."""


def by_equality(rows: RowsOfRequest, logits_XV: Tensor, chosen: list[int]) -> list[int]:
    return list(verify(rows.tree, chosen).token_ids)


def bonus_from_fresh_noise(rows: RowsOfRequest, logits_XV: Tensor, chosen: list[int]) -> list[int]:
    """Wrong: the token behind the accepted path is drawn again, with noise of its own."""
    verification = verify(rows.tree, chosen)
    row = verification.path[-1] + 1 if verification.path else 0
    position = len(rows.token_ids) + len(verification.path)
    fresh = sample_rows([row_bytes(seed=rows.sampling.seed, temperature=1.0, redraw=1)], [position])
    return [*verification.token_ids[:-1], int(choose(logits_XV[row : row + 1], fresh)[0])]


def noise_by_tree_index(rows: RowsOfRequest, logits_XV: Tensor, chosen: list[int]) -> list[int]:
    """Wrong: a row's noise is that of its index among the rows, not of its position."""
    keys = [row_bytes(seed=rows.sampling.seed, temperature=1.0)] * len(logits_XV)
    return list(verify(rows.tree, choose(logits_XV, sample_rows(keys, range(len(keys)))).tolist()).token_ids)


def step(trees: Sequence[DraftTree], seeds: Sequence[int], outputs: Sequence[list[int]], rule: Rule) -> list[list[int]]:
    """The block that each request gets in one step behind its output so far."""
    lines = [[output[-1] if output else 4, *tree.token_ids] for tree, output in zip(trees, outputs, strict=True)]
    logits_XV = CHAIN[list(itertools.chain.from_iterable(lines))]
    requests = [
        RowsOfRequest(SamplingParams(seed=seed, max_tokens=9), [0] * FIRST_POSITION + output, FIRST_POSITION, tree)
        for tree, seed, output in zip(trees, seeds, outputs, strict=True)
    ]
    parts = logits_XV.split([len(some) for some in lines])
    return [rule(*one) for one in zip(requests, parts, choose_tokens(logits_XV, requests), strict=True)]


def two_tokens(trees: Sequence[DraftTree], rule: Rule) -> Tensor:
    """The first two tokens of a request per tree, as cells 4 * first + second; every request has its own seed."""
    blocks = step(trees, range(len(trees)), [[]] * len(trees), rule)
    short = [seed for seed, block in enumerate(blocks) if len(block) < 2]
    rest = step([NO_DRAFT] * len(short), short, [blocks[seed] for seed in short], rule)
    for seed, block in zip(short, rest, strict=True):
        blocks[seed] = blocks[seed] + block
    return torch.tensor([4 * block[0] + block[1] for block in blocks])


@pytest.mark.parametrize("trees", [random_trees, knowing_trees])
def test_two_tokens_through_a_tree_follow_the_targets_joint_law(trees: Callable[[], list[DraftTree]]) -> None:
    assert statistic(two_tokens(trees(), by_equality), PAIR_PROBS) < critical(PAIR_PROBS)


@pytest.mark.parametrize("rule", [bonus_from_fresh_noise, noise_by_tree_index])
def test_a_biased_rule_breaks_the_joint_law(rule: Rule) -> None:
    assert statistic(two_tokens(knowing_trees()[:20_000], rule), PAIR_PROBS) > critical(PAIR_PROBS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_chooses_the_same_tokens() -> None:
    chance = random.Random(7)
    logits = torch.randn(200, 4096, generator=torch.Generator().manual_seed(7)) * 4
    rows = [
        row_bytes(
            seed=chance.getrandbits(63),
            temperature=chance.choice([0.0, 0.3, 1.0]),
            top_k=chance.choice([0, 1, 50]),
            top_p=chance.choice([1.0, 0.9]),
            min_p=chance.choice([0.0, 0.05]),
        )
        for _ in range(200)
    ]
    keys = sample_rows(rows, range(200))
    assert torch.equal(choose(logits.cuda(), keys).cpu(), choose(logits, keys))
