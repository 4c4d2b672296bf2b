"""What candidates survive beside each other: shares of one node, and weights that come to say what happens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slipstream.drafting.merged_survival import NUM_SOURCES, MergedSurvival
from slipstream.drafting.survival import CURVE_WINDOW_TRIALS

Float64 = NDArray[np.float64]

NAN = float("nan")
CHAIN, RECYCLING, LOOKUP = range(NUM_SOURCES)


def said(*lines: tuple[float, float, float]) -> Float64:
    return np.array(lines).reshape(-1, NUM_SOURCES)


@pytest.mark.parametrize("source", range(NUM_SOURCES))
@pytest.mark.parametrize("survival", [0.02, 0.5, 0.97])
def test_before_any_evidence_a_lone_candidate_survives_as_its_source_says(source: int, survival: float) -> None:
    survivals_CO = np.full((1, NUM_SOURCES), NAN)
    survivals_CO[0, source] = survival
    assert MergedSurvival().shares(survivals_CO) == pytest.approx([survival])


def test_before_any_evidence_several_sources_count_by_the_mean_of_their_log_odds() -> None:
    assert MergedSurvival().shares(said((0.8, 0.2, NAN))) == pytest.approx([0.5])


def test_siblings_take_from_each_other() -> None:
    merged = MergedSurvival()
    both = merged.shares(said((0.8, NAN, NAN), (NAN, NAN, 0.8)))
    assert both.tolist() == pytest.approx([4 / 9, 4 / 9]), "four to one each, against one for none of them"


survivals = st.one_of(st.just(NAN), st.floats(0.0, 1.0))


@given(
    lines=st.lists(st.tuples(survivals, survivals, survivals), max_size=6),
    weights=st.lists(st.floats(-50.0, 50.0), min_size=32, max_size=32),
)
def test_shares_are_a_distribution_whatever_was_learned(
    lines: list[tuple[float, float, float]], weights: list[float]
) -> None:
    merged = MergedSurvival()
    merged.weights[:] = np.reshape(weights, (8, 4))
    shares_C = merged.shares(said(*lines))
    assert ((shares_C >= 0.0) & (shares_C <= 1.0)).all()
    assert shares_C.sum() <= 1.0 + 1e-12


class Text:
    """Nodes at which the chain and a look-up propose, and Token Recycling echoes the chain.

    Where they agree they are right nine times in ten, else the chain is seven times in ten and the look-up once.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def node(self) -> tuple[Float64, NDArray[np.bool_]]:
        """What the sources say, which is the same everywhere, and which candidate came."""
        luck = self._rng.random()
        if self._rng.random() < 0.5:
            return said((0.6, 0.6, 0.6)), np.array([luck < 0.9])
        return said((0.6, 0.6, NAN), (NAN, NAN, 0.6)), np.array([luck < 0.7, 0.7 <= luck < 0.8])


def taught(seed: int, *, num_nodes: int = 3_000) -> MergedSurvival:
    merged, text = MergedSurvival(), Text(seed)
    for _ in range(num_nodes):
        survivals_CO, has_come_C = text.node()
        merged.learn(survivals_CO, merged.shares(survivals_CO), has_come_C)
    return merged


@pytest.mark.parametrize("seed", range(3))
def test_agreement_and_disagreement_are_told_apart(seed: int) -> None:
    merged = taught(seed)
    assert merged.shares(said((0.6, 0.6, 0.6)))[0] == pytest.approx(0.9, abs=0.04)
    chain, lookup = merged.shares(said((0.6, 0.6, NAN), (NAN, NAN, 0.6)))
    assert chain == pytest.approx(0.7, abs=0.06)
    assert lookup == pytest.approx(0.1, abs=0.06)
    assert merged.curve.expected_error() <= 0.05


def test_what_no_source_proposed_together_stays_as_it_was() -> None:
    fresh, merged = MergedSurvival(), taught(0)
    only_recycling = 1 << RECYCLING
    assert (merged.weights[only_recycling] == fresh.weights[only_recycling]).all()
    assert (merged.weights[1 << CHAIN | 1 << RECYCLING] != fresh.weights[1 << CHAIN | 1 << RECYCLING]).any()
    assert (merged.weights[1 << LOOKUP] != fresh.weights[1 << LOOKUP]).any()


def test_weights_follow_when_luck_changes() -> None:
    merged = taught(1, num_nodes=20_000)
    for _ in range(2_000):
        survivals_CO = said((0.6, 0.6, 0.6))
        merged.learn(survivals_CO, merged.shares(survivals_CO), np.array([False]))
    assert merged.shares(said((0.6, 0.6, 0.6)))[0] < 0.05


def test_trials_of_the_curve_fade_as_new_ones_come() -> None:
    merged = taught(2)
    number = merged.curve.sums[0].sum()
    merged.let_curve_fade()
    before = merged.curve.sums[0].sum()
    assert before == pytest.approx(number * 0.5 ** (number / CURVE_WINDOW_TRIALS))
    merged.let_curve_fade()
    assert merged.curve.sums[0].sum() == before, "nothing came since"
