"""One request in one pass of the target: what was chosen at its rows of logits, and what the target said there.

Trees that carry the probabilities they were drawn with may be verified by a rejection rule (`slipstream.verification`).
All others, and requests at temperature 0, are verified by equality whatever the rule: it keeps the target's
distribution for any tree, and its noise is no rejection rule's.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.drafting.drafter import LearnedRequest, Lesson, StepLoad
from slipstream.drafting.tree import DraftTree, part_of
from slipstream.engine.batch import ObservedStep, RunningSequence
from slipstream.engine.packing import moves_of
from slipstream.engine.plan import ExpertIds, Move, StepOutput, StepPlan
from slipstream.engine.request import TokenLogprobs
from slipstream.engine.sampling import RowsOfRequest, choose_tokens, target_probs
from slipstream.verification import KeyedChance, ScoredTree, VerificationRule, equality, sound_nodes, verify
from slipstream_kernels.logprobs import top_logprobs


class Pass(msgspec.Struct, kw_only=True):
    """A request whose next tokens are decided in this step.

    Row `first_row` of the step's logits is that of its last committed token, the tree's nodes follow; their node slots
    begin at `first_node_slot`. `path` are the accepted nodes and `token_ids` their tokens and the bonus; `kept_ids` is
    what of them was committed. `said` is where to read what the target said, None where nobody asked. `is_sound` False:
    part of the tree was drawn from no distribution, and was left out.
    """

    sequence: RunningSequence
    tree: DraftTree
    first_row: int
    first_node_slot: int
    path: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    kept_ids: tuple[int, ...] = ()
    said: tuple[ObservedStep, slice] | None = None
    is_sound: bool = True


def load_of(sequences: Sequence[RunningSequence]) -> StepLoad:
    """The step of these sequences before anything is drafted for it."""
    num_rows = sum(one.num_step_tokens for one in sequences)
    num_positions = sum(one.num_step_tokens * (one.num_computed + one.num_step_tokens / 2) for one in sequences)
    return StepLoad(num_rows, sum(one.is_choosing for one in sequences), num_positions / num_rows)


def lesson_of(passes: Sequence[Pass], plan: StepPlan, output: StepOutput, pass_s: float) -> Lesson:
    """What a step of `pass_s` seconds teaches, after it was committed."""
    return Lesson(
        row_ids_X=plan.ids_T[plan.logit_rows_X],
        logits_XV=output.logits_XV,
        requests=[_learned(one) for one in passes],
        num_rows=len(plan.ids_T),
        seconds=pass_s,
        expert_ids_TLK=output.expert_ids_TLK,
    )


def _learned(one: Pass) -> LearnedRequest:
    sequence = one.sequence
    output_ids = None if sequence.finish_reason is None else sequence.token_ids[sequence.num_prompt :]
    return LearnedRequest(
        slot=sequence.slot,
        tenant=sequence.request.tenant,
        may_train=sequence.request.may_train,
        num_rows=1 + len(one.tree.token_ids),
        num_tokens=len(sequence.token_ids),
        output_ids=output_ids,
    )


def passes_of(sequences: Sequence[RunningSequence], trees: Sequence[DraftTree]) -> list[Pass]:
    """The choosing ones of a step's sequences, with the places that `packing.pack` gave them."""
    passes: list[Pass] = []
    num_nodes = 0
    for sequence, tree in zip(sequences, trees, strict=True):
        if sequence.is_choosing:
            first_row = len(passes) + num_nodes
            passes.append(Pass(sequence=sequence, tree=tree, first_row=first_row, first_node_slot=num_nodes))
            num_nodes += len(tree.token_ids)
    return passes


def choose_and_verify(passes: Sequence[Pass], output: StepOutput, *, rule: VerificationRule = equality) -> None:
    """Set `path` and `token_ids`: how far each tree is accepted, and the target's token behind that."""
    drawn = [] if rule is equality else [one for one in passes if _is_drawn(one)]
    if not drawn:
        _verify_by_equality(passes, output.logits_XV)
        return
    others = [one for one in passes if not _is_drawn(one)]
    _verify_by_equality(others, _logits_of(others, output))
    probs_XV = target_probs(_logits_of(drawn, output), [_rows_of(one) for one in drawn])
    for one, own_XV in zip(drawn, probs_XV.split([1 + len(one.tree.token_ids) for one in drawn]), strict=True):
        _verify_by(rule, one, own_XV)


def _is_drawn(one: Pass) -> bool:
    return one.tree.draft_probs_PV is not None and one.sequence.request.sampling.temperature > 0


