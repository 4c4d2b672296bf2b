"""The budget: the best closed set of nodes, found by one sort, and when to leave speculation alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slipstream import verification
from slipstream.drafting.budget import Choice, DrawnNodes, ForecastNodes, RuleName, choose_nodes
from slipstream.drafting.survival import ForecastSurvivals

Float64 = NDArray[np.float64]


def drawn(survivals: list[float], parents: list[int]) -> DrawnNodes:
    return DrawnNodes(np.array(survivals, dtype=np.float64), np.array(parents, dtype=np.int32))


def chosen(
    nodes: DrawnNodes, step_s: list[float], *, num_requests: int = 1, token_rate: float = 1.0, draft_s: float = 0.0
) -> Choice:
    return choose_nodes(
        nodes, np.array(step_s), num_requests=num_requests, token_rate=token_rate, draft_s=draft_s, rule="equality"
    )


def test_worked_example_takes_the_nodes_that_pay() -> None:
    # Worth of 0, 1, 2, 3 nodes at 0.2 tokens a second: 1 - 2, 1.8 - 2.4, 2.3 - 2.8, 2.4 - 4.
    nodes = drawn([0.8, 0.1, 0.5], [-1, 0, 0])
    choice = chosen(nodes, [10.0, 12.0, 14.0, 20.0], token_rate=0.2)
    assert choice.is_chosen_X.tolist() == [True, False, True]
    assert (choice.num_chosen, choice.predicted_s) == (2, 14.0)
    assert choice.expected_tokens == pytest.approx(2.3)
    assert choice.is_speculation_worth_it


def test_the_more_time_is_worth_the_fewer_nodes_are_taken() -> None:
    nodes = drawn([0.8, 0.5, 0.3], [-1, 0, 0])
    step_s = [1.0, 1.2, 1.4, 1.6]
    assert [chosen(nodes, step_s, token_rate=rate).num_chosen for rate in (0.0, 1.0, 2.0, 3.0, 5.0)] == [3, 3, 2, 1, 0]


def test_nodes_of_a_padded_shape_are_filled_up() -> None:
    # Two nodes cost as much as one: the second is free, however unlikely.
    choice = chosen(drawn([0.6, 0.01, 0.005], [-1, -1, -1]), [1.0, 1.2, 1.2, 9.0])
    assert choice.is_chosen_X.tolist() == [True, True, False]


def test_no_node_is_chosen_where_none_pays() -> None:
    choice = chosen(drawn([0.3, 0.2], [-1, 0]), [1.0, 1.4, 1.6])
    assert choice.num_chosen == 0
    assert (choice.expected_tokens, choice.predicted_s) == (1.0, 1.0)
    assert not choice.is_speculation_worth_it


def test_requests_share_one_budget() -> None:
    # The second request's chain is better throughout: it gets both nodes.
    nodes = drawn([0.3, 0.2, 0.9, 0.8], [-1, 0, -1, 2])
    choice = chosen(nodes, [4.0, 4.2, 4.4, 6.0, 6.2], num_requests=2)
    assert choice.is_chosen_X.tolist() == [False, False, True, True]


def test_there_are_no_more_nodes_than_times() -> None:
    assert chosen(drawn([1.0, 1.0, 1.0], [-1, 0, 1]), [1.0, 1.0]).num_chosen == 1


def test_nothing_drafted_is_a_plain_step() -> None:
    choice = chosen(drawn([], []), [2.0, 2.1], num_requests=3)
    assert (choice.num_chosen, choice.expected_tokens, choice.predicted_s) == (0, 3.0, 2.0)


def test_drafting_that_is_paid_for_is_used_but_not_worth_it() -> None:
    # Once it is drafted, the node is worth verifying (0.9 for 0.1 s); with the second that drafting took it is not.
    choice = chosen(drawn([0.9], [-1]), [1.0, 1.1], draft_s=1.0)
    assert choice.num_chosen == 1
    assert not choice.is_speculation_worth_it


def test_drafting_that_is_still_to_be_paid_for_counts_against_the_nodes() -> None:
    nodes = ForecastNodes(ForecastSurvivals(np.array([0.9])), np.array([-1], dtype=np.int32))
    step_s = np.array([1.0, 1.1])
    for draft_s, num_chosen in ((1.0, 0), (0.5, 1)):
        choice = choose_nodes(
            nodes, step_s, num_requests=1, token_rate=1.0, draft_s=draft_s, rule="recursive_rejection"
        )
        assert choice.num_chosen == num_chosen


def test_a_rule_that_rejects_cannot_look_at_what_was_drawn() -> None:
    # The ignores are needed: a type checker refuses these calls too.
    nodes, step_s = drawn([0.5], [-1]), np.ones(2)
    with pytest.raises(ValueError, match="ForecastNodes"):
        choose_nodes(nodes, step_s, num_requests=1, token_rate=1.0, rule="block")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="ForecastNodes"):
        choose_nodes(nodes, step_s, num_requests=1, token_rate=1.0, rule="recursive_rejection")  # type: ignore[call-overload]
    ForecastNodes(nodes.survivals_X, nodes.parents_X)  # type: ignore[arg-type]


def test_every_rule_has_its_name() -> None:
    assert set(get_args(RuleName)) == set(verification.RULES)


@pytest.mark.parametrize(
    ("survivals", "parents", "step_s", "message"),
    [
        ([0.5, 0.6], [-1, 0], [1.0, 1.0, 1.0], "more often than its parent"),
        ([float("nan")], [-1], [1.0, 1.0], "no NaN"),
        ([1.5], [-1], [1.0, 1.0], "0 to 1"),
        ([-0.5], [-1], [1.0, 1.0], "0 to 1"),
        ([0.5, 0.5], [1, -1], [1.0, 1.0], "earlier node"),
        ([0.5], [-2], [1.0, 1.0], "earlier node"),
        ([0.5], [-1, -1], [1.0, 1.0], "a parent for each"),
        ([0.5], [-1], [], "at least 1 time"),
        ([0.5], [-1], [1.0, 0.0], "positive"),
        ([0.5], [-1], [1.0, float("nan")], "positive"),
        ([0.5], [-1], [1.0, float("inf")], "positive"),
    ],
)
def test_what_no_budget_can_be_made_of_is_refused(
    survivals: list[float], parents: list[int], step_s: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(drawn(survivals, parents), step_s)


@st.composite
def forests(draw: st.DrawFn) -> DrawnNodes:
    """Up to 10 nodes; few distinct factors, so that survivals are often equal, along paths too."""
    size = draw(st.integers(0, 10))
    parents = [draw(st.integers(-1, node - 1)) for node in range(size)]
    survivals: list[float] = []
    for parent in parents:
        factor = draw(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]) | st.floats(0, 1))
        survivals.append(factor * (survivals[parent] if parent >= 0 else 1.0))
    return drawn(survivals, parents)


TIMES = st.lists(st.sampled_from([1.0, 1.1, 1.5, 2.0, 4.0]) | st.floats(0.5, 5), min_size=1, max_size=12)


@pytest.mark.parametrize("token_rate", [-1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(token_rate: float) -> None:
    with pytest.raises(ValueError, match="token_rate is"):
        chosen(drawn([0.5], [-1]), [1.0, 1.1], token_rate=token_rate)


def closed_sets(nodes: DrawnNodes, num_times: int) -> Iterator[tuple[int, float]]:
    """Number of nodes and sum of survivals of every closed set that there are times for."""
    parents = nodes.parents_X.tolist()
    for some in itertools.product([False, True], repeat=len(parents)):
        if sum(some) < num_times and is_closed(list(some), parents):
            yield sum(some), float(nodes.survivals_X[np.array(some, dtype=bool)].sum())


@given(forests(), TIMES, st.integers(1, 4), st.floats(0, 5))
def test_no_closed_set_is_worth_more(
    nodes: DrawnNodes, step_s: list[float], num_requests: int, token_rate: float
) -> None:
    choice = chosen(nodes, step_s, num_requests=num_requests, token_rate=token_rate)
    assert is_closed(choice.is_chosen_X.tolist(), nodes.parents_X.tolist())
    assert choice.num_chosen == choice.is_chosen_X.sum() < len(step_s)
    best = max(num_requests + gained - token_rate * step_s[size] for size, gained in closed_sets(nodes, len(step_s)))
    assert choice.expected_tokens - token_rate * choice.predicted_s == pytest.approx(best, rel=1e-12, abs=1e-12)


@given(st.lists(forests(), min_size=1, max_size=3), TIMES)
def test_at_the_rate_that_it_reaches_no_other_choices_give_more_tokens_a_second(
    steps: list[DrawnNodes], step_s: list[float]
) -> None:
    rate = 0.0
    for _ in range(20):  # Dinkelbach's iteration: it rises, and stops at the largest rate
        choices = [chosen(nodes, step_s, token_rate=rate) for nodes in steps]
        rate = sum(one.expected_tokens for one in choices) / sum(one.predicted_s for one in choices)
    every = [[(1 + gained, step_s[size]) for size, gained in set(closed_sets(nodes, len(step_s)))] for nodes in steps]
    # Of each size only the best set can be part of the best choices.
    every = [list({s: (t, s) for t, s in sorted(some)}.values()) for some in every]
    best = max(sum(t for t, _ in some) / sum(s for _, s in some) for some in itertools.product(*every))
    assert rate == pytest.approx(best, rel=1e-9)


@given(forests())
def test_of_each_size_the_best_closed_set_is_the_most_surviving_nodes(nodes: DrawnNodes) -> None:
    survivals, parents = nodes.survivals_X, nodes.parents_X.tolist()
    for size in range(len(parents) + 1):
        # A step that is nearly free at this size alone makes the choice that size, so that its set shows.
        step_s = [1e9] * size + [1e-9]
        got = chosen(nodes, step_s, token_rate=1.0)
        subsets = itertools.combinations(range(len(parents)), size)
        closed = [some for some in subsets if is_closed([node in some for node in range(len(parents))], parents)]
        assert got.num_chosen == size
        assert survivals[got.is_chosen_X].sum() == pytest.approx(max(survivals[list(some)].sum() for some in closed))


@given(forests(), TIMES)
def test_never_worse_than_not_speculating(nodes: DrawnNodes, step_s: list[float]) -> None:
    rate = 1 / step_s[0]
    choice = chosen(nodes, step_s, token_rate=rate)
    assert choice.expected_tokens / choice.predicted_s >= rate * (1 - 1e-12)
    assert choice.is_speculation_worth_it == (choice.num_chosen > 0)


def test_inputs_are_not_changed() -> None:
    nodes, step_s = drawn([0.9, 0.5], [-1, 0]), np.array([1.0, 1.1, 1.2])
    choose_nodes(nodes, step_s, num_requests=1, token_rate=0.5, rule="equality")
    assert nodes.survivals_X.tolist() == [0.9, 0.5]
    assert step_s.tolist() == [1.0, 1.1, 1.2]


def is_closed(is_chosen: list[bool], parents: list[int]) -> bool:
    return all(parent < 0 or is_chosen[parent] for node, parent in enumerate(parents) if is_chosen[node])
