"""Logits are bitwise equal, and so are tokens, whatever shares a step: drafts, batches, chunks, prefixes, threads.

Logits are compared as the rows behind equal prefixes of tokens (`recording`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
import torch
from conftest import LIMITS, Run, Served, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import Logits, recording
from trees import Shape, TreeDrafter, all_wrong, anything, deep, hidden_path

import slipstream_kernels
from slipstream.engine.blocks import blocks_for
from slipstream.engine.decoders import OpenDecoder, open_decoder
from slipstream.engine.engine import Engine
from slipstream.engine.plan import NO_NODE, PagedDecoder, StepOutput, StepPlan
from slipstream.engine.scheduler import EngineLimits
from slipstream.engine.torch_decoder import TorchDecoder
from slipstream.models.checkpoint import Checkpoint
from slipstream.models.decoder import arrange

Prompts = list[tuple[int, ...]]

pytestmark = pytest.mark.usefixtures("exact_kernels")


def limits(**changes: object) -> EngineLimits:
    return msgspec.structs.replace(LIMITS, **changes)


class Reference(msgspec.Struct):
    """One request at a time, no draft, no prefix reused: what every other way of serving has to equal."""

    temperature: float
    prompts: Prompts
    run: Run
    logits: Logits

    @property
    def futures(self) -> dict[int, Sequence[int]]:
        """All tokens of each request under its seed."""
        outputs = self.run.outputs
        return {1000 + i: (*self.prompts[i], *output) for i, output in enumerate(outputs)}


@pytest.fixture(scope="module", params=[0.0, 0.6, 1.0], ids=["greedy", "cooled", "sampled"])
def reference(request: pytest.FixtureRequest, target: Checkpoint, prompts: Prompts) -> Reference:
    temperature: float = request.param
    logits: Logits = {}
    few = prompts[::3]
    alone = limits(max_running_requests=1, reuses_prefixes=False)
    run = serve(target, few, Served(temperature=temperature, limits=alone, decoders=recording(logits)))
    return Reference(temperature, few, run, logits)


def serve_like(reference: Reference, target: Checkpoint, **how: object) -> tuple[Run, Logits]:
    logits: Logits = {}
    opening = how.pop("opening", open_decoder)
    served = Served(temperature=reference.temperature, decoders=recording(logits, opening), **how)  # type: ignore[arg-type]
    return serve(target, reference.prompts, served), logits


def num_compared(reference: Reference, logits: Logits) -> int:
    """Rows behind the same tokens as in the reference, all of them bitwise equal."""
    shared = reference.logits.keys() & logits.keys()
    different = sum(not logits[prefix].equal(reference.logits[prefix]) for prefix in shared)
    assert not different, f"{different} of {len(shared)} rows differ"
    return len(shared)


def assert_equal(reference: Reference, run: Run, logits: Logits) -> None:
    assert run.outputs == reference.run.outputs
    assert num_compared(reference, logits) == len(reference.logits) >= sum(map(len, run.outputs)) - len(run.outputs)


@pytest.mark.parametrize(
    "sizes",
    [
        limits(max_running_requests=1),
        limits(max_running_requests=16, num_draft_tokens=1),
        limits(max_running_requests=16, max_step_tokens=32, num_draft_tokens=7),
        limits(max_running_requests=5, max_step_tokens=17),
        limits(max_running_requests=16, num_draft_tokens=0, max_step_tokens=24),
    ],
    ids=["batch 1", "batch 16", "chunks of 32", "chunks of 17", "no draft"],
)
def test_a_chain_batches_and_prefill_chunks_change_no_bit(
    reference: Reference, target: Checkpoint, sibling: Checkpoint, sizes: EngineLimits
) -> None:
    run, logits = serve_like(reference, target, draft=sibling, limits=sizes)
    assert_equal(reference, run, logits)
    assert (run.metric("accepted_tokens_total", domain="math") > 0) == (sizes.num_draft_tokens > 0)


@pytest.mark.parametrize("shape", [deep, all_wrong, hidden_path, anything])
@pytest.mark.parametrize("running", [1, 16])
def test_trees_change_no_bit(reference: Reference, target: Checkpoint, shape: Shape, running: int) -> None:
    drafter = TreeDrafter(shape, reference.futures)
    sizes = limits(max_running_requests=running, num_draft_tokens=12)
    run, logits = serve_like(reference, target, drafter=drafter, limits=sizes)
    assert_equal(reference, run, logits)
    num_accepted = run.metric("accepted_tokens_total", domain="math")
    assert run.metric("draft_tokens_total", domain="math") == drafter.num_proposed > 0
    assert (num_accepted == 0) == (shape is all_wrong)
    assert num_accepted < drafter.num_proposed


def test_forced_preemption_changes_no_bit(reference: Reference, target: Checkpoint, sibling: Checkpoint) -> None:
    longest = blocks_for(max(map(len, reference.prompts)) + 48)
    num_preemptions = 0.0
    for num_blocks in (longest, 2 * longest, 3 * longest):
        for drafter in (None, TreeDrafter(hidden_path, reference.futures)):
            sizes = limits(max_running_requests=16, num_blocks=num_blocks, max_step_tokens=64)
            draft = sibling if drafter is None else None
            run, logits = serve_like(reference, target, draft=draft, drafter=drafter, limits=sizes)
            assert_equal(reference, run, logits)
            assert run.num_free_blocks == num_blocks
            num_preemptions += run.metric("preemptions_total")
    assert num_preemptions >= 6


def test_reused_prefixes_change_no_bit(reference: Reference, target: Checkpoint, sibling: Checkpoint) -> None:
    twice = msgspec.structs.replace(reference, prompts=[*reference.prompts, *reference.prompts])
    run, logits = serve_like(twice, target, draft=sibling, limits=limits(max_running_requests=6))
    assert run.outputs[: len(reference.prompts)] == reference.run.outputs
    assert num_compared(reference, logits) == len(reference.logits)
    assert run.metric("prefix_hit_tokens_total") >= 16 * len(reference.prompts)


def test_two_threads_change_no_bit(reference: Reference, target: Checkpoint, sibling: Checkpoint) -> None:
    slipstream_kernels.set_num_threads(2)
    try:
        run, logits = serve_like(reference, target, draft=sibling)
    finally:
        slipstream_kernels.set_num_threads(1)
    assert_equal(reference, run, logits)


def test_swaps_with_requests_in_flight_change_no_bit(
    reference: Reference, target: Checkpoint, sibling: Checkpoint, general: Checkpoint
) -> None:
    drafts: Sequence[Checkpoint | None] = (general, sibling, None, sibling)
    in_flight: list[int] = []

    def swap(engine: Engine, step: int) -> None:
        if step and step % 4 == 0 and len(in_flight) < len(drafts):
            in_flight.append(engine.num_running)
            engine.install_draft(drafts[len(in_flight) - 1], version=len(in_flight) + 1)

    logits: Logits = {}
    served = Served(draft=sibling, temperature=reference.temperature, decoders=recording(logits))
    run = serve(target, reference.prompts, served, swap)
    assert_equal(reference, run, logits)
    assert len(in_flight) == 4
    assert min(in_flight[:3]) >= 12
    versions = {one.draft_version for observation in run.observations for one in observation.rounds}
    assert versions >= {1, 2, 3, 5}


Mutation = Callable[[StepPlan], StepPlan]


def sibling_visible(plan: StepPlan) -> StepPlan:
    """Every node sees the node before it instead of its parent: right for a chain, wrong for siblings."""
    ancestors = plan.ancestors.copy()
    for row in np.flatnonzero(plan.node_slots_T != NO_NODE):
        start, end = plan.ancestor_starts[row : row + 2]
        if end - start > 1:
            ancestors[end - 2] = ancestors[end - 1] - 1
    return msgspec.structs.replace(plan, ancestors=ancestors)


def one_sibling_more(plan: StepPlan) -> StepPlan:
    """A mask that is causal over the nodes: each sees all before it in its tree."""
    first, starts, ancestors = 0, [0], []
    for row, slot in enumerate(plan.node_slots_T.tolist()):
        if slot != NO_NODE:
            first = slot if plan.node_slots_T[row - 1] == NO_NODE else first
            ancestors += range(first, slot + 1)
        starts.append(len(ancestors))
    return msgspec.structs.replace(
        plan, ancestor_starts=np.array(starts, dtype=np.int32), ancestors=np.array(ancestors, dtype=np.int32)
    )


def position_is_index(plan: StepPlan) -> StepPlan:
    """A node stands at its index behind the last token instead of at its depth."""
    positions = plan.positions_T.copy()
    for row in np.flatnonzero(plan.node_slots_T != NO_NODE):
        positions[row] = positions[row - 1] + 1
    return msgspec.structs.replace(plan, positions_T=positions)


def mutant(mutation: Mutation) -> OpenDecoder:
    """Decoders that compute another plan than the one they are given."""

    class Mutant:
        def __init__(self, inside: PagedDecoder) -> None:
            self.config, self.is_exact, self.keep = inside.config, inside.is_exact, inside.keep
            self._inside = inside

        def forward(self, plan: StepPlan) -> StepOutput:
            return self._inside.forward(mutation(plan))

    def opened(
        checkpoint: Checkpoint, *, num_blocks: int, num_node_slots: int, max_rows: int, device: str = "cpu"
    ) -> PagedDecoder:
        sizes = {"num_blocks": num_blocks, "num_node_slots": num_node_slots, "max_rows": max_rows}
        return Mutant(open_decoder(checkpoint, **sizes, device=device))

    return opened


@pytest.mark.parametrize("mutation", [sibling_visible, one_sibling_more, position_is_index])
def test_a_plan_that_takes_a_tree_for_a_chain_is_caught(
    reference: Reference, target: Checkpoint, mutation: Mutation
) -> None:
    served = {"opening": mutant(mutation), "limits": limits(num_draft_tokens=12)}
    hidden = TreeDrafter(hidden_path, reference.futures)
    with pytest.raises(AssertionError, match="differ"):
        num_compared(reference, serve_like(reference, target, drafter=hidden, **served)[1])
    # On chains these plans are right: what is caught above is the tree, not the mutant's own mistakes.
    run, logits = serve_like(reference, target, drafter=TreeDrafter(deep, reference.futures), **served)
    assert_equal(reference, run, logits)


def torch_decoders(
    checkpoint: Checkpoint, *, num_blocks: int, num_node_slots: int, max_rows: int, device: str = "cpu"
) -> PagedDecoder:
    """Decoders whose order of sums depends on how many rows a pass has."""
    weights = arrange(checkpoint.config, checkpoint.weights)
    sizes = {"num_blocks": num_blocks, "num_node_slots": num_node_slots, "max_rows": max_rows}
    return TorchDecoder(weights, **sizes, device=device, dtype=torch.float32)


def test_a_decoder_whose_order_depends_on_the_row_count_is_caught(target: Checkpoint, prompts: Prompts) -> None:
    alone: Logits = {}
    served = Served(limits=limits(max_running_requests=1), decoders=recording(alone, torch_decoders), max_tokens=8)
    reference = Reference(0.0, prompts[:8], serve(target, prompts[:8], served), alone)
    with pytest.raises(AssertionError, match="differ"):
        num_compared(reference, serve_like(reference, target, opening=torch_decoders, max_tokens=8)[1])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_filtered_and_penalised_sample_does_not_depend_on_the_draft(
    target: Checkpoint, sibling: Checkpoint, prompts: Prompts, data: st.DataObject
) -> None:
    served = Served(
        temperature=data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.7])),
        top_k=data.draw(st.sampled_from([0, 1, 5, 50])),
        top_p=data.draw(st.sampled_from([0.1, 0.7, 1.0])),
        max_tokens=data.draw(st.integers(1, 12)),
        seed=data.draw(st.integers(0, 2**62)),
        limits=limits(max_running_requests=3, num_draft_tokens=data.draw(st.integers(1, 6))),
        more={
            "min_p": data.draw(st.sampled_from([0.0, 0.05])),
            "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3])),
            "presence_penalty": data.draw(st.sampled_from([0.0, 0.7])),
            "frequency_penalty": data.draw(st.sampled_from([0.0, -0.4, 1.1])),
            "logit_bias": data.draw(st.sampled_from([(), ((17, 4.0), (260, -100.0))])),
        },
    )
    few = [prompts[0], prompts[20], prompts[40]]
    plain = serve(target, few, served)
    served.draft = sibling
    assert serve(target, few, served).outputs == plain.outputs
