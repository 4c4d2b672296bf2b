"""Chain drafting: a small causal LM proposes the next few tokens, one after another, with the request's own noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slipstream.drafting.drafter import DraftContext
from slipstream.drafting.survival import Float64, survival_in_chain
from slipstream.drafting.tree import NO_DRAFT, DraftTree, chain_tree
from slipstream.engine.blocks import blocks_for
from slipstream.engine.decoders import open_decoder
from slipstream.engine.native_decoder import NativeDecoder
from slipstream.engine.plan import NO_NODE, Int32, StepPlan
from slipstream.engine.sampling import row_of, shared_row
from slipstream.models.checkpoint import Checkpoint
from slipstream_kernels.chain import AskedChains, ChainWorth, draft_chains
from slipstream_kernels.merging import Chains
from slipstream_kernels.sampling import NUM_CHOICES, best_choices, choose, sample_rows, stop_tokens

_WINDOWS_SHARED = 4
"""Requests that draft together read so many windows of text, or one each."""


class ChainDrafter:
    """Proposes chains from one draft version; keeps a K/V cache in step with what the target commits.

    Each slot owns a fixed run of blocks. Candidates are computed in place, as what they are if they are accepted: from
    the first one on that did not come, they are overwritten by the tokens that stand there instead. A new drafter knows
    nothing of running requests: it catches up with their tokens, at most `max_catch_up_tokens` a call, and proposes
    nothing for a request until it has. With a `window` it reads no more than so many tokens of a text it has fallen
    behind with by more (a few times as many where few requests draft), and begins anew with these. `was_level` says
    whether the last draft had nothing to catch up with but what the last pass accepted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        version: int,
        num_slots: int,
        max_context_tokens: int,
        max_catch_up_tokens: int,
        device: str = "cpu",
        window: int | None = None,
        packs_int8: bool = False,
    ) -> None:
        self.version = version
        self.digest = checkpoint.digest
        self._max_positions = min(max_context_tokens, checkpoint.config.max_position_embeddings)
        self._max_catch_up_tokens = max_catch_up_tokens
        self._window = window
        # The cache of a slot holds tokens [base, num_cached) of its text, at positions from 0 on.
        self._bases = [0] * num_slots
        self._num_cached = [0] * num_slots
        # What was drafted last, and how long its text was then: these tokens are cached, and need not be what came.
        self._drafted: list[tuple[int, list[int]]] = [(0, [])] * num_slots
        self.was_level = False
        blocks_per_slot = blocks_for(self._max_positions)
        num_blocks = num_slots * blocks_per_slot
        self._block_tables_BC = np.arange(num_blocks, dtype=np.int32).reshape(num_slots, blocks_per_slot)
        self._decoder = open_decoder(
            checkpoint,
            num_blocks=num_blocks,
            num_node_slots=0,
            max_rows=max(max_catch_up_tokens, num_slots),
            device=device,
            packs_int8=packs_int8,
        )

    def release(self, slot: int) -> None:
        """Forget what the slot held."""
        self._num_cached[slot] = self._bases[slot] = 0
        self._drafted[slot] = 0, []

    def warm(self) -> None:
        """Run once, so that the first real step pays no first-call cost."""
        self._decoder.forward(self._plan([0], [0], [0], wanted=[0]))

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        """One chain per context, in order, as long as it may be; NO_DRAFT where none is possible yet."""
        max_tokens = max((one.max_nodes for one in contexts), default=0)
        token_ids_BSR, _, lengths_B = self.draft(contexts, max_tokens=max_tokens)
        return [
            chain_tree(ids[:length], drafter="chain", version=self.version) if length else NO_DRAFT
            for ids, length in zip(token_ids_BSR[:, :, 0].tolist(), lengths_B.tolist(), strict=True)
        ]

    def draft(self, contexts: Sequence[DraftContext], *, max_tokens: int, worth: ChainWorth | None = None) -> Chains:
        """A chain per context, in order, of length 0 where none is possible yet.

        If it is asked whether going on is `worth` it, a chain ends where it is not, and with a token that ends its
        request's output, and it is drawn with the filters of its request. The gate replays chains of fixed length
        (0002), which know of neither.
        """
        window = self._window_of_each(len(contexts))
        for context in contexts:
            self._keep_what_came(context)
            if window:
                self._begin_anew_if_far_behind(context, window=window, max_tokens=max_tokens)
        limits = [
            min(
                one.max_depth,
                one.max_nodes,
                max_tokens,
                self._max_positions - len(one.token_ids) + self._bases[one.slot],
            )
            for one in contexts
        ]
        level, plan = self._catch_up(contexts, limits)
        self.was_level = len(level) == len(contexts) and len(plan.ids_T) <= (max_tokens + 1) * len(contexts)
        if not level:
            if len(plan.ids_T):
                self._decoder.forward(plan)
            return no_chains(len(contexts))
        chains = self._draft_level(
            [contexts[index] for index in level], [limits[index] for index in level], plan, worth
        )
        ids_BS = chains.token_ids_BSR[:, :, 0].tolist()
        for index, ids, length in zip(level, ids_BS, chains.lengths_B.tolist(), strict=True):
            # The last token drafted is not computed.
            self._drafted[contexts[index].slot] = len(contexts[index].token_ids), ids[: length - 1]
        return put_together([(level, chains)], len(contexts))

    def _keep_what_came(self, context: DraftContext) -> None:
        """Of what was drafted last, what became text stays cached; never a text's last token: its logits are wanted."""
        slot, token_ids = context.slot, context.token_ids
        first, drafted = self._drafted[slot]
        if drafted:
            came = token_ids[first : first + len(drafted)]
            is_right = [*(token == guess for token, guess in zip(came, drafted, strict=False)), False]
            self._num_cached[slot] = first + is_right.index(False)
            self._drafted[slot] = 0, []
        self._num_cached[slot] = min(self._num_cached[slot], len(token_ids) - 1)

    def _window_of_each(self, num_contexts: int) -> int:
        """The more requests share a step, the less one of them gains by a text that is read whole; 0: no window."""
        if self._window is None or not num_contexts:
            return 0
        at_once = min(_WINDOWS_SHARED * self._window, self._max_catch_up_tokens)
        return max(self._window, min(at_once // num_contexts, self._max_positions // 2))

    def _begin_anew_if_far_behind(self, context: DraftContext, *, window: int, max_tokens: int) -> None:
        slot, num_tokens = context.slot, len(context.token_ids)
        is_full = num_tokens - self._bases[slot] + max_tokens > self._max_positions
        if is_full or num_tokens - self._num_cached[slot] > window:
            self._bases[slot] = self._num_cached[slot] = max(num_tokens - window, 0)

    def _catch_up(self, contexts: Sequence[DraftContext], limits: Sequence[int]) -> tuple[list[int], StepPlan]:
        """Which contexts are level after the pass that computes tokens not yet in the cache, and that pass."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        level: list[int] = []
        wanted: list[int] = []
        for index, (context, limit) in enumerate(zip(contexts, limits, strict=True)):
            start, base = self._num_cached[context.slot], self._bases[context.slot]
            end = min(len(context.token_ids), start + self._max_catch_up_tokens - len(ids))
            if limit < 1 or end <= start:
                continue
            ids += context.token_ids[start:end]
            positions += range(start - base, end - base)
            slots += [context.slot] * (end - start)
            self._num_cached[context.slot] = end
            if end == len(context.token_ids):
                level.append(index)
                wanted.append(len(ids) - 1)
        return level, self._plan(ids, positions, slots, wanted=wanted)

    def _draft_level(
        self, contexts: Sequence[DraftContext], limits: Sequence[int], first: StepPlan, worth: ChainWorth | None
    ) -> Chains:
        positions = [len(one.token_ids) for one in contexts]
        draws_B = sample_rows([_draw(one, worth) for one in contexts], positions)
        slots = [one.slot for one in contexts]
        limits_B = np.array(limits, np.int32)
        if isinstance(self._decoder, NativeDecoder):
            return draft_chains(
                self._decoder.kernel,
                first,
                AskedChains(
                    np.array(slots, np.int32),
                    limits_B,
                    np.array([self._bases[slot] for slot in slots], np.int32),
                    draws_B,
                    stop_tokens(tuple(_ends(one, worth) for one in contexts)),
                ),
                worth=worth,
            )
        return self._draft_by_steps(contexts, limits_B, first, worth)

    def _draft_by_steps(
        self, contexts: Sequence[DraftContext], limits_B: Int32, plan: StepPlan, worth: ChainWorth | None
    ) -> Chains:
        """What `draft_chains` does, with a read of the device for every token."""
        chains = no_chains(len(contexts), width=int(limits_B.max()))
        paths_B = np.ones(len(contexts))
        growing = list(range(len(contexts)))
        while growing:
            lengths = chains.lengths_B[growing]
            positions = [len(contexts[index].token_ids) + int(chains.lengths_B[index]) for index in growing]
            logits_BV = self._decoder.forward(plan).logits_XV
            draws = [_draw(contexts[index], worth) for index in growing]
            rows = sample_rows(draws, positions)
            if worth is None:
                chains.token_ids_BSR[growing, lengths, 0] = choose(logits_BV, rows).cpu().numpy()
            else:
                choices = best_choices(logits_BV, rows)
                chains.token_ids_BSR[growing, lengths], chains.scores_BSR[growing, lengths] = choices
            chains.lengths_B[growing] += 1
            growing = [
                one
                for one in growing
                if chains.lengths_B[one] < limits_B[one] and _newest(chains, one) not in _ends(contexts[one], worth)
            ]
            if worth is not None:
                growing = _worth_going_on(contexts, chains, paths_B, growing, worth)
            if growing:
                places = [
                    len(contexts[one].token_ids) - self._bases[contexts[one].slot] + int(chains.lengths_B[one]) - 1
                    for one in growing
                ]
                newest = [_newest(chains, one) for one in growing]
                plan = self._plan(newest, places, [contexts[one].slot for one in growing], wanted=range(len(growing)))
        return chains

    def _plan(
        self, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int], *, wanted: Sequence[int]
    ) -> StepPlan:
        position_T = np.array(positions, dtype=np.int32)
        return StepPlan(
            np.array(ids, dtype=np.int32),
            position_T,
            np.array(slots, dtype=np.int32),
            self._block_tables_BC,
            position_T + np.int32(1),
            np.full(len(ids), NO_NODE, dtype=np.int32),
            np.zeros(len(ids) + 1, dtype=np.int32),
            _NO_ANCESTORS,
            np.array(wanted, dtype=np.int32),
        )


def no_chains(number: int, *, width: int = 1) -> Chains:
    """So many chains of length 0, with room for `width` tokens each."""
    shape = number, width, NUM_CHOICES
    return Chains(np.full(shape, -1, np.int32), np.zeros(shape), np.zeros(number, np.int32))


def put_together(parts: Sequence[tuple[Sequence[int], Chains]], number: int) -> Chains:
    """So many chains from those of some, each part with its ascending rows; of length 0 where no part has a row."""
    if len(parts) == 1 and len(parts[0][0]) == number:
        return parts[0][1]
    together = no_chains(number, width=max((chains.token_ids_BSR.shape[1] for _, chains in parts), default=1))
    for rows, chains in parts:
        width = chains.token_ids_BSR.shape[1]
        together.token_ids_BSR[rows, :width] = chains.token_ids_BSR
        together.scores_BSR[rows, :width] = chains.scores_BSR
        together.lengths_B[rows] = chains.lengths_B
    return together


def _newest(chains: Chains, row: int) -> int:
    return int(chains.token_ids_BSR[row, chains.lengths_B[row] - 1, 0])


def _draw(context: DraftContext, worth: ChainWorth | None) -> bytes:
    """How a context's tokens are drawn: as the target's own are, but chains of fixed length without its filters."""
    return row_of(context.sampling) if worth is not None else shared_row(context.sampling)


def _ends(context: DraftContext, worth: ChainWorth | None) -> tuple[int, ...]:
    """The tokens that end a chain: chains of fixed length go on, as the gate's replay of them does."""
    return context.sampling.stop_token_ids if worth is not None else ()


def _worth_going_on(
    contexts: Sequence[DraftContext], chains: Chains, paths_B: Float64, growing: Sequence[int], worth: ChainWorth
) -> list[int]:
    """Which of the growing chains have another token; `paths_B` takes in their newest ones.

    The next token survives its forerunners as they survived theirs, on average.
    """
    next_paths = {}
    for one in growing:
        depth = int(chains.lengths_B[one])
        estimates_SL = worth.sampled if contexts[one].sampling.temperature else worth.greedy
        score = float(chains.scores_BSR[one, depth - 1, 0])
        paths_B[one] *= survival_in_chain(estimates_SL, depth=depth, score=score)
        next_paths[one] = float(paths_B[one]) * float(paths_B[one]) ** (1.0 / depth)
    left = [one for one in growing if next_paths[one] >= worth.min_survival]
    promised = sum(next_paths[one] - worth.min_survival for one in left)
    return left if promised >= worth.pass_tokens else []


_NO_ANCESTORS: Int32 = np.zeros(0, dtype=np.int32)
