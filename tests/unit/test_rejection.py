"""The rejection rules keep the target's law exactly: enumerated with fractions, and every biased variant is caught."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.drafting.tree import NO_DRAFT, ROOT, DraftTree, chain_tree
from slipstream.verification import (
    RULES,
    Purpose,
    ScoredTree,
    Verification,
    VerificationRule,
    block_verification,
    equality,
    recursive_rejection,
)
from slipstream.verification.rejection import residual, without
from tests.unit.enumeration import (
    Drawn,
    EnumeratedChance,
    Model,
    Row,
    Tokens,
    draw_branching,
    draw_siblings,
    draw_two_beams,
    emitted_law,
    joint_law,
    law_of,
    random_model,
    scored,
    total_variation,
)
from tests.unit.mutant_rules import BIASED_BLOCKS, BIASED_DRAFTS, BIASED_RECURSIONS, Spoil

WORLDS = [(3, 0), (3, 1), (4, 1)]
"""Sizes of the vocabulary, and how many tokens have no probability, in the target and in the draft apart."""


def models(seed: int, vocab_size: int, num_zeros: int = 0) -> tuple[Model, Model]:
    """A target and a draft."""
    return (
        random_model(seed, vocab_size=vocab_size, num_zeros=num_zeros),
        random_model(seed + 1000, vocab_size=vocab_size, num_zeros=num_zeros),
    )


def bias(
    rule: VerificationRule, widths: Sequence[int], target: Model, draft: Model, spoil: Spoil | None = None
) -> Fraction:
    """Total variation between what is emitted and the target, over the tree's depth and the bonus token."""

    def draws(chance: EnumeratedChance) -> Drawn:
        drawn = draw_branching(draft, widths, chance)
        return spoil(drawn, draft) if spoil else drawn

    length = len(widths) + 1
    law = emitted_law(rule, draws, target=target, draft=draft, length=length)
    return total_variation(law, joint_law(target, length))


# ------------------------------------------------------------------------------------------------ exact, on any tree


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vocab_size", "num_zeros"), WORLDS)
@pytest.mark.parametrize("widths", [(1,), (3,), (2, 1), (1, 1)])
def test_recursive_rejection_keeps_the_targets_joint_law(
    widths: tuple[int, ...], vocab_size: int, num_zeros: int, seed: int
) -> None:
    assert bias(recursive_rejection, widths, *models(seed, vocab_size, num_zeros)) == 0


def test_recursive_rejection_keeps_the_joint_law_of_two_full_levels() -> None:
    assert bias(recursive_rejection, (2, 2), *models(7, 4)) == 0


@pytest.mark.parametrize("widths", [(4,), (2, 1)])
def test_recursive_rejection_keeps_the_joint_law_of_five_tokens(widths: tuple[int, ...]) -> None:
    assert bias(recursive_rejection, widths, *models(11, 5)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_recursive_rejection_keeps_the_joint_law_under_stochastic_beam_search(seed: int) -> None:
    target, draft = models(seed, 3)
    law = emitted_law(
        recursive_rejection, lambda chance: draw_two_beams(draft, chance), target=target, draft=draft, length=3
    )
    assert total_variation(law, joint_law(target, 3)) == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vocab_size", "num_zeros"), WORLDS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_block_verification_keeps_the_targets_joint_law(
    length: int, vocab_size: int, num_zeros: int, seed: int
) -> None:
    assert bias(block_verification, (1,) * length, *models(seed, vocab_size, num_zeros)) == 0


