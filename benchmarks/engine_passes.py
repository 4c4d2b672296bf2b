"""Passes over a verified tree, on the decoder itself: T(n), and the experts that n tokens of real text touch."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.peers.protocol import Task, interleaved_ms, median_of_each
from slipstream.drafting.step_cost import distinct_experts
from slipstream.engine.decoders import open_decoder
from slipstream.engine.plan import BLOCK_TOKENS, NO_NODE, StepPlan
from slipstream.models.checkpoint import Checkpoint


def measure_passes(checkpoint: Checkpoint, task: Task) -> tuple[dict[int, float], dict[int, float]]:
    """Median milliseconds of a pass and mean distinct experts of a layer, by number of verified tokens.

    Each pass is the token after a context and a chain of n - 1 nodes that go on with the text, logits of all n.
    """
    num_positions = len(task.text_ids)
    decoder = open_decoder(
        checkpoint,
        num_blocks=-(-num_positions // BLOCK_TOKENS),
        num_node_slots=max(task.tree_sizes),
        max_rows=num_positions,
    )
    times: list[dict[int, float]] = []
    experts: list[dict[int, float]] = []
    for context in task.contexts:
        decoder.forward(chain_plan(task.text_ids[:context], first=0, num_nodes=0))
        plans = {
            size: chain_plan(task.text_ids[context : context + size], first=context, num_nodes=size - 1)
            for size in task.tree_sizes
        }
        passes = {size: functools.partial(decoder.forward, plan) for size, plan in plans.items()}
        times.append(interleaved_ms(passes, num_repeats=task.num_repeats))
        experts.append(
            {size: distinct_experts(decoder.forward(plan).expert_ids_TLK) or 0.0 for size, plan in plans.items()}
        )
    return median_of_each(times), {size: statistics.mean(each[size] for each in experts) for size in task.tree_sizes}


def chain_plan(token_ids: Sequence[int], *, first: int, num_nodes: int) -> StepPlan:
    """Rows for these tokens at positions from `first` on; the last `num_nodes` of them are a chain of tree nodes.

    One sequence, whose block c is block c of the cache; without nodes the logits of the last row, else of all rows.
    """
    num_rows = len(token_ids)
    num_plain = num_rows - num_nodes
    positions_T = np.arange(first, first + num_rows, dtype=np.int32)
    nodes_T = np.arange(-num_plain, num_nodes, dtype=np.int32)
    is_node_T = nodes_T >= 0
    num_ancestors_T = np.maximum(nodes_T + 1, 0)  # a node's own slot ends the list
    return StepPlan(
        ids_T=np.array(token_ids, dtype=np.int32),
        positions_T=positions_T,
        sequences_T=np.zeros(num_rows, dtype=np.int32),
        block_tables_BC=np.arange(-(-(first + num_rows) // BLOCK_TOKENS), dtype=np.int32)[np.newaxis],
        num_committed_T=np.where(is_node_T, first + num_plain, positions_T + 1).astype(np.int32),
        node_slots_T=np.where(is_node_T, nodes_T, NO_NODE).astype(np.int32),
        ancestor_starts=np.concatenate([[0], np.cumsum(num_ancestors_T)]).astype(np.int32),
        ancestors=np.concatenate([np.arange(number) for number in num_ancestors_T]).astype(np.int32),
        logit_rows_X=np.arange(0 if num_nodes else num_rows - 1, num_rows, dtype=np.int32),
    )
