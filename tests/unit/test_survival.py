"""Survival: what counts as a trial, and estimates that stay calibrated while the drafter's luck changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slipstream.drafting.survival import (
    CURVE_WINDOW_TRIALS,
    CalibrationCurve,
    NodeFeatures,
    SurvivalModel,
    Trials,
    _rising,
    along_paths,
    outcomes,
    trials,
)
from slipstream.drafting.tree import DraftTree
from slipstream.verification import verify

Float64 = NDArray[np.float64]

MAX_CALIBRATION_ERROR = 0.05


def ints(*numbers: int) -> NDArray[np.int32]:
    return np.array(numbers, dtype=np.int32)


def features(ranks: list[int], depths: list[int], matches: list[int] | None = None) -> NodeFeatures:
    return NodeFeatures(ints(*ranks), ints(*depths), ints(*(matches or [0] * len(ranks))))


def test_survival_along_a_path_is_the_product() -> None:
    products = along_paths(np.array([0.5, 0.25, 0.5, 0.1]), ints(-1, -1, 0, 2))
    assert products.tolist() == pytest.approx([0.5, 0.25, 0.25, 0.025])


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), max_size=40))
def test_products_are_those_of_a_walk_and_never_rise(nodes: list[tuple[int, float]]) -> None:
    parents = [place % (index + 1) - 1 for index, (place, _) in enumerate(nodes)]
    walked: list[float] = []
    for parent, (_, survival) in zip(parents, nodes, strict=True):
        walked.append(survival * (walked[parent] if parent >= 0 else 1.0))
    products = along_paths(np.array([survival for _, survival in nodes]), ints(*parents))
    assert products.tolist() == pytest.approx(walked, rel=1e-9, abs=1e-200)
    assert all(products[node] <= products[parent] for node, parent in enumerate(parents) if parent >= 0)


@pytest.mark.parametrize("factors", [[1.0], [1.0, 0.9], [0.7, 1.0, 1.0], [1.0, 1e-30], [0.1, 0.3]])
def test_products_of_a_long_path_never_rise(factors: list[float]) -> None:
    survivals = np.random.default_rng(6).choice(factors, 1000)
    products = along_paths(survivals, np.arange(-1, 999, dtype=np.int32))
    assert (np.diff(products) <= 0).all()


def test_only_nodes_whose_parent_was_accepted_are_trials() -> None:
    #        0 accepted, 1 its child rejected, 2 below that, 3 a rejected sibling of 0, 4 below that
    result = trials(ints(-1, 0, 1, -1, 3), np.array([True, False, False, False, False]))
    assert result.is_trial_X.tolist() == [True, True, False, True, False]


def test_under_equality_candidates_beside_the_path_are_trials_too() -> None:
    tokens, parents, depths = ints(7, 8, 9, 5), ints(-1, 0, 1, -1), ints(1, 2, 3, 1)
    result = outcomes(tokens, parents, depths, requests_X=ints(0, 0, 0, 0), committed_BS=ints(7, 6).reshape(1, 2))
    assert result.is_trial_X.tolist() == [True, True, False, True]
    assert result.is_accepted_X.tolist() == [True, False, False, False]


def test_under_equality_what_is_not_committed_yet_is_no_trial() -> None:
    tokens, parents, depths = ints(7, 8, 7), ints(-1, 0, -1), ints(1, 2, 1)
    committed = ints(7, -1, 4, 4).reshape(2, 2)
    result = outcomes(tokens, parents, depths, requests_X=ints(0, 0, 1), committed_BS=committed)
    assert result.is_trial_X.tolist() == [True, False, True]
    assert result.is_accepted_X.tolist() == [True, False, False]


@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_outcomes_agree_with_the_verification_of_the_tree(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    edges: dict[tuple[int, int], None] = {}
    depth_of: list[int] = []
    for _ in range(size):
        parent = int(rng.integers(-1, len(edges)))
        if (edge := (parent, int(rng.integers(0, 3)))) not in edges:
            edges[edge] = None
            depth_of.append(1 if parent < 0 else depth_of[parent] + 1)
    parents, tokens = ints(*(parent for parent, _ in edges)), ints(*(token for _, token in edges))
    tree = DraftTree(token_ids=tuple(tokens.tolist()), parents=tuple(parents.tolist()), drafter="any", version=0)
    verified = verify(tree, rng.integers(0, 3, len(edges) + 1).tolist())
    result = outcomes(
        tokens,
        parents,
        ints(*depth_of),
        requests_X=np.zeros(len(edges), dtype=np.int32),
        committed_BS=ints(*verified.token_ids).reshape(1, -1),
    )
    assert np.flatnonzero(result.is_accepted_X).tolist() == list(verified.path)
    assert result.is_trial_X.tolist() == trials(parents, result.is_accepted_X).is_trial_X.tolist()


def test_before_any_evidence_the_first_sibling_has_even_odds() -> None:
    model = SurvivalModel(matching={"lookup": 1_000}, scoring={"chain": 1_000})
    both = features([0, 1, 2], [1, 1, 1], [4, 4, 4])
    assert model.forecast("lookup", both).tolist() == pytest.approx([0.5, 0.25, 0.125])
    assert model.read("chain", both, np.array([0.9, 0.5, 0.1])).tolist() == pytest.approx([0.5, 0.25, 0.125])


def test_one_outcome_moves_an_estimate_as_far_as_it_is_leaned_on() -> None:
    model = SurvivalModel(matching={"lookup": 1_000})
    one = features([0], [1], [4])
    for _ in range(64):
        model.observe("lookup", one, None, Trials(np.array([True]), np.array([False])))
    assert model.forecast("lookup", one)[0] < 0.01
    assert model.forecast("lookup", features([1], [1], [4]))[0] == pytest.approx(0.25), "another rank"


def test_nodes_that_were_not_tried_teach_nothing() -> None:
    model = SurvivalModel(scoring={"chain": 1_000})
    many = features([0] * 100, [1] * 100)
    scores = np.full(100, 0.5)
    model.observe("chain", many, scores, Trials(np.zeros(100, dtype=bool), np.zeros(100, dtype=bool)))
    assert model.read("chain", many, scores)[0] == pytest.approx(0.5)
    assert model.cells("chain").curve.bins() == []


def test_estimates_never_fall_with_the_drafters_score_or_the_match() -> None:
    model = observed_at_random()
    rising = np.linspace(0, 1, 101)
    for rank in range(3):
        for depth in (1, 2, 9):
            same = features([rank] * 101, [depth] * 101, list(range(101)))
            assert (np.diff(model.read("chain", same, rising)) >= 0).all()
            assert (np.diff(model.forecast("lookup", same)) >= 0).all()


def test_a_score_that_is_no_number_is_the_lowest() -> None:
    model = observed_at_random()
    one = features([0], [1])
    unsound = model.read("chain", one, np.array([np.nan]))
    assert unsound.tolist() == model.read("chain", one, np.array([0.0])).tolist()


def test_a_drafter_that_starts_anew_has_forgotten() -> None:
    model = observed_at_random()
    one = features([0], [1], [3])
    for drafter in ("chain", "lookup"):
        assert model.forecast(drafter, one)[0] != 0.5
        model.forget(drafter)
        assert model.forecast(drafter, one).tolist() == [0.5]


def test_drafters_learn_apart() -> None:
    model = SurvivalModel(scoring={"chain": 1_000, "recycling": 1_000})
    many, scores = features([0] * 100, [1] * 100), np.full(100, 0.5)
    model.observe("chain", many, scores, Trials(np.ones(100, dtype=bool), np.ones(100, dtype=bool)))
    assert model.read("chain", many, scores)[0] > 0.95
    assert model.read("recycling", many, scores)[0] == pytest.approx(0.5)


def test_a_drafter_is_asked_for_what_it_has() -> None:
    model = SurvivalModel(matching={"lookup": 1_000}, scoring={"chain": 1_000})
    one, score, tried = features([0], [1]), np.array([0.5]), Trials(np.array([True]), np.array([True]))
    with pytest.raises(ValueError, match="scores"):
        model.read("lookup", one, score)
    with pytest.raises(ValueError, match="scores"):
        model.observe("chain", one, None, tried)
    with pytest.raises(ValueError, match="scores"):
        model.observe("lookup", one, score, tried)
    with pytest.raises(ValueError, match="oracle"):
        model.forecast("oracle", one)


def test_memory_does_not_grow_with_what_was_observed() -> None:
    fresh = SurvivalModel(matching={"lookup": 1_000}, scoring={"chain": 1_000}).num_bytes
    assert observed_at_random().num_bytes == fresh <= 2 * 32 << 10


def observed_at_random() -> SurvivalModel:
    model = SurvivalModel(matching={"lookup": 1_000}, scoring={"chain": 1_000})
    rng = np.random.default_rng(4)
    for _ in range(20):
        some = NodeFeatures(*(rng.integers(low, 12, 100).astype(np.int32) for low in (0, 1, 0)))
        result = Trials(np.ones(100, dtype=bool), rng.random(100) < 0.3)
        model.observe("chain", some, rng.random(100), result)
        model.observe("lookup", some, None, result)
    return model


def test_calibration_curve_of_worked_numbers() -> None:
    curve = CalibrationCurve()
    curve.add(np.array([0.21, 0.23, 0.96, 1.0]), np.array([False, True, True, True]))
    low, high = curve.bins()
    assert (low.predicted, low.accepted_ratio, low.num_trials) == pytest.approx((0.22, 0.5, 2))
    assert (high.predicted, high.accepted_ratio, high.num_trials) == pytest.approx((0.98, 1.0, 2))
    assert curve.expected_error() == pytest.approx((2 * 0.28 + 2 * 0.02) / 4)


def test_what_a_curve_forgets_halves_in_a_window() -> None:
    curve = CalibrationCurve()
    curve.add(np.array([0.2]), np.array([True]))
    curve.forget(CURVE_WINDOW_TRIALS)
    assert curve.bins()[0].num_trials == pytest.approx(0.5)


def test_calibration_of_nothing_has_no_error() -> None:
    assert CalibrationCurve().expected_error() == 0.0
    assert CalibrationCurve().bins() == []


def drafts_of_a_stream(
    rng: np.random.Generator, *, offset: float, slope: float
) -> tuple[NodeFeatures, Float64, Trials]:
    """64 requests, a spine of 4 with one sibling each; survival is a logistic curve of the drafter's score.

    The drafter's idea of itself is off by `offset` and `slope` in log-odds, and falls with depth and rank.
    """
    depths, ranks = np.repeat(np.arange(1, 5), 2), np.tile([0, 1], 4)
    first = rng.beta(2, 1, (64, 4))
    scores = np.stack([first, (1 - first) * rng.random((64, 4))], axis=2).reshape(64, 8)
    log_odds = np.log((scores + 1e-3) / (1 - scores + 1e-3))
    survivals = 1 / (1 + np.exp(-(offset + slope * log_odds - 0.15 * depths - 0.3 * ranks)))
    survivals /= np.maximum(1.0, survivals.reshape(64, 4, 2).sum(axis=2).repeat(2, axis=1))
    draws = rng.random((64, 4)).repeat(2, axis=1)
    floors = np.where(ranks == 0, 0.0, np.roll(survivals, 1, axis=1))
    wins = (draws >= floors) & (draws < floors + survivals)
    spine = np.cumprod(np.concatenate([np.ones((64, 1)), wins[:, 0:-2:2]], axis=1), axis=1).repeat(2, axis=1) > 0
    shape = NodeFeatures(*(np.tile(one, 64).astype(np.int32) for one in (ranks, depths, np.zeros(8))))
    return shape, scores.reshape(-1), Trials(spine.reshape(-1), (wins & spine).reshape(-1))


def stream_errors(drifts: list[tuple[float, float]], *, steps: int) -> list[float]:
    """Calibration error of every 3,000 trials or so, each predicted before it was learned from."""
    rng = np.random.default_rng(11)
    model = SurvivalModel(scoring={"chain": 1_000})
    errors, curve = [], CalibrationCurve()
    for offset, slope in drifts:
        for step in range(steps):
            shape, scores, result = drafts_of_a_stream(rng, offset=offset, slope=slope)
            predicted = model.read("chain", shape, scores)
            curve.add(predicted[result.is_trial_X], result.is_accepted_X[result.is_trial_X])
            model.observe("chain", shape, scores, result)
            if step % 12 == 11:
                errors.append(curve.expected_error())
                curve = CalibrationCurve()
    return errors


def test_calibration_error_is_small_on_a_steady_stream() -> None:
    errors = stream_errors([(-0.5, 0.8)], steps=120)
    assert np.mean(errors[1:]) <= 0.03


def test_calibration_error_stays_small_on_a_stream_that_drifts() -> None:
    # Each jump changes a survival of a half to 0.23 or 0.77; one piece of 12 steps in 10 holds a jump.
    errors = stream_errors([(0.2, 0.8), (-1.0, 1.3), (0.2, 0.5), (1.2, 1.0), (-0.3, 0.7)], steps=120)
    assert np.mean(errors) <= MAX_CALIBRATION_ERROR


def test_a_drafters_own_score_is_not_calibrated_on_that_stream() -> None:
    rng = np.random.default_rng(11)
    curve = CalibrationCurve()
    for _ in range(60):
        _, scores, result = drafts_of_a_stream(rng, offset=-1.0, slope=1.3)
        curve.add(scores[result.is_trial_X], result.is_accepted_X[result.is_trial_X])
    assert curve.expected_error() > 2 * MAX_CALIBRATION_ERROR


def pooled(values: list[float], weights: list[float]) -> list[float]:
    """Isotonic regression by pooling adjacent violators, one after another."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (left, left_weight, left_size), (right, right_weight, right_size) = pools[-2:]
            total = left_weight + right_weight
            pools[-2:] = [((left * left_weight + right * right_weight) / total, total, left_size + right_size)]
    return [value for value, _, size in pools for _ in range(size)]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 100)), min_size=1, max_size=12))
def test_rising_is_the_isotonic_regression(points: list[tuple[float, float]]) -> None:
    values, weights = [value for value, _ in points], [weight for _, weight in points]
    line = np.array([[values, values[::-1]]])
    rising = _rising(line, np.array([[weights, weights[::-1]]]))
    assert rising[0, 0].tolist() == pytest.approx(pooled(values, weights), abs=1e-9)
    assert rising[0, 1].tolist() == pytest.approx(pooled(values[::-1], weights[::-1]), abs=1e-9)
