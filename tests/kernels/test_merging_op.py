"""Merged trees: grown, chosen and judged as the oracle does it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from slipstream.drafting.budget import DrawnNodes, choose_nodes
from slipstream.drafting.chain import no_chains
from slipstream.drafting.merged_survival import MergedSurvival
from slipstream.drafting.recycling import RecyclingDrafter
from slipstream.drafting.survival import SurvivalModel
from slipstream_kernels.adjacency import Adjacency
from slipstream_kernels.lookup import OutputPool
from slipstream_kernels.merging import DRAFTERS, NO_MATRIX, Chains, Estimates, Merged, Merger, Price, Wanted
from slipstream_kernels.recycling import DEFAULT_RULE
from slipstream_kernels.sampling import at_position, row_bytes, sample_rows
from tests.kernels.merging_oracle import MATCHING, Continued, Models, Request, grown, meetings, proposals, survival_of
from tests.unit.lookup_oracle import SuffixAutomaton

VOCAB = 12
NUM_REQUESTS = 3
STOP_IDS = ((5,), (), (2, 9))
"""The tokens that end each request's output."""
RATE = 4.0
"""Tokens a second."""
PLACES = 0, 1, 0
"""The matrix that each request drafts from."""
NOWHERE = (NO_MATRIX,) * NUM_REQUESTS


def model_of(rng: np.random.Generator) -> SurvivalModel:
    """A survival model with estimates of chance, as after much evidence."""
    windows = dict.fromkeys(DRAFTERS, 1_000)
    model = SurvivalModel(
        matching={name: windows[name] for name in MATCHING},
        scoring={name: windows[name] for name in DRAFTERS if name not in MATCHING},
    )
    for name in DRAFTERS:
        cells = model.cells(name)
        cells.said[:] = rng.random(cells.said.shape)
    return model


def merged_of(rng: np.random.Generator) -> MergedSurvival:
    """Weights of chance, as after some evidence."""
    merged = MergedSurvival()
    merged.weights += rng.normal(0.0, 0.3, merged.weights.shape)
    merged.squares *= rng.uniform(1.0, 9.0, merged.squares.shape)
    return merged


def estimates(models: Models) -> Estimates:
    return Estimates([models.alone.cells(name) for name in DRAFTERS], models.together)


class World:
    """Requests with texts, chains and a matrix of chance, and a merger that knows them."""

    def __init__(self, seed: int, *, temperature: float, max_nodes: int = 10, max_depth: int = 5) -> None:
        rng = self.rng = np.random.default_rng(seed)
        self.greedy, self.sampled = Models(model_of(rng), merged_of(rng)), Models(model_of(rng), merged_of(rng))
        self.models = self.sampled if temperature else self.greedy
        self.max_nodes = max_nodes
        self.matrices = [self._matrix(), self._matrix()]
        self.merger = Merger(
            num_slots=NUM_REQUESTS,
            max_nodes=max_nodes,
            vocab_size=VOCAB,
            pool_tokens=1_000,
            greedy=estimates(self.greedy),
            sampled=estimates(self.sampled),
            rule=DEFAULT_RULE,
        )
        self.texts = [rng.integers(0, 4, 60).tolist() for _ in range(NUM_REQUESTS)]
        self.temperature = temperature
        self.chains = [[self._choices() for _ in range(number)] for number in (3, 0, 4)]
        self.limits = [(max_nodes, max_depth), (4, max_depth), (max_nodes, 2)]

    def _matrix(self) -> Adjacency:
        """A Token Recycling matrix that knows most tokens."""
        recycling, rng = RecyclingDrafter(VOCAB), self.rng
        rows = rng.permutation(VOCAB)[: VOCAB - 2].astype(np.int32)
        ids = np.array([rng.permutation(VOCAB)[:8] for _ in rows], np.int32)
        recycling.observe(rows, ids, np.sort(-rng.exponential(2.0, ids.shape))[:, ::-1])
        return recycling.matrices_of([""])[0][0]

    def _choices(self) -> list[tuple[int, float]]:
        """One or two different tokens for a place of a chain, and how sure a draft is of them."""
        ids, scores = self.rng.permutation(VOCAB), self.rng.random(2)
        number = 1 + int(self.rng.integers(2))
        return list(zip(ids[:number].tolist(), scores[:number].tolist(), strict=True))

    def draw(self, request: int) -> bytes:
        """How this request's first drafted token is drawn."""
        return at_position(row_bytes(seed=7 + request, temperature=self.temperature), len(self.texts[request]))

    def wanted(self, *, num_known: int = 0, places: Sequence[int] = PLACES) -> list[Wanted]:
        """Trees for all requests, their texts new behind `num_known` tokens, from the matrices in these places."""
        return [
            Wanted(
                slot,
                text[num_known:],
                text[-1],
                self.draw(slot),
                *self.limits[slot],
                matrix=places[slot],
                stop_ids=STOP_IDS[slot],
            )
            for slot, text in enumerate(self.texts)
        ]

    def drafted(self) -> Chains:
        """The chains as a draft hands them over."""
        chains = no_chains(NUM_REQUESTS, width=4)
        for request, chain in enumerate(self.chains):
            chains.lengths_B[request] = len(chain)
            for place, choices in enumerate(chain):
                for rank, (token, score) in enumerate(choices):
                    chains.token_ids_BSR[request, place, rank] = token
                    chains.scores_BSR[request, place, rank] = score
        return chains

    def grow(self, price: Price, *, num_known: int = 0) -> Merged:
        """The trees of all requests, from all there is."""
        return self.merger.grow(self.wanted(num_known=num_known), self.matrices, price, chains=self.drafted())

    def go_on(self, token_ids: list[int]) -> int:
        """The first request goes on with these tokens and is asked for another tree; how many candidates that judged.

        It gets none: its tree may have no node.
        """
        without_nodes = Wanted(0, token_ids, token_ids[-1], self.draw(0), 0, 0)
        return self.merger.grow([without_nodes], [], Price(np.ones(1), 0.0, 1)).num_judged

    def requests(self) -> list[Request]:
        """The same for the oracle."""
        draws = [self.draw(request) for request in range(NUM_REQUESTS)]
        draws_B = sample_rows(draws, [len(text) for text in self.texts])
        return [
            Request(text[-1], chain, continued(text), self.matrices[place], draws_B[slot], *limits, STOP_IDS[slot])
            for slot, (text, chain, limits, place) in enumerate(
                zip(self.texts, self.chains, self.limits, PLACES, strict=True)
            )
        ]