def test_block_verification_keeps_the_joint_law_of_five_tokens() -> None:
    assert bias(block_verification, (1, 1), *models(11, 5)) == 0


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seed", range(3))
def test_a_perfect_draft_is_accepted_whole_and_keeps_the_law(rule: VerificationRule, seed: int) -> None:
    target, _ = models(seed, 3)
    assert bias(rule, (1, 1), target, target) == 0
    accepted = law_of(lambda chance: rule(scored(draw_branching(target, (1, 1), chance), target, target), chance).path)
    # Equality without the noise in the draft accepts only by coincidence.
    assert (set(accepted) == {(0, 1)}) == (rule is not equality)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_draft_draws_from_the_target(rule: VerificationRule) -> None:
    target, draft = models(5, 4, 1)
    law = emitted_law(rule, lambda chance: {}, target=target, draft=draft, length=1)
    assert total_variation(law, joint_law(target, 1)) == 0


@pytest.mark.parametrize("spoil", [None, *BIASED_DRAFTS])
def test_equality_keeps_the_law_of_any_tree_however_it_was_drafted(spoil: Spoil | None) -> None:
    assert bias(equality, (2, 1), *models(3, 3), spoil) == 0


# ---------------------------------------------------------------------------------------------------- biased variants

BIAS_WORLDS = [models(seed, 4) for seed in range(3)]


@pytest.mark.parametrize("spoil", BIASED_DRAFTS)
@pytest.mark.parametrize("widths", [(1,), (2,), (2, 1)])
def test_a_draft_that_is_no_draw_is_caught(spoil: Spoil, widths: tuple[int, ...]) -> None:
    """The draft whose rule was proven above, spoiled: the same law is off in at least one world wherever it can be."""
    worst = max(bias(recursive_rejection, widths, *world, spoil) for world in BIAS_WORLDS)
    # One draw has no order and no later sibling, and it is the better half of one.
    is_harmless = widths == (1,) and spoil.__name__ in ("sorted_by_draft", "siblings_above_threshold", "pruned_by_path")
    assert (worst == 0) if is_harmless else (worst > 0)


@pytest.mark.parametrize("rule", BIASED_RECURSIONS)
def test_a_wrong_step_between_siblings_is_caught(rule: VerificationRule) -> None:
    assert max(bias(rule, (3,), *world) for world in BIAS_WORLDS) > 0


@pytest.mark.parametrize("rule", BIASED_BLOCKS)
def test_a_wrong_block_is_caught(rule: VerificationRule) -> None:
    assert max(bias(rule, (1, 1), *world) for world in BIAS_WORLDS) > 0


# ------------------------------------------------------------------------------------------------- how much is accepted


def accepted_length(rule: VerificationRule, widths: Sequence[int], target: Model, draft: Model) -> Fraction:
    law = law_of(lambda chance: rule(scored(draw_branching(draft, widths, chance), target, draft), chance).path)
    return sum((probability * len(path) for path, probability in law.items()), Fraction(0))


@pytest.mark.parametrize("seed", range(5))
def test_a_block_accepts_at_least_what_token_by_token_verification_does(seed: int) -> None:
    target, draft = models(seed, 3)
    by_token = accepted_length(recursive_rejection, (1, 1, 1), target, draft)
    assert accepted_length(block_verification, (1, 1, 1), target, draft) >= by_token


def test_the_papers_example_accepts_ten_ninths_by_token_and_eleven_ninths_by_block() -> None:
    def target(_: Tokens) -> Row:
        return np.array([Fraction(1, 3), Fraction(2, 3)], object)

    def draft(_: Tokens) -> Row:
        return np.array([Fraction(2, 3), Fraction(1, 3)], object)

    assert accepted_length(recursive_rejection, (1, 1), target, draft) == Fraction(10, 9)
    assert accepted_length(block_verification, (1, 1), target, draft) == Fraction(11, 9)


def test_one_sibling_is_accepted_with_the_overlap() -> None:
    target, draft = models(2, 5)
    overlap = np.minimum(target(()), draft(())).sum()
    assert accepted_length(recursive_rejection, (1,), target, draft) == overlap


# ------------------------------------------------------------------------------------------------------- small and bad


