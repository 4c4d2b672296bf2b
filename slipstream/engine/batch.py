"""A running sequence: what the engine knows of one request between steps."""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.drafting.tree import DraftTree
from slipstream.engine.plan import ExpertIds, on_host
from slipstream.engine.request import FinishReason, Request, TokenBlock
from slipstream.engine.stops import StopStrings
from slipstream.records import Round
from slipstream_kernels.logprobs import HostLogprobs, TopLogprobs, host_logprobs

OnBlock = Callable[[TokenBlock], None]

NO_SLOT = -1
"""The slot of a sequence that waits."""


class ObservedRows(msgspec.Struct, frozen=True):
    """What the target said at T positions, N log-probabilities kept of each; arrays on the host."""

    logprobs_T: NDArray[np.float32]
    top_ids_TN: NDArray[np.int32]
    top_logprobs_TN: NDArray[np.float32]
    expert_ids_TLK: NDArray[np.integer] | None


class ObservedStep:
    """What the target said at the T observed positions of one step; it stays on its device until `rows` is asked for.

    So a step on a GPU does not wait for what only the observer needs, at the end of a request.
    """

    def __init__(self, said: TopLogprobs | HostLogprobs, expert_ids_TLK: ExpertIds | None) -> None:
        self._said = said
        self._expert_ids_TLK = expert_ids_TLK

    @functools.cached_property
    def rows(self) -> ObservedRows:
        """The rows of all requests, in the order of the step."""
        experts = self._expert_ids_TLK
        return ObservedRows(*host_logprobs(self._said), None if experts is None else on_host(experts))


class RunningSequence:
    """One request in the batch, or back in the queue after it was preempted.

    `token_ids` is the prompt and all committed output. The keys and values of the first `num_computed` of them lie in
    `blocks`, in order, of which the first `num_published` are full and known to the prefix index; the last token of a
    decoding sequence is never computed yet. What observing needs is kept per block of output, and only if the request
    may be learned from. `num_step_tokens` of its tokens are computed in this step, `max_depth` tokens may be drafted.
    """

    def __init__(self, request: Request, on_block: OnBlock, stop_strings: StopStrings | None = None) -> None:
        self.request = request
        self.on_block = on_block
        self.slot = NO_SLOT
        self.token_ids = list(request.prompt_ids)
        self.num_prompt = len(request.prompt_ids)
        self.num_computed = 0
        self.blocks: list[int] = []
        self.num_published = 0
        self.num_step_tokens = 0
        self.max_depth = 0
        self.rounds: list[Round] = []
        self.observed: list[tuple[ObservedStep, slice]] = []
        self.finish_reason: FinishReason | None = None
        self._stop_strings = stop_strings

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.sampling.max_tokens - self.num_output

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token awaits its keys and values."""
        return self.num_computed == len(self.token_ids) - 1

    @property
    def is_choosing(self) -> bool:
        """Whether this step computes the last token, so that the next one can be chosen."""
        return self.num_computed + self.num_step_tokens == len(self.token_ids)

    @property
    def may_draft(self) -> bool:
        """Whether tokens may be drafted: not in the pass that ends the prompt, which `learning.shadow` relies on."""
        return self.request.speculate and self.num_output > 0 and self.is_decoding

    def commit(self, token_ids: tuple[int, ...], tree: DraftTree) -> tuple[int, ...]:
        """Append a verified block, cut where the request ends; returns what was appended.

        A request ends with its last allowed token, a stop token, or the token that completes a stop string;
        `finish_reason` says so.
        """
        kept = self._cut(token_ids)
        self.rounds.append(
            Round(
                start=self.num_output,
                draft_version=tree.version,
                proposed=tree.token_ids,
                num_accepted=min(len(kept), len(token_ids) - 1),
            )
        )
        # The block's last token has no keys and values yet, all before it have.
        self.num_computed = len(self.token_ids) + len(kept) - 1
        self.token_ids.extend(kept)
        return kept

    def _cut(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        stops, num_left = self.request.sampling.stop_token_ids, self.num_left
        for index, token in enumerate(token_ids, start=1):
            if token in stops or (self._stop_strings is not None and self._stop_strings.completed_by(token)):
                self.finish_reason = "stop"
            elif index == num_left:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                return token_ids[:index]
        return token_ids
