"""Recursive Speculative Decoding: shapes, what candidates were drawn from, and a cache that stays right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from slipstream.drafting import rsd_cache
from slipstream.drafting.drafter import DraftContext
from slipstream.drafting.rsd import NoiseKind, RsdDrafter, RsdShape, beam_search, constant_branching
from slipstream.drafting.tree import NO_DRAFT, ROOT, DraftTree, checked, depths, drafting_nodes
from slipstream.engine.decoders import open_decoder
from slipstream.engine.plan import PagedDecoder, StepOutput, StepPlan
from slipstream.engine.request import SamplingParams
from slipstream.errors import ArtifactRejected
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.models.decoder import causal_logits
from tests.families import VOCAB_SIZE, random_checkpoint

PROMPT = (5, 17, 3, 17, 40)
NUM_SLOTS = 4
SHAPES = [
    pytest.param(constant_branching(2, 2), id="constant branching"),
    pytest.param(constant_branching(1, 1, 1), id="chain"),
    pytest.param(beam_search(3, 3), id="beams"),
]


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(random_checkpoint("llama", tmp_path_factory.mktemp("draft"), seed=3))


def drafter_of(draft: Checkpoint, shape: RsdShape, noise: NoiseKind = "independent", **more: Any) -> RsdDrafter:
    return RsdDrafter(
        draft,
        version=7,
        shape=shape,
        noise=noise,
        **{"vocab_size": VOCAB_SIZE, "num_slots": NUM_SLOTS, "max_context_tokens": 128, "max_catch_up_tokens": 256}
        | more,
    )


def context(
    token_ids: Sequence[int] = PROMPT,
    *,
    slot: int = 0,
    num_passes: int = 0,
    max_nodes: int = 30,
    max_depth: int = 8,
    **sampling: Any,
) -> DraftContext:
    asked = SamplingParams(**{"seed": 11, "max_tokens": 99} | sampling)
    return DraftContext(slot, list(token_ids), asked, max_nodes, max_depth, num_passes=num_passes)


def behind(draft: Checkpoint, token_ids: Sequence[int]) -> torch.Tensor:
    """The draft's logits for the next token, computed in one go."""
    return causal_logits(draft.config, draft.weights, torch.tensor([list(token_ids)]))[0, -1]


def path_tokens(tree: DraftTree, node: int) -> list[int]:
    tokens: list[int] = []
    while node != ROOT:
        tokens.insert(0, tree.token_ids[node])
        node = tree.parents[node]
    return tokens


def same(one: DraftTree, other: DraftTree) -> bool:
    if (one.token_ids, one.parents) != (other.token_ids, other.parents):
        return False
    if one.draft_probs_PV is None or other.draft_probs_PV is None:
        return one.draft_probs_PV is other.draft_probs_PV
    return torch.equal(one.draft_probs_PV, other.draft_probs_PV)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_has_its_shape_and_says_what_it_was_drawn_from(draft: Checkpoint, shape: RsdShape) -> None:
    tree = checked(drafter_of(draft, shape).propose([context(temperature=0.7)])[0], vocab_size=VOCAB_SIZE)
    assert tree.version == 7
    levels = depths(tree)
    assert [levels.count(depth) for depth in range(1, max(levels) + 1)] == list(shape.num_nodes)
    assert tree.draft_probs_PV is not None
    for probs_V, node in zip(tree.draft_probs_PV, drafting_nodes(tree), strict=True):
        logits_V = behind(draft, [*PROMPT, *path_tokens(tree, node)]).double()
        assert torch.allclose(probs_V, (logits_V / 0.7).softmax(-1), atol=1e-5)


