"""The budget of a step: which drafted nodes of all running requests are worth verifying together.

Chosen is the set of nodes that is worth most,

    requests + sum of survivals of the chosen nodes - token rate x seconds of a step with so many nodes,

no nodes at all being one of the choices. The token rate is what time is worth: the tokens a second that steps give in
the long run. So a step with likely candidates takes more of them than would make this one step's own rate largest, and
one with unlikely candidates fewer, and all steps together give the most tokens a second (Dinkelbach, 1967: a ratio of
sums is largest where the sum of these differences is, at that ratio itself). A node's survival is the probability that
it is accepted, ancestors included (`survival.along_paths`), so it never rises along a path.

The choice is exact. Take the nodes by falling survival, at equal survival parents first. (1) Every prefix of that
order is closed: an ancestor of a node survives at least as well, so it comes earlier. (2) Among all sets of n nodes,
closed or not, the first n have the largest sum. So they are the best closed set of n nodes; and since the seconds
depend on the number alone, the best of these sets over all n is the best set. (A cost that depended on *which* nodes
are chosen, say by predicting each node's experts, would lose this: the order is then a heuristic.)
"""

from __future__ import annotations

from typing import Literal, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.drafting.survival import ForecastSurvivals
from slipstream.drafting.tree import ROOT

Float64 = NDArray[np.float64]

RuleName = Literal["equality", "recursive_rejection", "block"]
"""The names of `verification.RULES`."""


class ForecastNodes(msgspec.Struct, frozen=True):
    """X nodes of all requests before any of their tokens is drawn: the shape a tree may take.

    `survivals_X`, in [0, 1] and ancestors included, come from `SurvivalModel.forecast`: they know ranks, depths, match
    lengths and past steps. `parents_X` are node numbers among the X, before their children, or ROOT.
    """

    survivals_X: ForecastSurvivals
    parents_X: NDArray[np.int32]


class DrawnNodes(msgspec.Struct, frozen=True):
    """X candidates of all requests, whose survivals may know the tokens drawn; else as ForecastNodes."""

    survivals_X: Float64
    parents_X: NDArray[np.int32]


class Choice(msgspec.Struct, frozen=True):
    """Which of the X nodes are verified; `expected_tokens` and `predicted_s` are those of the step with them.

    `is_speculation_worth_it` is whether it is worth more, drafting included, than a step without drafts.
    """

    is_chosen_X: NDArray[np.bool_]
    num_chosen: int
    expected_tokens: float
    predicted_s: float
    is_speculation_worth_it: bool


@overload
def choose_nodes(
    nodes: DrawnNodes,
    step_s: Float64,
    *,
    num_requests: int,
    token_rate: float,
    draft_s: float = ...,
    rule: Literal["equality"],
) -> Choice: ...


@overload
def choose_nodes(
    nodes: ForecastNodes,
    step_s: Float64,
    *,
    num_requests: int,
    token_rate: float,
    draft_s: float = ...,
    rule: RuleName,
) -> Choice: ...


def choose_nodes(
    nodes: DrawnNodes | ForecastNodes,
    step_s: Float64,
    *,
    num_requests: int,
    token_rate: float,
    draft_s: float = 0.0,
    rule: RuleName,
) -> Choice:
    """The closed set of nodes that is worth most at `token_rate` tokens a second; of equal ones the smallest.

    `step_s[n]` is the predicted time of the step with n nodes, already at the step's padded shape, so its last entry is
    the largest set possible. `draft_s` is the time that drafting takes: with DrawnNodes it is spent whatever is chosen,
    with ForecastNodes it is spent only if something is. Inputs are not changed.

    Under a rule that rejects, which node is verified must not depend on what was drawn there, or the output is biased:
    such a rule gets ForecastNodes, and what it gets back is a shape to draw. Raises ValueError for another pairing, for
    survivals that rise along a path or are no probabilities, for times that are not positive and finite, and for a rate
    that is not finite or below 0.
    """
    is_drawn = isinstance(nodes, DrawnNodes)
    if is_drawn and rule != "equality":
        raise ValueError(f"rule is {rule!r}, and the nodes are drawn; choose among ForecastNodes before drawing")
    _check(nodes, step_s, num_requests)
    if not 0 <= token_rate < np.inf:
        raise ValueError(f"token_rate is {token_rate}, expected at least 0 and finite")
    # A stable sort leaves equals in their order, parents first.
    order = np.argsort(-nodes.survivals_X, kind="stable")[: len(step_s) - 1]
    tokens_N = np.full(len(order) + 1, float(num_requests))
    tokens_N[1:] += np.cumsum(nodes.survivals_X[order])
    worths_N = tokens_N - token_rate * (step_s[: len(order) + 1] + draft_s)
    plain_worth = num_requests - token_rate * step_s[0]
    if not is_drawn:
        worths_N[0] = plain_worth
    best = int(worths_N.argmax())
    is_chosen_X = np.zeros(len(nodes.survivals_X), dtype=np.bool_)
    is_chosen_X[order[:best]] = True
    is_worth_it = best > 0 and bool(worths_N[best] > plain_worth)
    return Choice(is_chosen_X, best, float(tokens_N[best]), float(step_s[best]), is_worth_it)


def _check(nodes: DrawnNodes | ForecastNodes, step_s: Float64, num_requests: int) -> None:
    survivals_X, parents_X = nodes.survivals_X, nodes.parents_X
    num_nodes = len(survivals_X)
    if num_requests < 1 or len(step_s) < 1 or num_nodes != len(parents_X):
        raise ValueError(
            f"{num_requests} requests, {num_nodes} survivals, {len(parents_X)} parents, {len(step_s)} times; "
            "expected at least 1 request, a parent for each survival, and at least 1 time"
        )
    if not (step_s.min() > 0 and step_s.max() < np.inf):
        raise ValueError(f"predicted times are {step_s.min()} to {step_s.max()} s; expected positive and finite ones")
    if num_nodes == 0:
        return
    if not (survivals_X.min() >= 0 and survivals_X.max() <= 1):
        raise ValueError(f"survivals are {survivals_X.min()} to {survivals_X.max()}; expected 0 to 1, no NaN")
    if parents_X.min() < ROOT or (parents_X >= np.arange(num_nodes, dtype=parents_X.dtype)).any():
        raise ValueError(f"parents are {parents_X.min()} to {parents_X.max()}; expected {ROOT} or an earlier node")
    # The root survives always; its "survival" is looked up at -1, the entry after the last node.
    if (survivals_X > np.append(survivals_X, 1.0)[parents_X]).any():
        raise ValueError("a node survives more often than its parent; give products of survivals along the path")