class Decided:
    """A chance that says what it is told, and notes what it was asked."""

    def __init__(self, *accepted: bool, bonus: int = 0) -> None:
        self._accepted = list(accepted)
        self._bonus = bonus
        self.asked: list[tuple[float, float]] = []
        self.weights: list[float] = []

    def accepts(self, part: Any, *, out_of: Any, depth: int, attempt: int = 0) -> bool:
        self.asked.append((float(part), float(out_of)))
        return self._accepted.pop(0)

    def draws(self, weights_V: Any, *, depth: int, purpose: Purpose) -> int:
        self.weights = [float(weight) for weight in weights_V]
        return self._bonus


def rows(*values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def siblings(*token_ids: int) -> DraftTree:
    return DraftTree(token_ids=token_ids, parents=(ROOT,) * len(token_ids), drafter="test", version=1)


def test_siblings_are_tried_in_order_against_what_is_left() -> None:
    tree = siblings(0, 1)
    behind = [0.0, 0.0, 1.0]
    one = ScoredTree(
        tree=tree, target_probs_XV=rows([0.2, 0.3, 0.5], behind, behind), draft_probs_PV=rows([0.5, 0.3, 0.2])
    )
    chance = Decided(False, False, bonus=2)
    assert recursive_rejection(one, chance) == Verification(path=(), token_ids=(2,))
    # (t - d)+ = (0, 0, 0.3): all that is left is token 2; the draft without token 0 is (0, 0.6, 0.4).
    assert chance.asked == [(0.2, 0.5), (0.0, pytest.approx(0.6))]
    assert chance.weights == pytest.approx([0, 0, 1])
    assert recursive_rejection(one, Decided(False, True, bonus=2)) == Verification(path=(1,), token_ids=(1, 2))


def test_inputs_are_not_changed() -> None:
    one = ScoredTree(
        tree=siblings(0, 1), target_probs_XV=rows(*[[0.2, 0.3, 0.5]] * 3), draft_probs_PV=rows([0.5, 0.3, 0.2])
    )
    before = one.target_probs_XV.clone(), one.draft_probs_PV.clone()
    recursive_rejection(one, Decided(False, False))
    assert torch.equal(one.target_probs_XV, before[0])
    assert torch.equal(one.draft_probs_PV, before[1])


def test_where_nothing_is_left_of_the_target_it_is_drawn_from_whole() -> None:
    draft_probs = [0.5, 0.5, 0.0]
    target_probs = [0.5 - 1e-17, 0.5 - 1e-16, 0.0]
    one = ScoredTree(
        tree=siblings(1), target_probs_XV=rows(target_probs, draft_probs), draft_probs_PV=rows(draft_probs)
    )
    chance = Decided(False, bonus=0)
    assert recursive_rejection(one, chance).token_ids == (0,)
    assert chance.weights == target_probs
    assert block_verification(one, Decided(False, bonus=0)).token_ids == (0,)


def test_a_sibling_the_draft_could_not_draw_is_passed_over() -> None:
    """Fillers keep the law: where they are tried does not depend on a draw."""
    target, draft = models(4, 4, 2)

    def with_fillers(chance: EnumeratedChance) -> Drawn:
        tokens = draw_siblings(draft(()), 1, chance)
        impossible = [token for token in range(4) if draft(())[token] == 0]
        return {(): [impossible[0], *tokens, impossible[1]]}

    law = emitted_law(recursive_rejection, with_fillers, target=target, draft=draft, length=2)
    assert total_variation(law, joint_law(target, 2)) == 0


def test_a_chain_ends_before_a_token_the_draft_could_not_draw() -> None:
    one = ScoredTree(
        tree=chain_tree([0, 1], drafter="test", version=1),
        target_probs_XV=rows([0.5, 0.5], [0.5, 0.5], [0.5, 0.5]),
        draft_probs_PV=rows([0.5, 0.5], [1.0, 0.0]),
    )
    chance = Decided(True, bonus=1)
    assert block_verification(one, chance) == Verification(path=(0,), token_ids=(0, 1))
    assert chance.asked == [(1, 1)]


def test_more_siblings_than_the_draft_has_tokens_left_are_passed_over() -> None:
    one = ScoredTree(tree=siblings(0, 1), target_probs_XV=rows(*[[0.5, 0.5]] * 3), draft_probs_PV=rows([1.0, 0.0]))
    chance = Decided(False, bonus=1)
    assert recursive_rejection(one, chance) == Verification(path=(), token_ids=(1,))
    assert chance.asked == [(0.5, 1.0)]


def test_residuals_of_tensors_and_fractions_agree() -> None:
    target, draft = models(9, 5)
    exact = residual(target(()), draft(())), without(draft(()), 2)
    floats = [torch.from_numpy(row(()).astype(float)) for row in (target, draft)]
    assert residual(floats[0], floats[1]).tolist() == pytest.approx([float(value) for value in exact[0]], abs=1e-15)
    assert without(floats[1], 2).tolist() == pytest.approx([float(value) for value in exact[1]], abs=1e-15)


def test_a_small_rest_of_the_draft_keeps_its_digits() -> None:
    rest = without(rows([1 - 3e-20, 1e-20, 2e-20])[0], 0)
    assert rest.tolist() == pytest.approx([0, 1 / 3, 2 / 3])


@pytest.mark.parametrize("rule", [recursive_rejection, block_verification])
@pytest.mark.parametrize(
    ("target_probs", "draft_probs", "message"),
    [
        ([[0.5, 0.5]] * 2, [[float("nan"), 0.5]], "draft probabilities behind the root sum to nan"),
        ([[0.5, 0.5]] * 2, [[1.5, -0.5]], "the smallest is -0.5"),
        ([[0.5, 0.4]] * 2, [[0.5, 0.5]], "target probabilities behind the root sum to 0.9"),
        ([[0.5, 0.5], [float("nan"), 1.0]], [[0.5, 0.5]], "target probabilities behind the node 0"),
        ([[0.5, 0.5]], [[0.5, 0.5]], "1 rows of target and 1 of draft probabilities; the tree needs 2"),
        ([[0.5, 0.5]] * 2, [[0.5, 0.5]] * 2, "2 rows of target and 2 of draft"),
        ([[0.5, 0.5]] * 2, [[0.5, 0.25, 0.25]], "the draft's vocabulary has 3 tokens, the target's 2"),
    ],
)
def test_probabilities_that_are_none_are_refused(
    rule: VerificationRule, target_probs: Any, draft_probs: Any, message: str
) -> None:
    one = ScoredTree(tree=siblings(0), target_probs_XV=rows(*target_probs), draft_probs_PV=rows(*draft_probs))
    with pytest.raises(ValueError, match=message.replace("-", r"\-")):
        rule(one, Decided(True))


@pytest.mark.parametrize("rule", [recursive_rejection, block_verification])
def test_a_token_outside_the_vocabulary_is_refused(rule: VerificationRule) -> None:
    one = ScoredTree(tree=siblings(-1), target_probs_XV=rows(*[[0.5, 0.5]] * 2), draft_probs_PV=rows([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"token -1; the vocabulary is 0\.\.1"):
        rule(one, Decided(True))


def test_a_tree_is_no_chain_for_block_verification() -> None:
    one = ScoredTree(tree=siblings(0, 1), target_probs_XV=rows(*[[0.5, 0.5]] * 3), draft_probs_PV=rows([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"parents are \[-1, -1\]; block verification takes a chain"):
        block_verification(one, Decided())


def test_the_rules_stand_behind_one_signature() -> None:
    one = ScoredTree(
        tree=NO_DRAFT, target_probs_XV=rows([0.25, 0.75]), draft_probs_PV=torch.empty(0, 2, dtype=torch.float64)
    )
    assert {name: rule(one, Decided(bonus=1)) for name, rule in RULES.items()} == {
        name: Verification(path=(), token_ids=(1,)) for name in ("equality", "recursive_rejection", "block")
    }
