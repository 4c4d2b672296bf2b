"""A running sequence: what the engine knows of one request between steps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from slipstream.drafting.tree import DraftTree
from slipstream.engine.request import FinishReason, Request, TokenBlock
from slipstream.records import Round

OnBlock = Callable[[TokenBlock], None]


class RunningSequence:
    """One request in the batch.

    `token_ids` is the prompt and all committed output. `num_computed` of them have keys and values in the target's
    cache; the last token of a decoding sequence never has. What observing needs is kept per output token, and only if
    the request may be learned from.
    """

    def __init__(self, request: Request, on_block: OnBlock, slot: int) -> None:
        self.request = request
        self.on_block = on_block
        self.slot = slot
        self.token_ids = list(request.prompt_ids)
        self.num_computed = 0
        self.rounds: list[Round] = []
        self.logprob_rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.expert_rows: list[Tensor] = []

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.sampling.max_tokens - self.num_output

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token awaits its keys and values."""
        return self.num_computed == len(self.token_ids) - 1

    def commit(self, token_ids: tuple[int, ...], tree: DraftTree) -> tuple[int, ...]:
        """Append a verified block, cut at `max_tokens` and after a stop token; returns what was appended."""
        stops = self.request.sampling.stop_token_ids
        kept = token_ids[: self.num_left]
        end = next((index + 1 for index, token in enumerate(kept) if token in stops), len(kept))
        kept = kept[:end]
        self.rounds.append(
            Round(
                start=self.num_output,
                draft_version=tree.version,
                proposed=tree.token_ids,
                num_accepted=min(len(kept), len(token_ids) - 1),
            )
        )
        # All but the block's last token were computed in this pass; rejected positions are overwritten later.
        self.num_computed = len(self.token_ids) + len(kept) - 1
        self.token_ids.extend(kept)
        return kept

    @property
    def is_finished(self) -> bool:
        """Whether the last committed token ended the request."""
        return self.num_output > 0 and (self.num_left <= 0 or self._stopped)

    @property
    def finish_reason(self) -> FinishReason:
        """`stop` or `length`, once finished."""
        return "stop" if self._stopped else "length"

    @property
    def _stopped(self) -> bool:
        return self.token_ids[-1] in self.request.sampling.stop_token_ids
