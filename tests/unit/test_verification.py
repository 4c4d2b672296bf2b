"""The equality rule, exhaustively, rules that must not pass for it, and which trees may be verified.

Every tree of two levels over up to three tokens (smaller vocabularies are among them), every target sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest

from slipstream.drafting.tree import NO_DRAFT, ROOT, DraftTree, chain_tree, checked, depths
from slipstream.verification import Verification, verify

Rule = Callable[[DraftTree, Sequence[int]], Verification]
VOCABULARY = range(3)


def subsets() -> list[tuple[int, ...]]:
    return [some for size in range(4) for some in itertools.combinations(VOCABULARY, size)]


def trees() -> Iterator[DraftTree]:
    """Every tree of two levels without duplicate siblings, the nodes of a level in every parent's order."""
    for firsts in subsets():
        for seconds in itertools.product(subsets(), repeat=len(firsts)):
            tokens, parents = list(firsts), [ROOT] * len(firsts)
            for parent, children in enumerate(seconds):
                tokens.extend(children)
                parents.extend([parent] * len(children))
            yield DraftTree(token_ids=tuple(tokens), parents=tuple(parents), drafter="test", version=1)


def path_to(tree: DraftTree, node: int) -> tuple[int, ...]:
    path: tuple[int, ...] = ()
    while node != ROOT:
        path, node = (tree.token_ids[node], *path), tree.parents[node]
    return path


def violations(rule: Rule) -> int:
    """How many (tree, target) pairs break the rule's promise: the longest prefix of the target that the tree allows."""
    broken = 0
    for tree in trees():
        known = {path_to(tree, node) for node in range(len(tree.token_ids))} | {()}
        for target in itertools.product(VOCABULARY, repeat=3):
            # The target's choice at a node is what follows there if the path agrees with the target so far.
            chosen = [target[0]]
            for node in range(len(tree.token_ids)):
                path = path_to(tree, node)
                chosen.append(target[len(path)] if path == target[: len(path)] else (target[0] + 1) % 3)
            depth = max(length for length in range(3) if target[:length] in known)
            broken += rule(tree, chosen).token_ids != target[: depth + 1]
    return broken


def accepts_any_child(tree: DraftTree, chosen: Sequence[int]) -> Verification:
    """Mutant: takes the first child whatever it is."""
    path, tokens, node = [], [], ROOT
    while (child := next((x for x, parent in enumerate(tree.parents) if parent == node), None)) is not None:
        path.append(child)
        tokens.append(tree.token_ids[child])
        node = child
    return Verification(path=tuple(path), token_ids=(*tokens, chosen[node + 1]))


def forgets_the_parent(tree: DraftTree, chosen: Sequence[int]) -> Verification:
    """Mutant: looks for the chosen token among all nodes, not among the children."""
    path, tokens, node = [], [chosen[0]], ROOT
    while True:
        node = next((x for x in range(node + 1, len(tree.token_ids)) if tree.token_ids[x] == tokens[-1]), ROOT)
        if node == ROOT:
            return Verification(path=tuple(path), token_ids=tuple(tokens))
        path.append(node)
        tokens.append(chosen[node + 1])


def bonus_from_the_wrong_row(tree: DraftTree, chosen: Sequence[int]) -> Verification:
    """Mutant: reads the choice at the node's own index instead of the one after it."""
    right = verify(tree, chosen)
    shifted = [chosen[node] for node in right.path]
    return Verification(path=right.path, token_ids=(right.token_ids[0], *shifted))


def test_the_output_is_the_targets_prefix_for_every_tree_and_target() -> None:
    assert violations(verify) == 0


@pytest.mark.parametrize("mutant", [accepts_any_child, forgets_the_parent, bonus_from_the_wrong_row])
def test_a_mutant_is_caught(mutant: Rule) -> None:
    assert violations(mutant) > 0


def test_a_chain_is_accepted_up_to_its_first_miss() -> None:
    verdict = verify(chain_tree([4, 5, 6], drafter="chain", version=1), [4, 5, 9, 7])
    assert verdict == Verification(path=(0, 1), token_ids=(4, 5, 9))


def test_of_equal_siblings_the_last_counts() -> None:
    twins = DraftTree(token_ids=(4, 4, 5), parents=(ROOT, ROOT, 1), drafter="test", version=1)
    assert verify(twins, [4, 5, 5, 6]) == Verification(path=(1, 2), token_ids=(4, 5, 6))


def test_depths_count_the_nodes_of_a_path() -> None:
    tree = DraftTree(token_ids=(1, 2, 3, 1, 2), parents=(ROOT, 0, ROOT, 1, 2), drafter="test", version=1)
    assert depths(tree) == [1, 2, 1, 3, 2]
    assert depths(NO_DRAFT) == []


def test_every_tree_of_the_exhaustive_test_may_be_verified() -> None:
    assert all(checked(tree, vocab_size=3) is tree for tree in trees())


@pytest.mark.parametrize(
    ("token_ids", "parents", "message"),
    [
        ((1, 2), (ROOT,), "2 tokens and 1 parents"),
        ((1, 2), (1, ROOT), "node 0 has parent 1"),
        ((1,), (0,), "node 0 has parent 0"),
        ((1,), (-2,), "node 0 has parent -2"),
        ((1, 3), (ROOT, 0), "node 1 has token 3"),
        ((-1,), (ROOT,), "node 0 has token -1"),
        ((1, 2, 1), (ROOT, ROOT, ROOT), "node 2 repeats token 1 under parent -1"),
    ],
)
def test_what_is_no_tree_is_refused(token_ids: tuple[int, ...], parents: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(DraftTree(token_ids=token_ids, parents=parents, drafter="test", version=1), vocab_size=3)
