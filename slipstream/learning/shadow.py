"""How a draft would have done on logged requests: replay under the rule that serves them, no target calls.

Output depends on prompt and seed alone, so whatever draft ran, a logged request's tokens are what any draft is
verified against. One teacher-forced pass gives the draft's candidate at every output position, drawn with the request's
own noise; a candidate is accepted exactly if it equals the logged token. Verification passes follow by renewal: draft
from the first open position, accept the run of matches, add the target's own token, begin again behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import msgspec
import torch
from torch import Tensor

from slipstream import acceptance
from slipstream.acceptance import AcceptanceCounts
from slipstream.engine.sampling import draft_tokens
from slipstream.learning.distillation import kept_probs
from slipstream.models.checkpoint import Checkpoint
from slipstream.models.decoder import causal_logits
from slipstream.promotion import DomainComparison, EvaluationReport
from slipstream.records import Observation, Round, unpack_ids
from slipstream.versions import NO_VERSION, Role


class ReplayScore(msgspec.Struct, frozen=True, kw_only=True):
    """A draft on one observation: simulated verification passes, and `overlap` summed over its positions."""

    request_id: str
    domain: str
    counts: AcceptanceCounts
    num_tokens: int
    overlap_sum: float


class ReplayedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A draft on one request: all its observations together."""

    request_id: str
    domain: str
    acceptance_length: float
    acceptance_rate: float
    overlap: float


@torch.no_grad()
def score(draft: Checkpoint | None, observation: Observation, *, num_draft_tokens: int) -> ReplayScore:
    """Replay a draft (None: plain decoding) against one observation; the draft's context is kept whole.

    Positions beyond the draft's rotary table get no candidate, as in serving.
    """
    emitted_T = torch.from_numpy(unpack_ids(observation.output_ids).copy()).long()
    if draft is None:
        matches, overlap_sum = [False] * len(emitted_T), 0.0
    else:
        logits_TV = _output_logits(draft, observation)
        matches = (_candidates(logits_TV, observation) == emitted_T[: len(logits_TV)]).tolist()
        matches += [False] * (len(emitted_T) - len(matches))
        overlap_sum = _overlap_sum(logits_TV, observation)
    rounds = simulated_rounds(
        matches,
        num_draft_tokens=num_draft_tokens if draft is not None else 0,
        begins_request=observation.chunk == 0,
        ends_by_limit=observation.finish_reason == "length",
    )
    return ReplayScore(
        request_id=observation.request_id,
        domain=observation.domain,
        counts=acceptance.count(rounds),
        num_tokens=len(emitted_T),
        overlap_sum=overlap_sum,
    )


def simulated_rounds(
    matches: Sequence[bool], *, num_draft_tokens: int, begins_request: bool, ends_by_limit: bool
) -> list[Round]:
    """The verification passes that emit `len(matches)` tokens if candidate i is right exactly where `matches[i]`.

    As in the engine, the pass that ends the prompt drafts nothing, and the last token that `max_tokens` allows is
    never drafted (`ends_by_limit`); a stop token may be.
    """
    rounds: list[Round] = []
    start = 0
    while start < len(matches):
        num_left = len(matches) - start
        num_proposed = min(num_draft_tokens, num_left - 1) if ends_by_limit else num_draft_tokens
        if begins_request and start == 0:
            num_proposed = 0
        limit = min(num_proposed, num_left)
        num_accepted = next((i for i in range(limit) if not matches[start + i]), limit)
        rounds.append(Round(start=start, draft_version=0, proposed=(0,) * num_proposed, num_accepted=num_accepted))
        start += num_accepted + 1
    return rounds


def _output_logits(draft: Checkpoint, observation: Observation) -> Tensor:
    """Logits [T, V] that predict each output token, for as many as the draft has positions."""
    prompt, output = unpack_ids(observation.prompt_ids), unpack_ids(observation.output_ids)
    ids = torch.tensor([*prompt.tolist(), *output.tolist()])[:-1][: draft.config.max_position_embeddings]
    return causal_logits(draft.config, draft.weights, ids.unsqueeze(0))[0, len(prompt) - 1 :]


