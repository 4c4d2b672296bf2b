"""The gate, on numbers worked by hand, against scipy, and over many challengers that are no better."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from scipy import stats

from slipstream.promotion import (
    DomainComparison,
    EvaluationReport,
    PromotionGate,
    decide,
    lower_bound,
    student_quantile,
)

GATE = PromotionGate(margin=0.01, domain_tolerance=0.10, error_rate=0.05, min_requests=4)


def compared(domain: str, *differences: float) -> DomainComparison:
    return DomainComparison(
        domain=domain,
        differences=differences,
        challenger_acceptance_length=2.0,
        champion_acceptance_length=2.0,
        challenger_acceptance_rate=0.5,
        champion_acceptance_rate=0.5,
    )


def report_of(recent: tuple[float, ...], *domains: DomainComparison, look: int = 1) -> EvaluationReport:
    return EvaluationReport(
        role="draft",
        domain="default",
        challenger_version=2,
        champion_version=1,
        look=look,
        recent=recent,
        domains=domains,
        challenger_overlap=0.5,
        champion_overlap=0.5,
        at=1.0,
    )


def test_the_bound_of_five_differences_by_hand() -> None:
    # Mean 0.3, standard deviation sqrt(0.1 / 4), standard error sqrt(0.025 / 5); t(0.95, 4) = 2.132.
    mean, lower = lower_bound((0.1, 0.2, 0.3, 0.4, 0.5), error_rate=0.05)
    assert mean == pytest.approx(0.3)
    assert lower == pytest.approx(0.3 - 2.132 * math.sqrt(0.005), abs=5e-4)


def test_fewer_than_two_differences_bound_nothing() -> None:
    assert lower_bound((), error_rate=0.05) == (0.0, -math.inf)
    assert lower_bound((0.7,), error_rate=0.05) == (0.7, -math.inf)


@pytest.mark.parametrize("degrees", [8, 11, 23, 47, 200])
@pytest.mark.parametrize("probability", [0.6, 0.9, 0.95, 0.975, 0.9917, 0.999])
def test_students_quantile_is_within_one_percent(probability: float, degrees: int) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=0.01)


def test_a_clear_gain_is_promoted() -> None:
    decision = decide(GATE, report_of((0.1, 0.2, 0.3, 0.4, 0.5)), at=7.0)
    assert decision.verdict == "promote"
    assert (decision.challenger_version, decision.champion_version, decision.at) == (2, 1, 7.0)
    assert decision.num_requests == 5
    # The first look has half of the error budget: t(0.975, 4) = 2.776, by the expansion 2.769.
    assert decision.lower_bound == pytest.approx(0.3 - 2.776 * math.sqrt(0.005), abs=1e-3)


def test_too_few_requests_hold_however_large_the_gain() -> None:
    decision = decide(GATE, report_of((9.0, 9.1, 9.2)), at=0.0)
    assert decision.verdict == "hold"
    assert decision.reason == "3 held-out requests, the gate wants 4"


def test_a_gain_within_the_noise_holds() -> None:
    decision = decide(GATE, report_of((-1.0, 1.5, -0.8, 1.4, 0.3)), at=0.0)
    assert decision.mean_difference > GATE.margin
    assert decision.verdict == "hold"


def test_a_certain_gain_below_the_margin_holds() -> None:
    gate = msgspec.structs.replace(GATE, margin=0.5)
    assert decide(gate, report_of((0.40, 0.41, 0.42, 0.43)), at=0.0).verdict == "hold"
    assert decide(GATE, report_of((0.40, 0.41, 0.42, 0.43)), at=0.0).verdict == "promote"


def test_a_certain_loss_in_one_domain_rejects_and_names_it() -> None:
    gain = (0.5, 0.6, 0.7, 0.8)
    decision = decide(GATE, report_of(gain, compared("sql", -0.5, -0.6, -0.5, -0.6), compared("math", *gain)), at=0.0)
    assert decision.verdict == "reject"
    assert "'sql' loses 0.550" in decision.reason


@pytest.mark.parametrize("losses", [(-0.05, -0.06, -0.05, -0.06), (-2.0, 1.5, -1.0, 1.0), (-0.5, -0.6, -0.5)])
def test_a_small_an_uncertain_or_a_barely_seen_loss_does_not_reject(losses: tuple[float, ...]) -> None:
    assert decide(GATE, report_of((0.5, 0.6, 0.7, 0.8), compared("sql", *losses)), at=0.0).verdict == "promote"


def test_later_looks_have_a_smaller_share_of_one_error_budget() -> None:
    differences = (0.1, 0.2, 0.3, 0.4, 0.5)
    bounds = [decide(GATE, report_of(differences, look=look), at=0.0).lower_bound for look in (1, 2, 3)]
    assert bounds == sorted(bounds, reverse=True)
    assert sum(GATE.error_rate / (look * (look + 1)) for look in range(1, 1000)) < GATE.error_rate


def test_a_challenger_that_is_no_better_is_promoted_at_most_at_the_error_rate_over_all_looks() -> None:
    """4,000 challengers whose true gain is exactly the margin, each looked at five times as its window fills."""
    random = np.random.default_rng(20)
    gate = PromotionGate(margin=0.01, error_rate=0.05, min_requests=12)
    num_challengers, window_sizes = 4_000, (12, 18, 24, 36, 48)
    num_promoted = 0
    for _ in range(num_challengers):
        differences = tuple(random.normal(gate.margin, 0.4, size=window_sizes[-1]).tolist())
        looks = enumerate(window_sizes, start=1)
        num_promoted += any(
            decide(gate, report_of(differences[:size], look=look), at=0.0).verdict == "promote" for look, size in looks
        )
    share = num_promoted / num_challengers
    # Three standard errors of a share of 4,000 above the rate; and a gate that never promotes would prove nothing.
    assert 0.01 < share < gate.error_rate + 3 * math.sqrt(0.05 * 0.95 / num_challengers)


def test_a_challenger_that_is_better_is_promoted_nearly_always() -> None:
    random = np.random.default_rng(21)
    gate = PromotionGate()
    reports = [report_of(tuple(random.normal(0.3, 0.4, size=48).tolist())) for _ in range(200)]
    assert sum(decide(gate, report, at=0.0).verdict == "promote" for report in reports) >= 190