def continued(text: list[int]) -> list[Continued]:
    """What the text's own past says of what follows."""
    automaton = SuffixAutomaton()
    automaton.extend(text)
    found = automaton.continuations(max_tokens=20, max_continuations=4)
    return [Continued("lookup", one.token_ids, False, one.match_length) for one in found]


def trees(merged: Merged) -> list[list[tuple[int, ...]]]:
    """The paths of every request's nodes, sorted."""
    found = []
    for start, end in pairwise([0, *merged.ends_B.tolist()]):
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(merged.token_ids_X[start:end], merged.parents_X[start:end], strict=True):
            assert -1 <= parent < len(paths)
            paths.append((*(paths[parent] if parent >= 0 else ()), int(token)))
        assert len(set(paths)) == len(paths)
        found.append(sorted(paths))
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("seed", range(8))
def test_trees_grow_as_the_definition_says(isa: str, seed: int, temperature: float) -> None:
    world = World(seed, temperature=temperature)
    everything = Price(np.ones(3 * world.max_nodes + 1), 0.0, NUM_REQUESTS)
    merged = world.grow(everything)
    expected = [sorted(node.path for node in grown(world.models, request)) for request in world.requests()]
    assert trees(merged) == expected


@pytest.mark.parametrize("seed", range(8))
def test_the_budget_takes_the_set_that_its_definition_takes(isa: str, seed: int) -> None:
    world = World(seed, temperature=0.0)
    step_s = 1.0 + np.cumsum(world.rng.exponential(0.15, 3 * world.max_nodes + 1))
    merged = world.grow(Price(step_s, RATE, NUM_REQUESTS))
    nodes = [grown(world.models, request) for request in world.requests()]
    starts = np.cumsum([0, *(len(some) for some in nodes)])
    choice = choose_nodes(
        DrawnNodes(
            np.array([node.survival for some in nodes for node in some]),
            np.array(
                [
                    node.parent + start if node.parent >= 0 else -1
                    for start, some in zip(starts, nodes, strict=False)
                    for node in some
                ],
                np.int32,
            ),
        ),
        step_s,
        num_requests=NUM_REQUESTS,
        token_rate=RATE,
        rule="equality",
    )
    chosen = [
        sorted(node.path for place, node in enumerate(some) if choice.is_chosen_X[start + place])
        for start, some in zip(starts, nodes, strict=False)
    ]
    assert trees(merged) == chosen
    assert merged.expected_tokens == pytest.approx(choice.expected_tokens)


