"""Chains of several draft models, put where their requests are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slipstream.drafting.chain import no_chains, put_together
from slipstream_kernels.merging import Chains


def chains_of(*token_ids: Sequence[int], width: int) -> Chains:
    """A chain of each of these tokens, which score a hundredth of themselves; no second choices."""
    chains = no_chains(len(token_ids), width=width)
    for row, ids in enumerate(token_ids):
        chains.token_ids_BSR[row, : len(ids), 0] = ids
        chains.scores_BSR[row, : len(ids), 0] = np.array(ids) / 100
        chains.lengths_B[row] = len(ids)
    return chains


def assert_same(chains: Chains, expected: Chains) -> None:
    for one, other in zip(chains, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
        assert one.flags.c_contiguous


def test_chains_of_two_models_go_where_their_requests_are() -> None:
    math, code = chains_of([1, 2], [3], width=2), chains_of([4, 5, 6], [], width=3)
    expected = chains_of([], [1, 2], [4, 5, 6], [3], [], width=3)
    assert_same(put_together([([1, 3], math), ([2, 4], code)], 5), expected)


def test_chains_of_a_model_that_drafts_for_some_leave_the_others_without() -> None:
    assert_same(put_together([([1], chains_of([7, 8], width=2))], 3), chains_of([], [7, 8], [], width=2))
    assert_same(put_together([], 2), no_chains(2))


def test_chains_of_a_model_that_drafts_for_all_are_theirs() -> None:
    chains = chains_of([1, 2], [3], width=2)
    assert put_together([([0, 1], chains)], 2) is chains
