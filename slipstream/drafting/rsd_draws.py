"""The draws of Recursive Speculative Decoding: siblings, or whole sequences, without replacement.

Jeon et al., arXiv 2402.14160. Constant branching draws siblings by Gumbel-Top-k: the k largest of log q + Gumbel noise,
largest first, are a draw without replacement in that order. Stochastic beam search (Kool et al., arXiv 1903.06059) does
the same over sequences, level by level: a beam passes its perturbed score on as the largest of its continuations'.

Scores and log-probabilities are float64. A dead beam or a candidate that could not be drawn has the score -inf. Without
noise (temperature 0) the same two grow the likeliest siblings, and the likeliest sequences: plain beam search.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.drafting.tree import ROOT
from slipstream.engine.sampling import Draw
from slipstream.verification.chance import Purpose, stream
from slipstream_kernels.sampling import row_bytes


class Siblings(NamedTuple):
    """Candidates behind each of X nodes in the order of the draws: `token_ids_XW` int64, `scores_XW` float64."""

    token_ids_XW: Tensor
    scores_XW: Tensor


class BeamLevel(NamedTuple):
    """The next level of each request's tree: the W best continuations of its beams, best first, or all siblings.

    `parents_BW` int64 says which beam or node each continues, `token_ids_BW` int64 with which token; `path_logprobs_BW`
    and `scores_BW` float64 are what the next level needs.
    """

    parents_BW: Tensor
    token_ids_BW: Tensor
    path_logprobs_BW: Tensor
    scores_BW: Tensor


def independent_row(draw: Draw, *, redraw: int, parent: int = ROOT) -> bytes:
    """The sample row whose noise draws the children of `parent` for a rejection rule.

    It is apart from the noise of the target, of other nodes and of other passes; `redraw` counts the passes before.
    `slipstream_kernels.sampling.sample_rows` sets the position, `slipstream.verification.chance.noise_of` makes noise.
    """
    key = stream(Purpose.DRAFT, redraw=redraw, lane=parent + 1)
    return row_bytes(seed=draw.seed, temperature=draw.temperature, sample_index=draw.sample_index, redraw=key)


def gumbel_top_k(logprobs_XV: Tensor, noise_XV: Tensor, *, num_draws: int) -> Siblings:
    """Draw `num_draws` different tokens behind each node, W = min(num_draws, V)."""
    scores_XW, token_ids_XW = (logprobs_XV + noise_XV).topk(min(num_draws, logprobs_XV.shape[-1]), dim=-1)
    return Siblings(token_ids_XW, scores_XW)


def first_beams(num_requests: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Path log-probabilities and scores [B, 1] of the roots."""
    root_B1 = torch.zeros(num_requests, 1, dtype=torch.float64, device=device)
    return root_B1, root_B1.clone()


def next_siblings(path_logprobs_BW: Tensor, *, logprobs_BWV: Tensor, noise_BWV: Tensor, num_draws: int) -> BeamLevel:
    """One level of constant branching: `num_draws` different tokens behind each node, in the order of their draws.

    `logprobs_BWV` is what the draft gives behind each node, -inf throughout behind a dead one.
    """
    drawn = gumbel_top_k(logprobs_BWV, noise_BWV, num_draws=num_draws)
    num_requests, num_nodes, num_siblings = drawn.token_ids_XW.shape
    parents_W = torch.arange(num_nodes, device=logprobs_BWV.device).repeat_interleave(num_siblings)
    path_BWK = path_logprobs_BW.unsqueeze(-1) + logprobs_BWV.gather(-1, drawn.token_ids_XW)
    tokens_BW, scores_BW = drawn.token_ids_XW.flatten(1), drawn.scores_XW.flatten(1)
    return BeamLevel(parents_W.expand(num_requests, -1), tokens_BW, path_BWK.flatten(1), scores_BW)


def next_beams(
    path_logprobs_BW: Tensor,
    scores_BW: Tensor,
    *,
    logprobs_BWV: Tensor,
    noise_BWV: Tensor,
    width: int,
    is_greedy_B: Tensor | None = None,
) -> BeamLevel:
    """One level of stochastic beam search: the `width` best continuations over all beams of each request.

    `logprobs_BWV` is what the draft gives behind each beam, `noise_BWV` Gumbel noise, independent for every beam.
    Continuations of one beam come in the order of their draws. Requests of `is_greedy_B`, whose noise is 0, keep the
    likeliest paths instead.
    """
    path_BWV = path_logprobs_BW.unsqueeze(-1) + logprobs_BWV
    # Conditioning keeps the order within a beam, so only its best can be among the best of all.
    free_BWC, token_ids_BWC = (path_BWV + noise_BWV).topk(min(width, logprobs_BWV.shape[-1]), dim=-1)
    scores_BWC = conditioned(free_BWC, scores_BW.unsqueeze(-1))
    if is_greedy_B is not None:
        scores_BWC = torch.where(is_greedy_B[:, None, None], free_BWC, scores_BWC)
    num_candidates = free_BWC.shape[-1]
    kept_BW, index_BW = scores_BWC.flatten(1).topk(min(width, scores_BWC[0].numel()), dim=-1)
    return BeamLevel(
        index_BW // num_candidates,
        token_ids_BWC.flatten(1).gather(1, index_BW),
        path_BWV.gather(-1, token_ids_BWC).flatten(1).gather(1, index_BW),
        kept_BW,
    )


def conditioned(free_scores_C: Tensor, largest_1: Tensor) -> Tensor:
    """Perturbed scores, largest first, moved so that their largest is `largest_1`: -log(e^-g - e^-Z + e^-score).

    The stable form of Kool et al., appendix B.3, with expm1 for the digits of nearly equal scores; the last dimension
    runs over candidates.
    """
    shift = largest_1 - free_scores_C + torch.log(-torch.expm1(free_scores_C - free_scores_C[..., :1]))
    moved = largest_1 - shift.clamp(min=0) - torch.log1p(torch.exp(-shift.abs()))
    return torch.where(free_scores_C.isneginf() | largest_1.isneginf(), -torch.inf, moved)