def test_growth_stops_at_paths_that_survive_too_seldom(isa: str) -> None:
    world = World(3, temperature=0.0)
    price = Price(np.ones(3 * world.max_nodes + 1), 0.0, NUM_REQUESTS, min_survival=0.2)
    merged = world.grow(price)
    expected = [grown(world.models, request, min_survival=0.2) for request in world.requests()]
    assert trees(merged) == [sorted(node.path for node in some) for some in expected]
    assert 0 < len(merged.token_ids_X) < sum(len(grown(world.models, request)) for request in world.requests())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_candidate_along_the_path_taken_is_a_trial_verified_or_not(isa: str, temperature: float) -> None:
    world = World(5, temperature=temperature)
    nothing = Price(np.linspace(1.0, 99.0, 3 * world.max_nodes + 1), RATE, NUM_REQUESTS)
    merged = world.grow(nothing)
    assert len(merged.token_ids_X) == 0
    request = world.requests()[0]
    first = grown(world.models, request)[0].path[0]
    unknown = next(token for token in range(VOCAB) if token not in {one.token for one in proposals(request, (first,))})
    tried = [*proposals(request, ()), *proposals(request, (first,))]
    num_judged = world.go_on([first, unknown, 3])
    assert num_judged == len(tried)
    for name in ("chain", "lookup", "recycling"):
        cells = world.models.alone.cells(name)
        assert cells.new_tried.sum() == sum(one.drafter == name for one in tried)
        assert cells.new_accepted.sum() == sum(
            one.drafter == name and one.token == first for one in proposals(request, ())
        )
        assert cells.curve.sums[0].sum() == cells.new_tried.sum()
    assert world.go_on([first]) == 0, "a tree is judged once"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_candidates_survive_together_is_learned_as_its_definition_says(isa: str, temperature: float) -> None:
    world, expected = World(5, temperature=temperature), World(5, temperature=temperature).models.together
    request = world.requests()[0]
    world.grow(Price(np.ones(3 * world.max_nodes + 1), 0.0, NUM_REQUESTS))
    tree = {(), *(node.path for node in grown(world.models, request))}
    path = (*max(tree, key=len), 3)
    world.go_on(list(path))
    before = expected.weights.copy()
    said = [
        meetings(world.models.alone, proposals(request, path[:depth]))
        for depth in range(len(path))
        if path[:depth] in tree and depth < request.max_depth
    ]
    all_shares = [expected.shares(survivals_CO) for _, survivals_CO in said]
    for (tokens, survivals_CO), shares_C, token in zip(said, all_shares, path, strict=False):
        expected.learn(survivals_CO, shares_C, np.array(tokens) == token)
    learned = world.models.together
    assert not np.array_equal(before, expected.weights)
    np.testing.assert_allclose(learned.weights, expected.weights, rtol=1e-12)
    np.testing.assert_allclose(learned.squares, expected.squares, rtol=1e-12)
    np.testing.assert_allclose(learned.curve.sums, expected.curve.sums, rtol=1e-12)


def test_a_token_that_ends_the_output_is_judged_but_is_no_node(isa: str) -> None:
    world = World(5, temperature=0.0)
    world.chains = [[[(5, 0.99)], [(6, 0.99)]], [[(5, 0.99)], [(6, 0.99)]], []]
    world.models.alone.cells("chain").said[:] = 0.99
    world.models.together.weights[:] = MergedSurvival().weights
    everything = Price(np.ones(3 * world.max_nodes + 1), 0.0, NUM_REQUESTS)
    ended, going_on, _ = trees(world.grow(everything))
    assert (5, 6) in going_on
    assert ended
    assert not any(5 in path for path in ended)
    world.go_on([5])
    cells = world.models.alone.cells("chain")
    assert cells.new_tried.sum() == cells.new_accepted.sum() == 1


def test_the_last_tree_of_a_request_is_judged_by_how_it_ended(isa: str) -> None:
    world, other = World(5, temperature=0.0), World(5, temperature=0.0)
    price = Price(np.ones(3 * world.max_nodes + 1), 0.0, NUM_REQUESTS)
    for one in (world, other):
        one.grow(price)
    first = grown(world.models, world.requests()[0])[0].path[0]
    assert world.merger.end(0, [first, 7]) == other.go_on([first, 7]) > 0
    for name in DRAFTERS:
        assert (world.greedy.alone.cells(name).new_tried == other.greedy.alone.cells(name).new_tried).all()
    assert (world.greedy.together.weights == other.greedy.together.weights).all()
    assert world.merger.end(0, [first]) == world.merger.end(1, []) == 0


