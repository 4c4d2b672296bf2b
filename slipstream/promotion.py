"""Whether a challenger takes over: `EvaluationReport` in, `PromotionDecision` out. Pure, no I/O.

A report holds one number per held-out request: the difference in acceptance length, challenger minus champion, from
replaying both drafts against the same logged tokens and seed. The gate asks for a lower confidence bound above a
margin, and for no domain to lose more than a tolerance.
"""

from __future__ import annotations

import math
from statistics import NormalDist, fmean, stdev
from typing import Literal

import msgspec

from slipstream.versions import Role


class DomainComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Paired per-request differences in acceptance length, challenger minus champion, on one domain."""

    domain: str
    differences: tuple[float, ...]
    challenger_acceptance_length: float
    champion_acceptance_length: float
    challenger_acceptance_rate: float
    champion_acceptance_rate: float


class EvaluationReport(msgspec.Struct, frozen=True, kw_only=True):
    """A challenger beside the champion on the same held-out requests.

    `look` counts the reports on this challenger so far (first is 1): repeated looks share one error budget.
    `recent` are the paired differences of the latest held-out traffic in its own mix; `domains` holds every domain
    that still has held-out requests. `challenger_overlap` and `champion_overlap` are mean sums over the kept
    vocabulary of min(target, draft): a figure of quality, not what the gate decides on.
    """

    role: Role
    domain: str
    challenger_version: int
    champion_version: int
    look: int
    recent: tuple[float, ...]
    domains: tuple[DomainComparison, ...]
    challenger_overlap: float
    champion_overlap: float
    at: float


class PromotionDecision(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate said of a report, and why."""

    role: Role
    domain: str
    challenger_version: int
    champion_version: int
    verdict: Literal["promote", "hold", "reject"]
    reason: str
    mean_difference: float
    lower_bound: float
    num_requests: int
    at: float


class PromotionGate(msgspec.Struct, frozen=True, kw_only=True):
    """Thresholds of the gate, in tokens per verification pass.

    `margin` is what a challenger must gain at least; `domain_tolerance` what any one domain may lose at most;
    `error_rate` the chance of promoting a draft that is not better, over all looks at it.
    """

    margin: float = 0.01
    domain_tolerance: float = 0.10
    error_rate: float = 0.05
    min_requests: int = 12


def decide(gate: PromotionGate, report: EvaluationReport, *, at: float) -> PromotionDecision:
    """Promote, hold (wait for more held-out requests or another challenger) or reject."""
    error_rate = gate.error_rate / (report.look * (report.look + 1))
    mean, lower = lower_bound(report.recent, error_rate=error_rate)

    def decision(verdict: Literal["promote", "hold", "reject"], reason: str) -> PromotionDecision:
        return PromotionDecision(
            role=report.role,
            domain=report.domain,
            challenger_version=report.challenger_version,
            champion_version=report.champion_version,
            verdict=verdict,
            reason=reason,
            mean_difference=mean,
            lower_bound=lower,
            num_requests=len(report.recent),
            at=at,
        )

    if len(report.recent) < gate.min_requests:
        return decision("hold", f"{len(report.recent)} held-out requests, the gate wants {gate.min_requests}")
    for one in report.domains:
        loss = _domain_loss(one, gate)
        if loss is not None:
            return decision("reject", loss)
    if lower > gate.margin:
        return decision("promote", f"gain {mean:+.3f} tokens per pass, lower bound {lower:+.3f} > {gate.margin}")
    return decision("hold", f"gain {mean:+.3f} tokens per pass, lower bound {lower:+.3f} <= {gate.margin}")


def lower_bound(differences: tuple[float, ...], *, error_rate: float) -> tuple[float, float]:
    """Mean of paired differences and its one-sided lower confidence bound (Student's t).

    The bound is -inf for fewer than two differences.
    """
    if len(differences) < 2:
        return (fmean(differences) if differences else 0.0), -math.inf
    mean = fmean(differences)
    standard_error = stdev(differences) / math.sqrt(len(differences))
    return mean, mean - student_quantile(1.0 - error_rate, len(differences) - 1) * standard_error


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by the Cornish-Fisher expansion about the normal.

    Within 1 % of the exact value for `degrees` >= 8 and `probability` <= 0.999. Source: Abramowitz and Stegun 26.7.5.
    """
    normal = NormalDist().inv_cdf(probability)
    cube, fifth, seventh = normal**3, normal**5, normal**7
    first = (cube + normal) / 4
    second = (5 * fifth + 16 * cube + 3 * normal) / 96
    third = (3 * seventh + 19 * fifth + 17 * cube - 15 * normal) / 384
    return normal + first / degrees + second / degrees**2 + third / degrees**3


def _domain_loss(one: DomainComparison, gate: PromotionGate) -> str | None:
    """Why a domain forbids promotion, or None; a loss counts only when it is certain at the gate's error rate."""
    gains = tuple(-difference for difference in one.differences)
    mean_loss, certain_loss = lower_bound(gains, error_rate=gate.error_rate)
    if len(gains) >= gate.min_requests and certain_loss > gate.domain_tolerance:
        return (
            f"domain {one.domain!r} loses {mean_loss:.3f} tokens per pass, certainly more than "
            f"{gate.domain_tolerance} ({len(gains)} requests)"
        )
    return None