def _verify_by_equality(passes: Sequence[Pass], logits_XV: Tensor) -> None:
    for one, chosen in zip(passes, choose_tokens(logits_XV, [_rows_of(one) for one in passes]), strict=True):
        verification = verify(one.tree, chosen)
        one.path, one.token_ids = verification.path, verification.token_ids


def _verify_by(rule: VerificationRule, one: Pass, probs_XV: Tensor) -> None:
    """By a rejection rule, over what of the tree was drawn from distributions; its draws are keyed by the pass."""
    sequence, sampling, tree = one.sequence, one.sequence.request.sampling, one.tree
    nodes = sound_nodes(tree, vocab_size=probs_XV.shape[1])
    one.is_sound = len(nodes) == len(tree.token_ids)
    if not one.is_sound:
        tree, probs_XV = part_of(tree, nodes), probs_XV[[0, *(node + 1 for node in nodes)]]
    draft_probs_PV = tree.draft_probs_PV if nodes and tree.draft_probs_PV is not None else probs_XV[:0]
    chance = KeyedChance(
        seed=sampling.seed,
        first_position=len(sequence.token_ids),
        sample_index=sampling.sample_index,
        redraw=len(sequence.rounds),
    )
    verification = rule(ScoredTree(tree=tree, target_probs_XV=probs_XV, draft_probs_PV=draft_probs_PV), chance)
    one.path, one.token_ids = tuple(nodes[node] for node in verification.path), verification.token_ids


def _rows_of(one: Pass) -> RowsOfRequest:
    return RowsOfRequest(one.sequence.request.sampling, one.sequence.token_ids, one.sequence.num_prompt, one.tree)


def _logits_of(passes: Sequence[Pass], output: StepOutput) -> Tensor:
    """The rows of these passes, one after another; a copy."""
    rows = [row for one in passes for row in range(one.first_row, one.first_row + 1 + len(one.tree.token_ids))]
    return output.logits_XV[rows]


def accepted_moves(passes: Sequence[Pass]) -> list[Move]:
    """Where the accepted nodes of all passes go; to be taken before anything is committed."""
    return [
        move
        for one in passes
        if one.path
        for move in moves_of(one.sequence, one.path, first_node_slot=one.first_node_slot)
    ]


def note_what_was_said(passes: Sequence[Pass], plan: StepPlan, output: StepOutput, *, top_n: int) -> None:
    """Set `said` for the committed tokens of requests that may be learned from or asked for log-probabilities.

    `top_n` log-probabilities of each are kept, more if a request asked for more.
    """
    asked = [one for one in passes if one.sequence.request.may_train or one.sequence.request.num_logprobs is not None]
    if not asked:
        return
    rows = [row for one in asked for row in _rows(one)]
    token_ids = [token for one in asked for token in one.kept_ids]
    num_top = max(top_n, *(one.sequence.request.num_logprobs or 0 for one in asked))
    said = top_logprobs(output.logits_XV, rows, token_ids, num_top=num_top)
    step = ObservedStep(said, _experts_of(output, plan.logit_rows_X[rows]))
    first = 0
    for one in asked:
        one.said = (step, slice(first, first + len(one.kept_ids)))
        first += len(one.kept_ids)


def _experts_of(output: StepOutput, rows: NDArray[np.int32]) -> ExpertIds | None:
    """A copy of what some rows chose: the next pass overwrites what this one gave out."""
    experts_TLK = output.expert_ids_TLK
    if isinstance(experts_TLK, Tensor):
        return experts_TLK[torch.from_numpy(rows).to(experts_TLK.device)]
    return None if experts_TLK is None else experts_TLK[rows]


def token_logprobs(step: ObservedStep, part: slice, *, num_top: int) -> tuple[TokenLogprobs, ...]:
    """An entry per token of one request, with its `num_top` most likely alternatives."""
    rows = step.rows
    columns = zip(
        rows.logprobs_T[part].tolist(),
        rows.top_ids_TN[part].tolist(),
        rows.top_logprobs_TN[part].tolist(),
        strict=True,
    )
    return tuple(
        TokenLogprobs(logprob=logprob, top=tuple(zip(ids[:num_top], logprobs[:num_top], strict=True)))
        for logprob, ids, logprobs in columns
    )


def _rows(one: Pass) -> list[int]:
    """The rows of logits that the committed tokens were chosen at."""
    return [one.first_row, *(one.first_row + 1 + node for node in one.path)][: len(one.kept_ids)]
