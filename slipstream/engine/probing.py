"""What steps of a target cost on this machine, measured before it serves."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from slipstream.drafting.step_cost import ExpertUnion, StepCost, distinct_experts, measure
from slipstream.engine.plan import BLOCK_TOKENS, NO_NODE, PagedDecoder, StepPlan
from slipstream.engine.scheduler import EngineLimits

_log = logging.getLogger(__name__)

_ROWS = (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 17, 25, 33, 65, 129)
"""Numbers of rows that are measured; between them lie straight lines. Tiles of products hold up to 6 rows."""

_CONTEXTS = (32, 512)
_REPEATS = 3


class DecoderProbe:
    """Runs passes of a decoder that serves nobody yet: rows of one sequence, as a prefill has them.

    Its cache must hold `num_positions` positions in `num_positions / BLOCK_TOKENS` blocks.
    """

    def __init__(self, decoder: PagedDecoder, *, num_positions: int) -> None:
        self._decoder = decoder
        self._block_tables_BC = np.arange(num_positions // BLOCK_TOKENS, dtype=np.int32).reshape(1, -1)
        self._random = np.random.default_rng(0)

    def __call__(self, num_rows: int, context_tokens: int, *, is_varied: bool) -> float:
        """See `step_cost.StepProbe`."""
        vocab_size = self._decoder.config.vocab_size
        ids = self._random.integers(0, vocab_size, num_rows) if is_varied else np.ones(num_rows)
        positions_T = np.arange(context_tokens, context_tokens + num_rows, dtype=np.int32)
        output = self._decoder.forward(
            StepPlan(
                ids.astype(np.int32),
                positions_T,
                np.zeros(num_rows, dtype=np.int32),
                self._block_tables_BC,
                positions_T + np.int32(1),
                np.full(num_rows, NO_NODE, dtype=np.int32),
                np.zeros(num_rows + 1, dtype=np.int32),
                np.zeros(0, dtype=np.int32),
                np.arange(num_rows, dtype=np.int32),
            )
        )
        if output.logits_XV.is_cuda:
            torch.cuda.synchronize(output.logits_XV.device)
        return distinct_experts(output.expert_ids_TLK) or 0.0


def open_step_cost(decoder: PagedDecoder, limits: EngineLimits) -> StepCost:
    """Measure a decoder whose cache is still unused; takes a second or a few."""
    config = decoder.config
    num_positions = min(limits.num_blocks * BLOCK_TOKENS, config.max_position_embeddings // BLOCK_TOKENS * BLOCK_TOKENS)
    most_rows = min(limits.max_running_requests * (1 + limits.num_draft_tokens), limits.max_step_tokens, num_positions)
    rows = tuple(number for number in _ROWS if number <= most_rows)
    contexts = tuple(number for number in _CONTEXTS if number + rows[-1] <= num_positions) or (0,)
    started = time.perf_counter()
    measured = measure(
        DecoderProbe(decoder, num_positions=num_positions), rows=rows, contexts=contexts, repeats=_REPEATS
    )
    experts = None
    if config.num_experts:
        experts = ExpertUnion(num_experts=config.num_experts, experts_per_token=config.experts_per_token)
    costs = ", ".join(f"{n}: {s * 1e3:.2f}" for n, s in zip(rows, measured.varied_s_GC[:, 0].tolist(), strict=True))
    _log.info("a step takes, in ms by rows, %s; measured in %.1f s", costs, time.perf_counter() - started)
    return StepCost(measured, experts=experts)
