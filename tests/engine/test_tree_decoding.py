"""Decoding with trees says what decoding without says, and every way to get a tree wrong is noticed.

The smallest loop that speculates: a decoder, `choose_tokens`, `verify`, and trees in which the right path hides among
wrong ones. Nothing is cached between steps, so only the rules are at work. Each mutant breaks one of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.drafting.tree import NO_DRAFT, ROOT, DraftTree, checked
from slipstream.engine.decoders import open_decoder
from slipstream.engine.plan import NO_NODE, PagedDecoder, StepPlan
from slipstream.engine.request import SamplingParams
from slipstream.engine.sampling import RowsOfRequest, adjusted, choose_tokens
from slipstream.models.checkpoint import load_checkpoint
from slipstream.verification import Verification, verify
from slipstream_kernels.sampling import choose, row_bytes, sample_rows
from tests.families import VOCAB_SIZE, random_checkpoint
from tests.plans import Rows, plan_of

PROMPT = (5, 17, 3, 17, 40)
NUM_TOKENS = 24
NUM_REQUESTS = 6
BLOCKS = tuple(range(8))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> PagedDecoder:
    checkpoint = load_checkpoint(random_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint")))
    opened = open_decoder(checkpoint, num_blocks=len(BLOCKS), num_node_slots=16, max_rows=128)
    if not opened.is_exact:
        pytest.skip("no exact decoder without the compiled kernels: near-ties could go either way")
    return opened


def as_planned(plan: StepPlan, tree: DraftTree) -> StepPlan:
    return plan


def as_chosen(logits_XV: Tensor, rows: RowsOfRequest) -> list[int]:
    return choose_tokens(logits_XV, [rows])[0]


def as_verified(logits_XV: Tensor, rows: RowsOfRequest, verification: Verification) -> Sequence[int]:
    return verification.token_ids


class Rules(msgspec.Struct, frozen=True):
    """How a step is planned, chosen and ended; a mutant replaces one."""

    plan: Callable[[StepPlan, DraftTree], StepPlan] = as_planned
    choose: Callable[[Tensor, RowsOfRequest], list[int]] = as_chosen
    end: Callable[[Tensor, RowsOfRequest, Verification], Sequence[int]] = as_verified


Draft = Callable[[Sequence[int]], DraftTree]


def no_draft(token_ids: Sequence[int]) -> DraftTree:
    return NO_DRAFT


def decode(decoder: PagedDecoder, sampling: SamplingParams, draft: Draft, rules: Rules) -> list[int]:
    """NUM_TOKENS tokens behind PROMPT."""
    token_ids = list(PROMPT)
    while len(token_ids) < len(PROMPT) + NUM_TOKENS:
        tree = checked(draft(token_ids), vocab_size=VOCAB_SIZE)
        sequence = Rows(token_ids=tuple(token_ids), blocks=BLOCKS, nodes=tree.token_ids, parents=tree.parents)
        output = decoder.forward(rules.plan(plan_of([sequence]), tree))
        logits_XV = output.logits_XV[-1 - len(tree.token_ids) :]
        rows = RowsOfRequest(sampling, token_ids, len(PROMPT), tree)
        token_ids += rules.end(logits_XV, rows, verify(tree, rules.choose(logits_XV, rows)))
    return token_ids[len(PROMPT) :][:NUM_TOKENS]


def hiding(future: Sequence[int], seed: int) -> Draft:
    """Trees over the next tokens: the right path, decoys before and behind its nodes, and children below decoys."""
    chance = random.Random(seed)

    def draft(token_ids: Sequence[int]) -> DraftTree:
        nodes: list[tuple[int, int]] = []
        parent = ROOT
        for right in future[len(token_ids) - len(PROMPT) :][: chance.randrange(5)]:
            siblings = list({right, chance.randrange(VOCAB_SIZE), chance.choice(PROMPT)})
            chance.shuffle(siblings)
            first = len(nodes)
            nodes += [(parent, token) for token in siblings]
            nodes.append((first + (siblings[0] == right) % len(siblings), chance.randrange(VOCAB_SIZE)))
            parent = first + siblings.index(right)
        # The child below the decoy may be a sibling of the next right token: equal ones are left out.
        kept = {node: place for place, node in enumerate(dict.fromkeys(nodes))}
        place_of = [kept[node] for node in nodes]
        return DraftTree(
            token_ids=tuple(token for _, token in kept),
            parents=tuple(parent if parent == ROOT else place_of[parent] for parent, _ in kept),
            drafter="test",
            version=1,
        )

    return draft


def sampling_of(seed: int, temperature: float) -> SamplingParams:
    return SamplingParams(
        seed=seed,
        max_tokens=NUM_TOKENS,
        temperature=temperature,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias=((7, 1.0),),
    )


def num_differences(decoder: PagedDecoder, temperature: float, rules: Rules) -> int:
    """Requests whose tokens are others with trees than without."""
    count = 0
    for seed in range(NUM_REQUESTS):
        sampling = sampling_of(seed, temperature)
        plain = decode(decoder, sampling, no_draft, Rules())
        count += decode(decoder, sampling, hiding(plain, seed), rules) != plain
    return count


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_trees_change_nothing(decoder: PagedDecoder, temperature: float) -> None:
    assert num_differences(decoder, temperature, Rules()) == 0


def test_the_right_path_is_accepted_where_it_is_drafted(decoder: PagedDecoder) -> None:
    sampling = sampling_of(0, 1.0)
    plain = decode(decoder, sampling, no_draft, Rules())
    lengths: list[int] = []

    def counted(logits_XV: Tensor, rows: RowsOfRequest, verification: Verification) -> Sequence[int]:
        lengths.append(len(verification.path))
        return verification.token_ids

    decode(decoder, sampling, hiding(plain, 0), Rules(end=counted))
    assert max(lengths) >= 3


def sibling_visible(plan: StepPlan, tree: DraftTree) -> StepPlan:
    """Wrong: a node attends to the sibling before it as well."""
    first_row = len(plan.ids_T) - len(tree.token_ids)
    starts, ancestors = [0], []
    for row in range(len(plan.ids_T)):
        ancestors += plan.ancestors[plan.ancestor_starts[row] : plan.ancestor_starts[row + 1]].tolist()
        node = row - first_row
        if node > 0 and tree.parents[node] == tree.parents[node - 1]:
            ancestors.insert(starts[-1], node - 1)
        starts.append(len(ancestors))
    return msgspec.structs.replace(
        plan, ancestor_starts=np.array(starts, np.int32), ancestors=np.array(ancestors, np.int32)
    )


def position_is_index(plan: StepPlan, tree: DraftTree) -> StepPlan:
    """Wrong: a node's position is its index in the tree behind the last token."""
    positions_T = plan.positions_T.copy()
    is_node_T = plan.node_slots_T != NO_NODE
    positions_T[is_node_T] = plan.num_committed_T[is_node_T] + plan.node_slots_T[is_node_T]
    return msgspec.structs.replace(plan, positions_T=positions_T)


