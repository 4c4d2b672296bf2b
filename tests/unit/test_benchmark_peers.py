"""The engine's benchmark: GGUF files compute our function, chains are plain decoding, floors are counted right."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from benchmarks.engine_costs import bytes_read, multiply_adds
from benchmarks.engine_figures import (
    LLAMA,
    OURS,
    Bounds,
    Measured,
    Turn,
    active_bytes,
    bandwidth_share,
    goals_of,
    pass_floor,
    tables_of,
)
from benchmarks.engine_passes import chain_plan
from benchmarks.engine_sizes import Prepared, Size
from benchmarks.peers.protocol import INSTALL, Timing
from slipstream.engine.decoders import open_decoder
from slipstream.engine.plan import BLOCK_TOKENS, PagedDecoder
from slipstream.models.checkpoint import load_checkpoint
from slipstream.models.config import ModelConfig

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "deploy" / "models"
PROMPT = tuple(range(40, 72))

TINY = ModelConfig(
    family="qwen3_moe",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    ties_embeddings=True,
    num_experts=4,
    experts_per_token=2,
)


def decoder_of(directory: Path) -> PagedDecoder:
    return open_decoder(load_checkpoint(directory), num_blocks=16, num_node_slots=16, max_rows=64)


def greedy(decoder: PagedDecoder, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    logits = decoder.forward(chain_plan(token_ids, first=0, num_nodes=0)).logits_XV
    while len(token_ids) < len(prompt) + num_tokens:
        token_ids.append(int(logits[-1].argmax()))
        logits = decoder.forward(chain_plan(token_ids[-1:], first=len(token_ids) - 1, num_nodes=0)).logits_XV
    return token_ids[len(prompt) :]


@pytest.mark.parametrize(
    "directory",
    [MODELS / "mix-moe-11m", MODELS / "draft-2m-general", ROOT.parent / "shared" / "models" / "mix-dense-6m"],
    ids=["qwen3_moe", "llama", "qwen3"],
)
def test_llama_cpp_generates_our_tokens_from_our_gguf_file(directory: Path, tmp_path: Path) -> None:
    llamacpp = pytest.importorskip("benchmarks.peers.llamacpp", reason=INSTALL)
    gguf_file = pytest.importorskip("benchmarks.peers.gguf_file", reason=INSTALL)
    if not directory.exists():
        pytest.skip(f"{directory.name} is not on this machine")
    gguf_file.write_gguf(directory, tmp_path / "model.gguf")
    session = llamacpp.Session(str(tmp_path / "model.gguf"), num_threads=1, context_tokens=256)
    theirs, _ = llamacpp.generate(session, PROMPT, num_tokens=64)
    assert theirs == greedy(decoder_of(directory), PROMPT, 64)


def test_chain_of_nodes_computes_what_plain_decoding_does() -> None:
    decoder = decoder_of(MODELS / "mix-moe-11m")
    text = PROMPT[: BLOCK_TOKENS + 5]
    decoder.forward(chain_plan(text[:10], first=0, num_nodes=0))
    tree = decoder.forward(chain_plan(text[10:], first=10, num_nodes=len(text) - 11)).logits_XV.clone()
    plain = []
    for position in range(10, len(text)):
        plan = chain_plan(text[position : position + 1], first=position, num_nodes=0)
        plain.append(decoder.forward(plan).logits_XV[0].clone())
    difference = (tree - torch.stack(plain)).abs().max()
    assert difference == 0 if decoder.is_exact else difference < 1e-4


def test_bytes_and_products_of_a_pass_are_counted_by_hand() -> None:
    # Per layer: query and output 8 x 16 each, key and value 8 x 8 each, router 4 x 8, an expert 3 x 8 x 16.
    attention, router, expert, head = 128 + 128 + 64 + 64, 32, 384, 100 * 8
    read = bytes_read(TINY, num_tokens=3, experts_touched=3.5, context=10)
    cached = 2 * 10 * 2 * 8
    assert read == 2 * (2 * (attention + router + 3.5 * expert) + head + 3 * 8) + 4 * cached
    # Each of 2 tokens attends to 10 positions of the context and on average to 1 of the tokens: scores and values.
    computed = multiply_adds(TINY, num_tokens=2, context=10)
    assert computed == 2 * (2 * (attention + router + 2 * expert) + head + 2 * 2 * 16 * 11)


def measured(*, with_llama: bool) -> Measured:
    ours = Timing(
        token_ids=(1, 2),
        prefill_tokens_per_s=1e4,
        pass_ms={1: 2.0, 9: 4.0},
        experts_touched={1: 2.0, 9: 4.0},
        kernel_share=0.95,
        batch_tokens_per_s={1: 500.0, 2: 900.0},
    )
    theirs = Timing(token_ids=(1, 3), prefill_tokens_per_s=1e4, pass_ms={1: 3.0, 9: 15.0})
    return Measured(
        prepared=Prepared(
            size=Size(source="mix-moe-11m", times=4),
            config=TINY,
            directory=Path("nowhere"),
            gguf=None,
            num_parameters=1,
            text_ids=(),
        ),
        multiply_adds_per_s=1e9,
        timings={OURS: [ours]} | ({LLAMA: [theirs]} if with_llama else {}),
        turns=[
            Turn(read_gbps=gbps, ms={OURS: ms} | ({LLAMA: 1.5 * ms} if with_llama else {}))
            for gbps, ms in ((1e-3, 2.0), (2e-3, 1.0), (1e-3, 2.0))
        ],
        context=10,
    )


BOUNDS = Bounds(
    speed_over_llama=1.0,
    bandwidth_share=0.7,
    pass_over_floor=1.15,
    pass_gain_over_llama=2.0,
    other_share=0.1,
    batch_gain=1.0,
)


def test_floor_of_a_pass_is_the_larger_of_bytes_and_products() -> None:
    each = measured(with_llama=True)
    by_bytes = bytes_read(TINY, num_tokens=9, experts_touched=4.0, context=10) / bytes_read(
        TINY, num_tokens=1, experts_touched=2.0, context=10
    )
    assert pass_floor(each, 9) == by_bytes  # 9 tokens' products take 0.04 ms at 10^9 a second, of 2 ms
    by_products = multiply_adds(TINY, num_tokens=9, context=10) / 1e6 * 1e3 / 2.0
    assert pass_floor(msgspec.structs.replace(each, multiply_adds_per_s=1e6), 9) == pytest.approx(by_products)


def test_share_of_the_bandwidth_is_taken_within_a_turn() -> None:
    each = measured(with_llama=True)
    # Twice the bandwidth and half the time: the same share in every turn, though not of the medians.
    assert bandwidth_share(each) == pytest.approx(active_bytes(each) / 1e-3 / 1e6 / 2.0)


def test_goals_against_a_missing_peer_are_not_met() -> None:
    def missed(each: Measured) -> set[str]:
        return {goal.figure for goal in goals_of([each], BOUNDS) if not goal.is_met}

    against_llama = {
        "plain decoding over llama.cpp's, mix-moe-11m x4",
        "llama.cpp's T(9)/T(1) over ours, mix-moe-11m x4",
    }
    assert not missed(measured(with_llama=True)) & against_llama
    assert missed(measured(with_llama=False)) >= against_llama


def test_tables_say_that_sizes_are_widened_copies_and_how_many_tokens_agree() -> None:
    decode, prefill, passes, batches = (table.as_text() for table in tables_of([measured(with_llama=True)]))
    assert all("widened copies" in text for text in (decode, prefill, passes, batches))
    assert "1 of 2 tokens ours" in decode
