"""Exact laws: an experiment's random decisions are enumerated, with fractions, instead of drawn.

An experiment is the code that serves (`slipstream.verification`), given a `Chance` that takes every branch in turn.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.drafting.tree import ROOT, DraftTree
from slipstream.verification import Purpose, ScoredTree, VerificationRule

Tokens = tuple[int, ...]
Law = dict[Tokens, Fraction]
Row = NDArray[Any]
Model = Callable[[Tokens], Row]
"""The distribution of the next token behind some tokens."""

Drawn = dict[Tokens, list[int]]
"""What was drawn behind each path, in the order of the draws; a tree without its scores."""


class EnumeratedChance:
    """Follows a script of branches, then takes the first one everywhere; notes the probability and what it left out."""

    def __init__(self, script: tuple[int, ...]) -> None:
        self._script = script
        self._taken: list[int] = []
        self.probability = Fraction(1)
        self.left_out: list[tuple[int, ...]] = []

    def accepts(self, part: Any, *, out_of: Any, depth: int, attempt: int = 0) -> bool:
        assert part >= 0
        assert out_of >= 0
        probability = min(Fraction(1), Fraction(part) / out_of) if part else Fraction(0)
        return bool(self._branch([1 - probability, probability]))

    def draws(self, weights_V: Any, *, depth: int, purpose: Purpose) -> int:
        total = Fraction(weights_V.sum())
        return self._branch([Fraction(weight) / total for weight in weights_V])

    def _branch(self, probabilities: Sequence[Fraction]) -> int:
        possible = [choice for choice, probability in enumerate(probabilities) if probability > 0]
        place = len(self._taken)
        if place == len(self._script):
            self.left_out += [(*self._taken, other) for other in possible[1:]]
            self._script = (*self._script, possible[0])
        choice = self._script[place]
        self._taken.append(choice)
        self.probability *= probabilities[choice]
        return choice


def law_of(experiment: Callable[[EnumeratedChance], Tokens]) -> Law:
    """The probability of every outcome; they sum to one."""
    law: Law = defaultdict(Fraction)
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        chance = EnumeratedChance(scripts.pop())
        law[experiment(chance)] += chance.probability
        scripts += chance.left_out
    assert sum(law.values()) == 1
    return law


def random_model(seed: int, *, vocab_size: int, num_zeros: int = 0) -> Model:
    """A fixed random distribution of fractions behind every path, `num_zeros` of its entries 0."""
    rows: dict[Tokens, Row] = {}

    def model(path: Tokens) -> Row:
        if path not in rows:
            source = random.Random(f"{seed} {path}")
            weights = [source.randint(1, 9) for _ in range(vocab_size)]
            for token in source.sample(range(vocab_size), num_zeros):
                weights[token] = 0
            rows[path] = np.array([Fraction(weight, sum(weights)) for weight in weights], object)
        return rows[path]

    return model


def draw_siblings(draft_probs_V: Row, num_draws: int, chance: EnumeratedChance) -> list[int]:
    """Different tokens, one after another: what Gumbel-Top-k gives."""
    rest_V = draft_probs_V.copy()
    tokens: list[int] = []
    while len(tokens) < num_draws and rest_V.sum() > 0:
        tokens.append(chance.draws(rest_V, depth=0, purpose=Purpose.DRAFT))
        rest_V[tokens[-1]] = 0
    return tokens


def draw_branching(draft: Model, widths: Sequence[int], chance: EnumeratedChance) -> Drawn:
    """RSD with constant branching: `widths[level]` siblings behind every node of a level."""
    drawn: Drawn = {}
    level: list[Tokens] = [()]
    for width in widths:
        for path in level:
            drawn[path] = draw_siblings(draft(path), width, chance)
        level = [(*path, token) for path in level for token in drawn[path]]
    return drawn


def draw_two_beams(draft: Model, chance: EnumeratedChance) -> Drawn:
    """RSD by stochastic beam search, two beams and two levels, its law worked out by hand.

    The better beam's first child has its parent's score, so it is kept. Its second child and the other beam's first
    child are maxima of Gumbel variables below the same bound, so one is larger in proportion to the mass it is the
    maximum of, whichever tokens attain it.
    """
    first, second = draw_siblings(draft(()), 2, chance)
    child = chance.draws(draft((first,)), depth=1, purpose=Purpose.DRAFT)
    mass = draft(())[first]
    other_child_mass = mass * (1 - draft((first,))[child])
    if chance.accepts(other_child_mass, out_of=other_child_mass + 1 - mass, depth=1):
        rest_V = draft((first,)).copy()
        rest_V[child] = 0
        other = chance.draws(rest_V, depth=1, purpose=Purpose.DRAFT)
        return {(): [first, second], (first,): [child, other]}
    other = chance.draws(draft((second,)), depth=1, purpose=Purpose.DRAFT)
    return {(): [first, second], (first,): [child], (second,): [other]}


def tree_of(drawn: Drawn) -> tuple[DraftTree, list[Tokens]]:
    """The tree, level by level, and the path of every node."""
    paths: list[Tokens] = []
    parents: list[int] = []
    level: list[tuple[int, Tokens]] = [(ROOT, ())]
    while level:
        below: list[tuple[int, Tokens]] = []
        for node, path in level:
            for token in drawn.get(path, []):
                below.append((len(paths), (*path, token)))
                paths.append((*path, token))
                parents.append(node)
        level = below
    tree = DraftTree(token_ids=tuple(path[-1] for path in paths), parents=tuple(parents), drafter="test", version=1)
    return tree, paths


def scored(drawn: Drawn, target: Model, draft: Model) -> ScoredTree[Row]:
    tree, paths = tree_of(drawn)
    vocab_size = len(target(()))
    drafting = sorted({(parent, paths[parent] if parent != ROOT else ()) for parent in tree.parents})
    return ScoredTree(
        tree=tree,
        target_probs_XV=np.stack([target(path) for path in [(), *paths]]),
        draft_probs_PV=np.array([draft(path) for _, path in drafting], object).reshape(len(drafting), vocab_size),
    )


def joint_law(model: Model, length: int) -> Law:
    law: Law = {(): Fraction(1)}
    for _ in range(length):
        law = {
            (*path, token): mass * probability
            for path, mass in law.items()
            for token, probability in enumerate(model(path))
        }
    return law


def emitted_law(
    rule: VerificationRule,
    draws: Callable[[EnumeratedChance], Drawn],
    *,
    target: Model,
    draft: Model,
    length: int,
) -> Law:
    """The joint law of the first `length` tokens: what one pass emits, and the target's own behind it."""
    passed = law_of(lambda chance: rule(scored(draws(chance), target, draft), chance).token_ids)
    law: Law = defaultdict(Fraction)
    for path, mass in passed.items():
        for rest, probability in joint_law(_behind(target, path), length - len(path)).items():
            law[(*path, *rest)] += mass * probability
    return law


def _behind(model: Model, path: Tokens) -> Model:
    return lambda after: model((*path, *after))


def total_variation(law: Law, other: Law) -> Fraction:
    """Half the sum of the differences: 0 if and only if the laws are equal."""
    tokens = set(law) | set(other)
    return sum((abs(law.get(each, Fraction(0)) - other.get(each, Fraction(0))) for each in tokens), Fraction(0)) / 2
