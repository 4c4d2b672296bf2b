"""The torch decoder against whole causal forward passes: on this CPU, the code that a GPU runs, padding and all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import slipstream_kernels
from benchmarks.cuda_engine import QUICK, gap_at_first_difference, open_torch, serve
from slipstream.engine import decoders
from slipstream.engine.decoders import open_decoder
from slipstream.engine.native_decoder import NativeDecoder
from slipstream.engine.plan import BLOCK_TOKENS, Move, StepPlan
from slipstream.engine.torch_decoder import StepKind, TorchDecoder
from slipstream.errors import ConfigError
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.models.config import Family
from slipstream.models.decoder import arrange, causal_decode, causal_logits
from tests.families import FAMILIES, VOCAB_SIZE, random_checkpoint
from tests.plans import Rows, path_to, plan_of, random_tree

KINDS: tuple[StepKind, ...] = ("exact", "static")
NUM_BLOCKS = 40
NUM_NODE_SLOTS = 64


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Checkpoint]:
    """A random checkpoint of each family, of sizes that divide badly."""
    root = tmp_path_factory.mktemp("families")
    return {family: load_checkpoint(random_checkpoint(family, root / family, size="odd")) for family in FAMILIES}


def torch_decoder(checkpoint: Checkpoint, kind: StepKind, dtype: torch.dtype = torch.float32) -> TorchDecoder:
    return TorchDecoder(
        arrange(checkpoint.config, checkpoint.weights),
        num_blocks=NUM_BLOCKS,
        num_node_slots=NUM_NODE_SLOTS,
        max_rows=256,
        device="cpu",
        dtype=dtype,
        steps=kind,
    )


def random_ids(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    return tuple(int(token) for token in rng.integers(0, VOCAB_SIZE, length))


def random_rows(rng: np.random.Generator, lengths: Sequence[int], num_nodes: Sequence[int]) -> list[Rows]:
    """Sequences of these lengths in scattered blocks, each with a random tree."""
    free_blocks = list(rng.permutation(NUM_BLOCKS))
    free_slots = list(rng.permutation(NUM_NODE_SLOTS // 8))
    rows = []
    for length, number in zip(lengths, num_nodes, strict=True):
        nodes, parents = random_tree(rng, num_nodes=number, vocab_size=VOCAB_SIZE)
        blocks = tuple(int(free_blocks.pop()) for _ in range(0, length + 8, BLOCK_TOKENS))
        slot = int(free_slots.pop()) * 8
        ids = random_ids(rng, length)
        rows.append(Rows(token_ids=ids, blocks=blocks, nodes=nodes, parents=parents, first_node_slot=slot))
    return rows


def expected_logits(checkpoint: Checkpoint, sequences: Sequence[Rows]) -> torch.Tensor:
    """What a causal forward pass over every path gives, in the order of the plan's rows."""
    rows = []
    for sequence in sequences:
        whole = torch.tensor([sequence.token_ids])
        rows.append(causal_logits(checkpoint.config, checkpoint.weights, whole)[0, sequence.start :])
        for node in range(len(sequence.nodes)):
            path = tuple(sequence.nodes[each] for each in path_to(sequence.parents, node))
            whole = torch.tensor([sequence.token_ids + path])
            rows.append(causal_logits(checkpoint.config, checkpoint.weights, whole)[0, -1:])
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_decode_and_trees_of_unequal_lengths_equal_a_causal_pass(
    checkpoints: dict[Family, Checkpoint], family: Family, kind: StepKind
) -> None:
    checkpoint = checkpoints[family]
    rng = np.random.default_rng(7)
    decoder = torch_decoder(checkpoint, kind)
    prompts = random_rows(rng, lengths=(1, 16, 50, 33), num_nodes=(0, 0, 0, 0))
    logits = decoder.forward(plan_of(prompts)).logits_XV
    torch.testing.assert_close(logits, expected_logits(checkpoint, prompts), atol=1e-4, rtol=0)
    verified = [
        Rows(
            token_ids=prompt.token_ids + random_ids(rng, 1),
            blocks=prompt.blocks,
            start=len(prompt.token_ids),
            nodes=tree[0],
            parents=tree[1],
            first_node_slot=8 * index,
        )
        for index, prompt in enumerate(prompts)
        for tree in [random_tree(rng, num_nodes=2 * index, vocab_size=VOCAB_SIZE)]
    ]
    output = decoder.forward(plan_of(verified))
    torch.testing.assert_close(output.logits_XV, expected_logits(checkpoint, verified), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_expert_ids_are_those_of_a_causal_pass(checkpoints: dict[Family, Checkpoint], kind: StepKind) -> None:
    checkpoint = checkpoints["qwen3_moe"]
    rows = random_rows(np.random.default_rng(1), lengths=(21,), num_nodes=(0,))
    experts = torch_decoder(checkpoint, kind).forward(plan_of(rows)).expert_ids_TLK
    weights = arrange(checkpoint.config, checkpoint.weights)
    _, expected = causal_decode(weights, torch.tensor([rows[0].token_ids]))
    assert experts is not None
    assert expected is not None
    assert torch.equal(experts, expected)


def test_a_dense_model_reports_no_experts(checkpoints: dict[Family, Checkpoint]) -> None:
    rows = random_rows(np.random.default_rng(1), lengths=(3,), num_nodes=(0,))
    assert torch_decoder(checkpoints["llama"], "static").forward(plan_of(rows)).expert_ids_TLK is None


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_prefill_equal_one_prefill(checkpoints: dict[Family, Checkpoint], kind: StepKind) -> None:
    checkpoint = checkpoints["olmoe"]
    rng = np.random.default_rng(2)
    token_ids, blocks = random_ids(rng, 70), tuple(int(block) for block in rng.permutation(NUM_BLOCKS)[:5])
    expected = expected_logits(checkpoint, [Rows(token_ids=token_ids, blocks=blocks)])
    decoder, start = torch_decoder(checkpoint, kind), 0
    for end in (1, 17, 18, 64, 70):
        chunk = Rows(token_ids=token_ids[:end], blocks=blocks, start=start)
        logits = decoder.forward(plan_of([chunk])).logits_XV
        torch.testing.assert_close(logits, expected[start:end], atol=1e-4, rtol=0)
        start = end


@pytest.mark.parametrize("kind", KINDS)
def test_kept_nodes_are_as_if_computed_in_place(checkpoints: dict[Family, Checkpoint], kind: StepKind) -> None:
    checkpoint = checkpoints["qwen3"]
    rng = np.random.default_rng(3)
    prompt = random_ids(rng, 30)
    # A chain 0-1-2 with a wrong sibling beside each node; the chain crosses a border of blocks.
    nodes, parents = random_ids(rng, 6), (-1, 0, 1, -1, 0, 1)
    tree = Rows(token_ids=prompt, blocks=(9, 4, 22), nodes=nodes, parents=parents, first_node_slot=11)
    decoder = torch_decoder(checkpoint, kind)
    decoder.forward(plan_of([tree]))
    decoder.keep([Move(11, 4, 14), Move(12, 4, 15), Move(13, 22, 0)])
    after = Rows(token_ids=prompt + nodes[:3] + (5,), blocks=(9, 4, 22), start=33)
    torch.testing.assert_close(
        decoder.forward(plan_of([after])).logits_XV, expected_logits(checkpoint, [after]), atol=1e-4, rtol=0
    )


def test_keeping_nothing_changes_nothing(checkpoints: dict[Family, Checkpoint]) -> None:
    decoder = torch_decoder(checkpoints["llama"], "static")
    rows = plan_of([Rows(token_ids=(1, 2, 3), blocks=(0,))])
    before = decoder.forward(rows).logits_XV.clone()
    decoder.keep([])
    assert torch.equal(decoder.forward(rows).logits_XV, before)


@pytest.mark.parametrize("kind", KINDS)
def test_rejected_nodes_are_never_seen(checkpoints: dict[Family, Checkpoint], kind: StepKind) -> None:
    """Whatever other nodes of the tree hold, what stands in node slots and in unused positions reaches no other row."""
    checkpoint = checkpoints["mixtral"]
    prompt = random_ids(np.random.default_rng(4), 20)
    rows = []
    for siblings in ((1, 2), (90, 91)):
        nodes, parents = (7, *siblings, 8), (-1, -1, 0, 0)
        decoder = torch_decoder(checkpoint, kind)
        # Filler of a request that had the blocks and slots before.
        filler = random_ids(np.random.default_rng(siblings[0]), 48)
        decoder.forward(plan_of([Rows(token_ids=filler, blocks=(3, 5, 6), nodes=nodes, parents=parents)]))
        output = decoder.forward(plan_of([Rows(token_ids=prompt, blocks=(3, 5, 6), nodes=nodes, parents=parents)]))
        rows.append(output.logits_XV)
    unchanged = [*range(21), 23]
    assert torch.equal(rows[0][unchanged], rows[1][unchanged])
    assert not torch.equal(rows[0][21:23], rows[1][21:23])


def test_a_mask_that_shows_a_sibling_would_be_noticed(checkpoints: dict[Family, Checkpoint]) -> None:
    checkpoint = checkpoints["llama"]
    tree = Rows(token_ids=(5, 6, 7), blocks=(0,), nodes=(10, 20), parents=(-1, -1))
    plan = plan_of([tree])
    shown = StepPlan(
        **{field: getattr(plan, field) for field in plan.__struct_fields__}
        | {"ancestor_starts": np.array([0, 0, 0, 0, 1, 3], np.int32), "ancestors": np.array([0, 0, 1], np.int32)}
    )
    decoder = torch_decoder(checkpoint, "static")
    right, wrong = decoder.forward(plan).logits_XV.clone(), decoder.forward(shown).logits_XV
    assert (right[-1] - wrong[-1]).abs().max() > 1e-2


def test_padding_changes_nothing_but_last_bits(checkpoints: dict[Family, Checkpoint]) -> None:
    checkpoint = checkpoints["qwen3_moe"]
    rows = random_rows(np.random.default_rng(5), lengths=(3, 40, 9), num_nodes=(5, 0, 3))
    exact, static = (torch_decoder(checkpoint, kind).forward(plan_of(rows)) for kind in KINDS)
    torch.testing.assert_close(exact.logits_XV, static.logits_XV, atol=1e-5, rtol=0)
    assert exact.expert_ids_TLK is not None
    assert static.expert_ids_TLK is not None
    assert torch.equal(exact.expert_ids_TLK, static.expert_ids_TLK)


def test_rows_of_one_sequence_need_not_stand_together(checkpoints: dict[Family, Checkpoint]) -> None:
    rows = random_rows(np.random.default_rng(6), lengths=(5, 40), num_nodes=(6, 2))
    plan = plan_of(rows)
    order = np.random.default_rng(6).permutation(len(plan.ids_T))
    paths = [plan.ancestors[plan.ancestor_starts[row] : plan.ancestor_starts[row + 1]] for row in order]
    shuffled = StepPlan(
        *(getattr(plan, name)[order] for name in ("ids_T", "positions_T", "sequences_T")),
        plan.block_tables_BC,
        plan.num_committed_T[order],
        plan.node_slots_T[order],
        np.cumsum([0, *map(len, paths)]).astype(np.int32),
        np.concatenate(paths),
        plan.logit_rows_X,
    )
    checkpoint = checkpoints["llama"]
    plain = torch_decoder(checkpoint, "static").forward(plan).logits_XV
    mixed = torch_decoder(checkpoint, "static").forward(shuffled).logits_XV
    torch.testing.assert_close(mixed, plain[torch.from_numpy(order)], atol=1e-4, rtol=0)


def test_only_the_wanted_logits_come_out_in_their_order(checkpoints: dict[Family, Checkpoint]) -> None:
    plan = plan_of([Rows(token_ids=(4, 8, 15, 16), blocks=(2,))])
    wanted = StepPlan(
        **{field: getattr(plan, field) for field in plan.__struct_fields__}
        | {"logit_rows_X": np.array([3, 0, 2], np.int32)}
    )
    decoder = torch_decoder(checkpoints["llama"], "static")
    every_row = decoder.forward(plan).logits_XV.clone()
    torch.testing.assert_close(decoder.forward(wanted).logits_XV, every_row[[3, 0, 2]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_of_prefill_may_want_no_logits(checkpoints: dict[Family, Checkpoint], kind: StepKind) -> None:
    plan = plan_of([Rows(token_ids=(4, 8, 15, 16), blocks=(2,))])
    fields = {field: getattr(plan, field) for field in plan.__struct_fields__}
    output = torch_decoder(checkpoints["olmoe"], kind).forward(
        StepPlan(**fields | {"logit_rows_X": np.zeros(0, np.int32)})
    )
    assert output.logits_XV.shape == (0, VOCAB_SIZE)
    assert output.expert_ids_TLK is not None
    assert len(output.expert_ids_TLK) == 4


def test_lines_of_the_table_without_rows_are_free(checkpoints: dict[Family, Checkpoint]) -> None:
    """A table may have a line for every slot of the engine, of which few run in a step."""
    rows = Rows(token_ids=(4, 8, 15, 16), blocks=(2,))
    plan = plan_of([rows])
    sparse = StepPlan(
        **{field: getattr(plan, field) for field in plan.__struct_fields__}
        | {
            "sequences_T": np.full(4, 3, np.int32),
            "block_tables_BC": np.array([[0, 0]] * 3 + [[2, -1]] + [[-1, -1]] * 2, np.int32),
        }
    )
    decoder = torch_decoder(checkpoints["llama"], "static")
    expected = expected_logits(checkpoints["llama"], [rows])
    torch.testing.assert_close(decoder.forward(sparse).logits_XV, expected, atol=1e-4, rtol=0)


def test_more_rows_than_the_decoder_was_built_for_are_refused(checkpoints: dict[Family, Checkpoint]) -> None:
    decoder = torch_decoder(checkpoints["llama"], "static")
    with pytest.raises(ValueError, match=r"257 rows.*max_rows=256"):
        decoder.forward(plan_of([Rows(token_ids=(1,) * 257, blocks=tuple(range(17)))]))


def test_bf16_stays_near_fp32(checkpoints: dict[Family, Checkpoint]) -> None:
    """Weights and cache are rounded to 8 bits; what they make of logits of several units stays within a few tenths."""
    checkpoint = checkpoints["qwen3"]
    rows = random_rows(np.random.default_rng(8), lengths=(30,), num_nodes=(4,))
    logits = torch_decoder(checkpoint, "static", torch.bfloat16).forward(plan_of(rows)).logits_XV
    expected = expected_logits(checkpoint, rows)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.3
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.8


class ForbidReads(TorchDispatchMode):
    """Fails on every operation whose result's shape or value makes the host wait for the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "_unique", "unique_dim", "masked_select", "bincount", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        assert not name.startswith(self.FORBIDDEN), f"{name} reads from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_step_reads_nothing_back(checkpoints: dict[Family, Checkpoint], family: Family) -> None:
    decoder = torch_decoder(checkpoints[family], "static")
    rows = random_rows(np.random.default_rng(9), lengths=(30, 5), num_nodes=(4, 2))
    with ForbidReads():
        decoder.forward(plan_of(rows))
        decoder.keep([Move(0, 0, 0)])


def test_the_guard_against_reads_notices_one(checkpoints: dict[Family, Checkpoint]) -> None:
    decoder = torch_decoder(checkpoints["qwen3_moe"], "exact")
    with pytest.raises(AssertionError, match="reads from the device"), ForbidReads():
        decoder.forward(plan_of([Rows(token_ids=(1, 2), blocks=(0,))]))


def test_an_engine_over_static_shapes_emits_what_it_emits_over_own_kernels(
    target: Checkpoint, sibling: Checkpoint, prompts: list[tuple[int, ...]]
) -> None:
    """Greedy tokens, with a draft, in a batch: where they part, fp32 must hold the two for equally likely."""
    weights = arrange(target.config, target.weights)
    some = prompts[::6]
    own, static = (
        serve(target, some, draft=sibling, sizes=QUICK, device="cpu", decoders=opened)[0]
        for opened in (open_decoder, partial(open_torch, steps="static"))
    )
    pairs = zip(own, static, strict=True)
    gaps = [gap_at_first_difference(weights, prompt, outputs=pair) for prompt, pair in zip(some, pairs, strict=True)]
    assert all(gap is None or gap < 1e-4 for gap in gaps)
    assert gaps.count(None) >= 7


def open_small(checkpoint: Checkpoint, device: str = "cpu") -> object:
    return open_decoder(checkpoint, num_blocks=4, num_node_slots=4, max_rows=8, device=device)


@pytest.mark.skipif(not slipstream_kernels.is_available(), reason="no C++ compiler: own kernels cannot be built")
def test_a_cpu_runs_own_kernels(checkpoints: dict[Family, Checkpoint]) -> None:
    assert isinstance(open_small(checkpoints["llama"]), NativeDecoder)


def test_without_a_compiler_torch_decodes_and_says_so_once(
    checkpoints: dict[Family, Checkpoint], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slipstream_kernels, "is_available", lambda: False)
    monkeypatch.setattr(slipstream_kernels, "why_unavailable", lambda: "no g++ on the path")
    decoders._warn_of_torch.cache_clear()
    with caplog.at_level(logging.WARNING):
        opened = [open_small(checkpoints["llama"]) for _ in range(3)]
    assert all(isinstance(decoder, TorchDecoder) and not decoder.is_exact for decoder in opened)
    [record] = caplog.records
    assert "no g++ on the path" in record.getMessage()
    assert "install g++ or clang++" in record.getMessage()


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cpu:0", "mps"])
def test_an_unknown_device_is_refused(checkpoints: dict[Family, Checkpoint], device: str) -> None:
    with pytest.raises(ConfigError, match="expected 'cpu', 'cuda' or 'cuda:N'"):
        open_small(checkpoints["llama"], device)


def test_a_device_that_is_not_there_is_refused(checkpoints: dict[Family, Checkpoint]) -> None:
    with pytest.raises(ConfigError, match="this machine has"):
        open_small(checkpoints["llama"], f"cuda:{torch.cuda.device_count()}")