def _candidates(logits_TV: Tensor, observation: Observation) -> Tensor:
    positions = range(observation.first_position, observation.first_position + len(logits_TV))
    return draft_tokens(logits_TV, [observation.sampling] * len(logits_TV), positions)


def _overlap_sum(logits_TV: Tensor, observation: Observation) -> float:
    """Sum over positions and kept tokens of min(target, draft) probability, before temperature and filters."""
    top_ids_TN, top_probs_TN = (kept[: len(logits_TV)] for kept in kept_probs(observation))
    return float(torch.minimum(logits_TV.softmax(-1).gather(1, top_ids_TN), top_probs_TN).sum())


def by_request(scores: Sequence[ReplayScore]) -> dict[str, ReplayedRequest]:
    """Scores of a request's chunks put together, by request id, in order of first appearance."""
    chunks: dict[str, list[ReplayScore]] = {}
    for one in scores:
        chunks.setdefault(one.request_id, []).append(one)
    return {name: _together(parts) for name, parts in chunks.items()}


def _together(parts: Sequence[ReplayScore]) -> ReplayedRequest:
    counts = AcceptanceCounts(
        num_passes=sum(part.counts.num_passes for part in parts),
        num_proposed=sum(part.counts.num_proposed for part in parts),
        num_accepted=sum(part.counts.num_accepted for part in parts),
    )
    return ReplayedRequest(
        request_id=parts[0].request_id,
        domain=parts[0].domain,
        acceptance_length=acceptance.acceptance_length(counts),
        acceptance_rate=acceptance.acceptance_rate(counts),
        overlap=sum(part.overlap_sum for part in parts) / max(1, sum(part.num_tokens for part in parts)),
    )


class ComparedVersions(msgspec.Struct, frozen=True, kw_only=True):
    """Which versions are compared, and how often this challenger was looked at (first is 1)."""

    role: Role = "draft"
    domain: str
    challenger_version: int
    champion_version: int = NO_VERSION
    look: int


def compare(
    challenger: Sequence[ReplayScore],
    champion: Sequence[ReplayScore],
    *,
    of: ComparedVersions,
    num_recent: int,
    at: float,
) -> EvaluationReport:
    """The report on two drafts' scores of the same observations, given in the order in which they arrived.

    `recent` takes the last `num_recent` requests; every domain takes all of its requests. A champion of version 0 was
    scored with draft None.
    """
    ours, theirs = by_request(challenger), by_request(champion)
    if ours.keys() != theirs.keys():
        raise ValueError(f"{len(ours)} and {len(theirs)} requests, expected the same ones; score both on one list")
    differences = {name: ours[name].acceptance_length - theirs[name].acceptance_length for name in ours}
    recent = list(ours)[-num_recent:]
    domains = sorted({one.domain for one in ours.values()})
    return EvaluationReport(
        role=of.role,
        domain=of.domain,
        challenger_version=of.challenger_version,
        champion_version=of.champion_version,
        look=of.look,
        recent=tuple(differences[name] for name in recent),
        domains=tuple(_compare_domain(domain, ours, theirs) for domain in domains),
        challenger_overlap=fmean(ours[name].overlap for name in recent) if recent else 0.0,
        champion_overlap=fmean(theirs[name].overlap for name in recent) if recent else 0.0,
        at=at,
    )


def _compare_domain(
    domain: str, ours: dict[str, ReplayedRequest], theirs: dict[str, ReplayedRequest]
) -> DomainComparison:
    names = [name for name, one in ours.items() if one.domain == domain]
    return DomainComparison(
        domain=domain,
        differences=tuple(ours[name].acceptance_length - theirs[name].acceptance_length for name in names),
        challenger_acceptance_length=fmean(ours[name].acceptance_length for name in names),
        champion_acceptance_length=fmean(theirs[name].acceptance_length for name in names),
        challenger_acceptance_rate=fmean(ours[name].acceptance_rate for name in names),
        champion_acceptance_rate=fmean(theirs[name].acceptance_rate for name in names),
    )