def test_texts_go_on_between_calls_and_begin_anew_after_release(isa: str) -> None:
    everything = Price(np.ones(31), 0.0, NUM_REQUESTS)
    world = World(6, temperature=0.0)
    texts = world.texts
    world.texts = [text[:40] for text in texts]
    world.grow(everything)
    world.texts = texts

    def whole() -> list[list[tuple[int, ...]]]:
        return [sorted(node.path for node in grown(world.models, request)) for request in world.requests()]

    assert trees(world.grow(everything, num_known=40)) == whole()
    for slot in range(NUM_REQUESTS):
        world.merger.release(slot)
    assert trees(world.grow(everything)) == whole()


def test_a_kept_output_is_found_by_its_scope_alone(isa: str) -> None:
    world = World(9, temperature=0.0)
    world.chains = [[], [], []]
    everything = Price(np.ones(31), 0.0, NUM_REQUESTS)
    world.texts = [[9, 8, 7, 6], [9, 8, 7, 6], [9, 8, 7, 6]]
    world.merger.keep(5, [9, 8, 7, 6, 11, 10, 11])
    wanted = [one._replace(scope=scope) for one, scope in zip(world.wanted(places=NOWHERE), (5, 6, 5), strict=True)]
    merged = trees(world.merger.grow(wanted, [], everything))
    assert merged == [[(11,), (11, 10), (11, 10, 11)], [], [(11,), (11, 10)]]


def test_two_look_ups_that_find_one_token_are_one_source_and_the_surer_one_counts(isa: str) -> None:
    world = World(9, temperature=0.0)
    world.chains = [[], [], []]
    said_before, said_now = [9, 8, 7, 6, 11, 10, 3], [4, 6, 11, 1, 9, 8, 7, 6]
    world.texts = [said_now] * NUM_REQUESTS
    world.merger.keep(0, said_before)
    pool = OutputPool(max_tokens=1_000)
    pool.add(0, said_before)
    found = pool.look_up(0, said_now, max_tokens=5, max_continuations=4)
    requests = [
        one._replace(
            continued=[*one.continued, *(Continued("pool", them.token_ids, False, them.match_length) for them in found)]
        )
        for one in world.requests()
    ]
    tokens, survivals_CO = meetings(world.models.alone, proposals(requests[0], ()))
    proposed = [
        (one.drafter, survival_of(world.models.alone, one)) for one in proposals(requests[0], ()) if one.token == 11
    ]
    assert [drafter for drafter, _ in proposed if drafter != "recycling"] == ["lookup", "pool"]
    assert survivals_CO[tokens.index(11), 2] == max(
        survival for drafter, survival in proposed if drafter != "recycling"
    )
    merged = trees(world.grow(Price(np.ones(31), 0.0, NUM_REQUESTS)))
    assert merged == [sorted(node.path for node in grown(world.models, request)) for request in requests]


def test_a_request_that_can_only_end_gets_no_tree_and_is_judged(isa: str) -> None:
    world = World(9, temperature=0.0)
    world.chains = [[[(5, 0.9)]], [], []]
    world.texts = [[1, 2, 3]] * NUM_REQUESTS
    wanted, everything = world.wanted(places=NOWHERE), Price(np.ones(31), 0.0, NUM_REQUESTS)
    assert trees(world.merger.grow(wanted, [], everything, chains=world.drafted()))[0] == []
    assert world.merger.end(0, [5]) == 1


@pytest.mark.parametrize(
    ("slot", "matrix", "root"), [(1, 1, 0), (1, 0, VOCAB), (1, 0, -1), (NUM_REQUESTS, 0, 0), (-1, 0, 0)]
)
def test_a_request_without_a_slot_root_or_matrix_is_refused(isa: str, slot: int, matrix: int, root: int) -> None:
    world = World(1, temperature=0.0)
    wanted = world.wanted(places=(0, 0, 0))
    wanted[1] = wanted[1]._replace(slot=slot, matrix=matrix, root=root)
    expected = f"\\[{slot}, {matrix}, {root}\\]; expected one of {NUM_REQUESTS} slots, one of 1 matrices"
    with pytest.raises(ValueError, match=expected):
        world.merger.grow(wanted, world.matrices[:1], Price(np.ones(31), 0.0, NUM_REQUESTS))
