"""The torch decoder on a GPU: graphs, bf16, and a host that never waits inside a pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.cuda_engine import QUICK, compare_logits, compare_speculation, decoding, load_prompts, open_torch, whole
from slipstream.engine.plan import Move
from slipstream.engine.products import StackedExperts, every, gathered, grouped, has_grouped_kernel
from slipstream.engine.torch_decoder import StepKind, TorchDecoder
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.models.decoder import DecoderWeights, arrange

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: graphs, bf16 and waiting on one are not exercised here"
)

MODELS = Path(__file__).parents[2] / "deploy" / "models"
NEARLY_EQUAL = 0.25
"""Two tokens whose fp32 logits are less apart may change places by rounding to bf16 (8 bits, logits of about 20)."""


@pytest.fixture(scope="module")
def target() -> Checkpoint:
    return load_checkpoint(MODELS / "mix-moe-11m")


@pytest.fixture(scope="module")
def weights(target: Checkpoint) -> DecoderWeights:
    return arrange(target.config, target.weights)


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("default")
    yield
    torch.cuda.set_sync_debug_mode("default")


def opened(target: Checkpoint, steps: StepKind) -> TorchDecoder:
    return open_torch(target, num_blocks=512, num_node_slots=64, max_rows=512, device="cuda", steps=steps)


@pytest.mark.parametrize("num_nodes", [0, 4])
def test_replayed_graphs_give_what_single_kernels_give(target: Checkpoint, num_nodes: int) -> None:
    """Four passes of one shape: the first runs plainly, the second captures, the others replay with other inputs."""
    captured, static = opened(target, "captured"), opened(target, "static")
    prompt = tuple(np.random.default_rng(0).integers(0, target.config.vocab_size, 500).tolist())
    for decoder in (captured, static):
        decoder.forward(whole(prompt))
    for repeat in range(4):
        plan = decoding(1, num_nodes=num_nodes)
        plan.ids_T[:] += repeat
        seen, expected = captured.forward(plan), static.forward(plan)
        torch.testing.assert_close(seen.logits_XV, expected.logits_XV, atol=0.05, rtol=0)
        assert seen.expert_ids_TLK is not None
        assert seen.expert_ids_TLK.shape[0] == 1 + num_nodes
        if num_nodes:
            for decoder in (captured, static):
                decoder.keep([Move(0, 31, 4)])
    assert captured.num_graphs == 1
    assert static.num_graphs == 0


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("steps", ["static", "captured"])
def test_a_pass_never_waits_for_the_device(target: Checkpoint, steps: StepKind) -> None:
    decoder, plan = opened(target, steps), decoding(4, num_nodes=4)
    prefill = whole(tuple(range(200)))
    for _ in range(3):
        decoder.forward(plan)
        decoder.forward(prefill)
    torch.cuda.set_sync_debug_mode("error")
    decoder.forward(plan)
    decoder.forward(prefill)
    decoder.keep([Move(0, 31, 4), Move(5, 63, 4)])


@pytest.mark.usefixtures("_no_waiting")
def test_the_guard_against_waiting_notices_a_read() -> None:
    value = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError):
        value.item()


def test_ways_of_running_experts_agree_in_bf16() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    gate_up, down = (torch.randn(16, *shape, generator=generator, device="cuda") / 8 for shape in ((128, 64), (64, 64)))
    experts = StackedExperts(gate_up.bfloat16(), down.bfloat16())
    x_TD = torch.randn(10, 64, generator=generator, device="cuda")
    ids_TK = torch.rand(10, 16, generator=generator, device="cuda").argsort(dim=-1)[:, :4]
    torch.testing.assert_close(gathered(experts, x_TD, ids_TK), every(experts, x_TD, ids_TK), atol=0.05, rtol=0.05)
    if has_grouped_kernel(experts):
        torch.testing.assert_close(grouped(experts, x_TD, ids_TK), every(experts, x_TD, ids_TK), atol=0.05, rtol=0.05)


def test_bf16_changes_the_most_likely_token_only_between_near_equals(
    target: Checkpoint, weights: DecoderWeights, capsys: pytest.CaptureFixture[str]
) -> None:
    _, prompts = load_prompts(MODELS / "mix-moe-11m", 16, vocab_size=target.config.vocab_size)
    figures = compare_logits(target, weights, prompts=prompts, device="cuda")
    with capsys.disabled():
        print(f"\nbf16 on CUDA against fp32: {figures}")
    assert figures["largest_gap_where_not"] < NEARLY_EQUAL


def test_speculation_changes_tokens_only_between_near_equals(
    target: Checkpoint, weights: DecoderWeights, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = load_checkpoint(MODELS / "draft-2m-sibling")
    _, prompts = load_prompts(MODELS / "mix-moe-11m", 16, vocab_size=target.config.vocab_size)
    figures = compare_speculation(target, draft, weights=weights, prompts=prompts, sizes=QUICK, device="cuda")
    with capsys.disabled():
        print(f"\nspeculation on CUDA in bf16: {figures}")
    assert figures["largest_gap"] < NEARLY_EQUAL