def chosen_at(logits_XV: Tensor, rows: RowsOfRequest, positions: Sequence[int], redraw: int = 0) -> list[int]:
    """The choices with other keys than the contract's."""
    sampling = rows.sampling
    row = row_bytes(
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        redraw=redraw,
    )
    chosen: list[int] = choose(adjusted(logits_XV, [rows]), sample_rows([row] * len(positions), positions)).tolist()
    return chosen


def noise_by_tree_index(logits_XV: Tensor, rows: RowsOfRequest) -> list[int]:
    """Wrong: the noise at a node is keyed by its index in the tree, not by its position."""
    first = len(rows.token_ids)
    return chosen_at(logits_XV, rows, range(first, first + len(logits_XV)))


def penalties_from_before_the_block(logits_XV: Tensor, rows: RowsOfRequest) -> list[int]:
    """Wrong: every node is penalised by the counts at the root."""
    alone = msgspec.structs.replace(rows, tree=NO_DRAFT)
    same = [adjusted(logits_XV[row : row + 1], [alone]) for row in range(len(logits_XV))]
    neutral = msgspec.structs.replace(
        rows.sampling, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias=()
    )
    return as_chosen(torch.cat(same), msgspec.structs.replace(rows, sampling=neutral))


def bonus_from_fresh_noise(logits_XV: Tensor, rows: RowsOfRequest, verification: Verification) -> Sequence[int]:
    """Wrong: the token behind the accepted path is drawn again."""
    row = verification.path[-1] + 1 if verification.path else 0
    positions = [len(rows.token_ids) + len(verification.path)] * len(logits_XV)
    return [*verification.token_ids[:-1], chosen_at(logits_XV, rows, positions, redraw=1)[row]]


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(Rules(plan=sibling_visible), id="sibling visible"),
        pytest.param(Rules(plan=position_is_index), id="position is index"),
        pytest.param(Rules(choose=noise_by_tree_index), id="noise by tree index"),
        pytest.param(Rules(choose=penalties_from_before_the_block), id="penalties from before the block"),
        pytest.param(Rules(end=bonus_from_fresh_noise), id="bonus from fresh noise"),
    ],
)
def test_a_mutant_is_caught(decoder: PagedDecoder, mutant: Rules) -> None:
    assert num_differences(decoder, 1.0, mutant) > 0