def test_filters_hold_for_candidates_too(draft: Checkpoint) -> None:
    """What cannot be drawn is left out, so there are fewer nodes than the shape has."""
    tree = drafter_of(draft, constant_branching(3, 2)).propose([context(top_k=2)])[0]
    assert [parent for parent in tree.parents if parent == ROOT] == [ROOT] * 2
    assert tree.draft_probs_PV is not None
    assert (tree.draft_probs_PV > 0).sum(-1).tolist() == [2] * 3
    alone = drafter_of(draft, beam_search(3, 3)).propose([context(top_k=1)])[0]
    assert alone.parents == (ROOT, 0, 1)


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("noise", ["independent", "shared"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_is_right_whatever_is_accepted(draft: Checkpoint, shape: RsdShape, noise: NoiseKind) -> None:
    """A drafter that follows a text through its own trees draws what one that reads it all at once draws."""
    rng = random.Random(4)
    following = drafter_of(draft, shape, noise)
    texts = [list(PROMPT) * (1 + slot) for slot in range(3)]
    num_followed = 0
    for num_passes in range(8):
        some = [slot for slot in range(3) if rng.random() < 0.8]
        contexts = [context(texts[slot], slot=slot, num_passes=num_passes, seed=slot) for slot in some]
        trees = following.propose(contexts)
        fresh = drafter_of(draft, shape, noise).propose(contexts)
        assert all(same(tree, other) for tree, other in zip(trees, fresh, strict=True))
        for slot, tree in zip(some, trees, strict=True):
            accepted = path_tokens(tree, rng.randrange(-1, len(tree.token_ids)))
            texts[slot] += [*accepted, rng.randrange(VOCAB_SIZE)]
            num_followed += len(accepted)
    assert num_followed > 10


@pytest.mark.usefixtures("exact_kernels")
def test_a_slot_that_changes_hands_forgets(draft: Checkpoint) -> None:
    drafter = drafter_of(draft, beam_search(2, 2))
    first = drafter.propose([context(num_passes=5)])[0]
    drafter.release(0)
    other = (*PROMPT, first.token_ids[0], 9)[1:]
    fresh = drafter_of(draft, beam_search(2, 2)).propose([context(other)])[0]
    assert same(drafter.propose([context(other)])[0], fresh)


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("shape", SHAPES)
def test_requests_of_a_batch_do_not_meet(draft: Checkpoint, shape: RsdShape) -> None:
    contexts = [
        context(PROMPT[:3], slot=0, seed=1),
        context(PROMPT, slot=1, seed=1, temperature=0.3, max_depth=1),
        context(PROMPT, slot=2, seed=2, temperature=0.0),
        context(PROMPT, slot=3, seed=3, top_p=0.6, max_depth=2),
    ]
    together = drafter_of(draft, shape).propose(contexts)
    for one, tree in zip(contexts, together, strict=True):
        assert same(drafter_of(draft, shape).propose([one])[0], tree)
    assert [max(depths(tree)) for tree in together] == [len(shape.num_nodes), 1, len(shape.num_nodes), 2]


class CountingDecoder:
    """A decoder that notes how many rows each pass has."""

    def __init__(self, decoder: PagedDecoder) -> None:
        self.config, self.is_exact, self.keep = decoder.config, decoder.is_exact, decoder.keep
        self._decoder = decoder
        self.num_rows: list[int] = []

    def forward(self, plan: StepPlan) -> StepOutput:
        self.num_rows.append(len(plan.ids_T))
        return self._decoder.forward(plan)


def test_a_level_is_one_pass_for_all_requests(draft: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[CountingDecoder] = []

    def counting(*arguments: Any, **sizes: Any) -> CountingDecoder:
        opened.append(CountingDecoder(open_decoder(*arguments, **sizes)))
        return opened[0]

    monkeypatch.setattr(rsd_cache, "open_decoder", counting)
    drafter = drafter_of(draft, beam_search(3, 3))
    tree = drafter.propose([context(slot=slot, seed=slot) for slot in range(4)])[0]
    assert opened[0].num_rows == [4 * len(PROMPT), 4 * 3, 4 * 3]
    # A node of the second level and the bonus: of the new text only the bonus is not computed yet.
    node = tree.parents[6]
    drafter.propose([context([*PROMPT, *path_tokens(tree, node), 1], num_passes=1, seed=0)])
    assert opened[0].num_rows[3:] == [1, 3, 3]


@pytest.mark.parametrize(
    ("shape", "room", "num_nodes"),
    [
        (constant_branching(2, 2, 2), {"max_nodes": 13}, 6),
        (constant_branching(2, 2, 2), {"max_nodes": 14, "max_depth": 1}, 2),
        (beam_search(4, 3), {"max_nodes": 11}, 8),
        (beam_search(4, 3), {"max_nodes": 3}, 0),
        (beam_search(4, 3), {"max_depth": 2}, 8),
    ],
)
def test_a_shape_without_room_gets_its_first_levels(
    draft: Checkpoint, shape: RsdShape, room: dict[str, Any], num_nodes: int
) -> None:
    assert len(drafter_of(draft, shape).propose([context(**room)])[0].token_ids) == num_nodes


def test_a_text_as_long_as_the_draft_can_read_gets_no_draft(draft: Checkpoint) -> None:
    text = [3] * 64
    drafter = drafter_of(draft, beam_search(2, 2), max_context_tokens=64)
    assert drafter.propose([context(text[:63]), context(text, slot=1)])[1] == NO_DRAFT
    assert max(depths(drafter.propose([context(text[:63], slot=2)])[0])) == 1


def test_a_long_text_is_caught_up_with_in_parts(draft: Checkpoint) -> None:
    text = [index % VOCAB_SIZE for index in range(40)]
    drafter = drafter_of(draft, beam_search(2, 2), max_catch_up_tokens=16)
    trees = [drafter.propose([context(text, num_passes=number)])[0] for number in range(3)]
    assert [len(tree.token_ids) for tree in trees] == [0, 0, 4]


def test_greedy_requests_get_the_likeliest_siblings_and_the_likeliest_paths(draft: Checkpoint) -> None:
    siblings = drafter_of(draft, constant_branching(3)).propose([context(temperature=0.0)])[0]
    assert siblings.draft_probs_PV is None
    assert siblings.token_ids == tuple(behind(draft, PROMPT).topk(3).indices.tolist())
    beams = drafter_of(draft, beam_search(2, 2)).propose([context(temperature=0.0)])[0]
    scores: dict[tuple[int, ...], float] = {}
    for first in beams.token_ids[:2]:
        first_logprob = float(behind(draft, PROMPT).double().log_softmax(-1)[first])
        second_V = behind(draft, [*PROMPT, first]).double().log_softmax(-1)
        scores |= {(first, token): first_logprob + value for token, value in enumerate(second_V.tolist())}
    likeliest = sorted(scores, key=lambda path: -scores[path])[:2]
    assert [tuple(path_tokens(beams, node)) for node in (2, 3)] == likeliest


def test_passes_draw_with_noise_of_their_own_and_shared_noise_stays(draft: Checkpoint) -> None:
    def drawn(noise: NoiseKind) -> list[DraftTree]:
        drafter = drafter_of(draft, constant_branching(2, 2), noise)
        return [drafter.propose([context(PROMPT, num_passes=number)])[0] for number in range(6)]

    # The text stays as it is here: no pass accepts anything.
    independent, shared = drawn("independent"), drawn("shared")
    assert len({tree.token_ids for tree in independent}) > 2
    assert len({tree.token_ids for tree in shared}) == 1
    assert {tree.draft_probs_PV for tree in shared} == {None}


def test_noise_is_not_used_twice(draft: Checkpoint) -> None:
    drafter = drafter_of(draft, constant_branching(2))
    drafter.propose([context(num_passes=2)])
    with pytest.raises(AssertionError, match="pass 2 after pass 2: noise used twice"):
        drafter.propose([context([*PROMPT, 1], num_passes=2)])


def test_a_draft_of_another_vocabulary_is_refused(draft: Checkpoint) -> None:
    with pytest.raises(ArtifactRejected, match="vocabulary of 96 tokens, the target 97"):
        drafter_of(draft, constant_branching(2), vocab_size=97)


@pytest.mark.parametrize("shape", [(), (2, 0), (-1,)])
def test_a_shape_without_nodes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected at least one level"):
        constant_branching(*shape)


def test_beams_without_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="0 beams of 3 levels"):
        beam_search(0, 3)
