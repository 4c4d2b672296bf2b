"""What a step costs: a measured table, the experts it wakes, and corrections by the steps that were taken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.drafting.step_cost import ExpertUnion, MeasuredSteps, StepCost, measure

ROWS = (1, 2, 4, 8)
CONTEXTS = (16, 1024)


def dense(seconds_GC: list[list[float]], *, rows: tuple[int, ...] = ROWS) -> MeasuredSteps:
    table, none = np.array(seconds_GC), np.zeros((len(rows), len(CONTEXTS)))
    return MeasuredSteps(rows, CONTEXTS, table, table, none, none)


TABLE = [[1.0, 2.0], [1.2, 2.2], [1.6, 2.6], [3.0, 4.0]]


def seconds(cost: StepCost, *num_rows: int, context: float = 16) -> list[float]:
    return [float(one) for one in cost.predict_s(np.array(num_rows), context_tokens=context)]


def test_between_points_lines_are_straight_in_rows_and_context() -> None:
    cost = StepCost(dense(TABLE))
    assert seconds(cost, 1, 3, 6) == pytest.approx([1.0, 1.4, 2.3])
    assert seconds(cost, 3, context=520) == pytest.approx([1.9])


def test_beyond_the_last_rows_the_last_line_goes_on_but_never_down() -> None:
    assert seconds(StepCost(dense(TABLE)), 12) == pytest.approx([4.4])
    falling = [[4.0, 4.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]
    assert seconds(StepCost(dense(falling)), 12, 100) == pytest.approx([1.0, 1.0])


def test_beyond_the_measured_contexts_the_nearest_holds() -> None:
    cost = StepCost(dense(TABLE))
    assert seconds(cost, 1, context=1) + seconds(cost, 1, context=9999) == pytest.approx([1.0, 2.0])


def test_rows_are_rounded_up_to_their_shape_before_they_are_priced() -> None:
    cost = StepCost(dense(TABLE), shape_buckets=(1, 4))
    assert seconds(cost, 1, 2, 3, 4) == pytest.approx([1.0, 1.6, 1.6, 1.6])
    assert seconds(cost, 5) == pytest.approx([1.95]), "larger than any padded shape"


def test_over_nodes_prices_no_node_first() -> None:
    cost = StepCost(dense(TABLE))
    over, least_share, _ = cost.over_nodes(num_rows=2, max_nodes=2, context_tokens=16)
    assert over.tolist() == pytest.approx([1.2, 1.4, 1.6])
    assert least_share == pytest.approx(0.2 / 1.2)


def test_points_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="ascending"):
        StepCost(dense(TABLE, rows=(1, 4, 2, 8)))


def test_seconds_per_expert_are_what_other_tokens_of_equal_number_cost() -> None:
    # 4 rows: 6 experts and 1.8 s, or 2 experts and 1.0 s: 0.2 s each.
    points = MeasuredSteps((4,), (16,), *(np.array([[one]]) for one in (1.8, 1.0, 6.0, 2.0)))
    union = ExpertUnion(num_experts=8, experts_per_token=2)
    cost = StepCost(points, experts=union)
    assert cost.seconds_per_expert == pytest.approx(0.2)
    expected = 0.6 + 0.2 * float(union.expected(np.array([4.0]))[0])
    assert seconds(cost, 4) == pytest.approx([expected])


def test_experts_of_one_row_are_those_it_chooses() -> None:
    union = ExpertUnion(num_experts=8, experts_per_token=2)
    assert union.expected(np.array([0.0, 1.0])).tolist() == pytest.approx([0.0, 2.0])


def test_a_model_that_wakes_all_experts_wakes_no_more() -> None:
    union = ExpertUnion(num_experts=4, experts_per_token=4)
    union.observe(num_rows=8, num_experts=4.0)
    assert union.expected(np.array([1.0, 8.0])).tolist() == pytest.approx([4.0, 4.0])


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.0])
def test_the_exponent_is_found_from_what_steps_woke(exponent: float) -> None:
    rng = np.random.default_rng(3)
    union = ExpertUnion(num_experts=64, experts_per_token=8)
    truth = ExpertUnion(num_experts=64, experts_per_token=8, exponent=exponent)
    for _ in range(400):
        num_rows = int(rng.integers(1, 20))
        woken = float(truth.expected(np.array([float(num_rows)]))[0])
        union.observe(num_rows=num_rows, num_experts=woken * rng.normal(1, 0.02))
    assert union.exponent == pytest.approx(exponent, abs=0.03)


@pytest.mark.parametrize(("num_rows", "num_experts"), [(1, 2.0), (8, 8.0), (8, 0.0)])
def test_steps_that_say_nothing_of_the_exponent_leave_it(num_rows: int, num_experts: float) -> None:
    union = ExpertUnion(num_experts=8, experts_per_token=2)
    before = union.exponent
    union.observe(num_rows=num_rows, num_experts=num_experts)
    assert union.exponent == before


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0, 1))
def test_more_rows_never_wake_fewer_experts_nor_more_than_there_are(
    num_experts: int, per_token: int, exponent: float
) -> None:
    union = ExpertUnion(num_experts=num_experts, experts_per_token=min(per_token, num_experts), exponent=exponent)
    expected = union.expected(np.arange(200.0))
    assert (np.diff(expected) >= 0).all()
    assert expected.max() <= num_experts


def test_measuring_times_every_point_and_leaves_the_first_run_out() -> None:
    calls: list[tuple[int, int, bool]] = []

    def probe(num_rows: int, context_tokens: int, *, is_varied: bool) -> float:
        calls.append((num_rows, context_tokens, is_varied))
        return 5.0 if is_varied else 2.0

    measured = measure(probe, rows=(1, 4), contexts=(16,), repeats=3)
    assert sorted(set(calls)) == [(1, 16, False), (1, 16, True), (4, 16, False), (4, 16, True)]
    assert len(calls) == 4 * (1 + 2 * 3), "each beside a smallest one"
    assert measured.varied_experts_GC.tolist() == [[5.0], [5.0]]
    assert measured.alike_experts_GC.tolist() == [[2.0], [2.0]]
    assert (measured.varied_s_GC > 0).all()
    assert measured.alike_s_GC.shape == (2, 1)


def test_a_machine_that_became_slower_is_followed() -> None:
    cost = StepCost(dense(TABLE))
    rng = np.random.default_rng(1)
    for _ in range(600):
        num_rows, context = int(rng.integers(1, 9)), float(rng.uniform(16, 1024))
        truth = 1.5 * seconds(StepCost(dense(TABLE)), num_rows, context=context)[0]
        cost.observe(num_rows=num_rows, context_tokens=context, seconds=truth * rng.normal(1, 0.03))
    truth_s = [1.5 * one for one in seconds(StepCost(dense(TABLE)), 1, 3, 8, context=500)]
    assert seconds(cost, 1, 3, 8, context=500) == pytest.approx(truth_s, rel=0.05)
    assert cost.num_steps == 600
    assert cost.mean_error_ratio < 0.1


def test_the_error_reported_is_of_predictions_made_before() -> None:
    cost = StepCost(dense(TABLE))
    cost.observe(num_rows=1, context_tokens=16, seconds=2.0)
    assert cost.mean_error_ratio == pytest.approx(0.5), "1.0 s predicted, 2.0 s measured"


def follow(cost: StepCost, *, seconds_of_one_row: float) -> None:
    """A step of one row, which only tells the pace, took so long."""
    costs = cost.over_nodes(num_rows=1, max_nodes=0, context_tokens=16)
    cost.keep_pace(seconds_of_one_row / costs.seconds[0], pace_share=costs.pace_shares[0])


def after_steps_of_one_second() -> StepCost:
    cost = StepCost(dense(TABLE))
    for _ in range(50):
        cost.observe(num_rows=1, context_tokens=16, seconds=1.0)
    return cost


def test_one_interrupted_step_moves_little() -> None:
    cost = after_steps_of_one_second()
    follow(cost, seconds_of_one_row=1000.0)
    assert 1.1 < seconds(cost, 1)[0] < 1.16, "the pace a tenth, the table less"
    for _ in range(20):
        follow(cost, seconds_of_one_row=1.0)
    assert seconds(cost, 1)[0] == pytest.approx(1.0, abs=0.01)


def test_two_interrupted_steps_move_little_whichever_way_they_are_learned_from() -> None:
    cost = after_steps_of_one_second()
    cost.observe(num_rows=1, context_tokens=16, seconds=1000.0)
    follow(cost, seconds_of_one_row=1000.0)
    assert 1.1 < seconds(cost, 1)[0] < 1.1 * 1.1
    for _ in range(20):
        cost.observe(num_rows=1, context_tokens=16, seconds=1.0)
        follow(cost, seconds_of_one_row=1.0)
    assert seconds(cost, 1)[0] == pytest.approx(1.0, abs=0.01)


def test_a_machine_that_changes_its_pace_is_followed_within_a_few_steps() -> None:
    cost = StepCost(dense(TABLE))
    for _ in range(50):
        cost.observe(num_rows=1, context_tokens=16, seconds=1.0)
    before = seconds(cost, 1, 4)
    for _ in range(12):
        follow(cost, seconds_of_one_row=1.8)
    assert [now / then for now, then in zip(seconds(cost, 1, 4), before, strict=True)] == pytest.approx(
        [1.8, 1.8], rel=0.2
    ), "sizes that were not seen, too"


def test_what_experts_cost_is_learned_apart_from_the_table() -> None:
    flat, none = np.full((4, 2), 1.0), np.zeros((4, 2))
    measured = MeasuredSteps(ROWS, CONTEXTS, flat, flat, none + 3, none + 2)
    cost = StepCost(measured, experts=ExpertUnion(num_experts=8, experts_per_token=2))
    assert cost.seconds_per_expert == 0
    truth, rng = ExpertUnion(num_experts=8, experts_per_token=2), np.random.default_rng(2)
    for _ in range(800):
        num_rows = int(rng.integers(2, 9))
        num_experts = float(truth.expected(np.array([float(num_rows)]))[0] + rng.uniform(-1, 1))
        cost.observe(num_rows=num_rows, context_tokens=16, seconds=0.5 + 0.2 * num_experts, num_experts=num_experts)
    assert cost.seconds_per_expert == pytest.approx(0.2, rel=0.1)
    expected = 0.5 + 0.2 * truth.expected(np.array([2.0, 8.0]))
    assert seconds(cost, 2, 8) == pytest.approx(expected.tolist(), rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 3000), st.floats(1e-4, 10)), max_size=30))
def test_predictions_stay_finite_and_never_fall_below_zero(steps: list[tuple[int, float, float]]) -> None:
    cost = StepCost(dense(TABLE))
    for num_rows, context, taken in steps:
        cost.observe(num_rows=num_rows, context_tokens=context, seconds=taken)
    predicted = cost.predict_s(np.arange(1, 40), context_tokens=300)
    assert np.isfinite(predicted).all()
    assert (predicted >= 0).all()
