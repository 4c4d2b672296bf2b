"""The engine on a GPU: `python -m benchmarks.cuda_engine [CHECKPOINT] [--draft DIRECTORY] [--device cpu] [--quick]`.

Runs where there is torch and little else (numpy, msgspec, safetensors, prometheus-client; no Ray, Kafka, MLflow or
Redis). Without `tokenizers` prompts are random token ids. Prints progress on stderr and one JSON object on stdout:

    logits       the device's against fp32 on the CPU, over whole prompts
    speculation  prompts whose greedy tokens differ with and without a draft, and how near to equal the two tokens were
                 in fp32 at the first difference: rounding decides between near equals, a fault would not ask
    steps        ms of a pass, kernel by kernel ("static") and from CUDA graphs ("captured"); on a CPU, which has no
                 graphs, in exact and in padded sizes
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from deploy.local.queries import builtin_streams
from slipstream.engine.decoders import OpenDecoder, check_device
from slipstream.engine.engine import Engine
from slipstream.engine.plan import BLOCK_TOKENS, NO_NODE, StepPlan
from slipstream.engine.request import Request, SamplingParams, TokenBlock
from slipstream.engine.scheduler import EngineLimits
from slipstream.engine.torch_decoder import StepKind, TorchDecoder
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.models.decoder import DecoderWeights, arrange, causal_decode, logits_of
from slipstream.telemetry import ReplicaMetrics

try:
    import tokenizers
except ImportError:
    tokenizers = None  # type: ignore[assignment]  # a GPU box may lack it; then prompts are random

MODELS = Path(__file__).parents[1] / "deploy" / "models"
MAX_PROMPT_TOKENS = 250
CONTEXT_TOKENS = 500
NUM_DRAFT_TOKENS = 4


class Sizes(msgspec.Struct, frozen=True):
    """How much is measured; `batches` are numbers of sequences."""

    num_prompts: int
    max_tokens: int
    batches: tuple[int, ...]
    num_repeats: int


FULL = Sizes(64, 128, (1, 2, 4, 8, 16, 32), 50)
QUICK = Sizes(6, 24, (1, 4), 5)


def open_torch(
    checkpoint: Checkpoint,
    *,
    num_blocks: int,
    num_node_slots: int,
    max_rows: int,
    device: str = "cpu",
    steps: StepKind | None = None,
) -> TorchDecoder:
    """The decoder that is measured, on a CPU too."""
    return TorchDecoder(
        arrange(checkpoint.config, checkpoint.weights, dtype=None),
        num_blocks=num_blocks,
        num_node_slots=num_node_slots,
        max_rows=max_rows,
        device=device,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        steps=steps,
    )


def load_prompts(directory: Path, number: int, *, vocab_size: int) -> tuple[str, list[tuple[int, ...]]]:
    """What the prompts are, and their token ids."""
    path = directory / "tokenizer.json"
    if tokenizers is None or not path.exists():
        rng = np.random.default_rng(0)
        lengths = rng.integers(8, MAX_PROMPT_TOKENS, number)
        return "random token ids", [tuple(rng.integers(0, vocab_size, length).tolist()) for length in lengths]
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    streams = [stream for _, stream in builtin_streams(seed=0)[:3]]
    queries = itertools.chain.from_iterable(zip(*streams, strict=False))
    ids = (tuple(tokenizer.encode(f"<|user|>{query.prompt}<|assistant|>").ids) for query in queries)
    return "built-in streams", list(itertools.islice((one for one in ids if len(one) <= MAX_PROMPT_TOKENS), number))


def reference_logits(weights: DecoderWeights, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] in fp32 on the CPU."""
    with torch.inference_mode():
        return logits_of(weights, causal_decode(weights, torch.tensor([token_ids]))[0])


def compare_logits(
    checkpoint: Checkpoint, weights: DecoderWeights, *, prompts: Sequence[tuple[int, ...]], device: str
) -> dict[str, float]:
    """How far the device's logits stand from the reference, and between which tokens that matters."""
    largest, num_equal, num_positions, gaps = 0.0, 0, 0, [0.0]
    decoder = open_torch(checkpoint, num_blocks=16, num_node_slots=0, max_rows=MAX_PROMPT_TOKENS, device=device)
    for prompt in prompts:
        expected, seen = reference_logits(weights, prompt), decoder.forward(whole(prompt)).logits_XV.cpu()
        largest = max(largest, (expected - seen).abs().max().item())
        differ = (expected.argmax(-1) != seen.argmax(-1)).nonzero().flatten()
        gaps += (expected[differ].amax(-1) - expected[differ, seen[differ].argmax(-1)]).tolist()
        num_equal, num_positions = num_equal + len(prompt) - len(differ), num_positions + len(prompt)
    return {
        "positions": num_positions,
        "max_abs_difference": largest,
        "same_most_likely_ratio": num_equal / num_positions,
        "largest_gap_where_not": max(gaps),
    }


def whole(prompt: Sequence[int]) -> StepPlan:
    """The plan of a prompt from its first token, all logits wanted."""
    length = len(prompt)
    rows = np.arange(length, dtype=np.int32)
    none, blocks = np.zeros(length, np.int32), np.arange(-(-length // BLOCK_TOKENS), dtype=np.int32)
    return StepPlan(
        np.array(prompt, np.int32),
        rows,
        none,
        blocks[np.newaxis],
        rows + 1,
        none + NO_NODE,
        np.zeros(length + 1, np.int32),
        np.zeros(0, np.int32),
        rows,
    )


def decoding(num_sequences: int, *, num_nodes: int) -> StepPlan:
    """A step of sequences of CONTEXT_TOKENS tokens: the last one's row, and a chain of nodes behind it."""
    per_sequence = 1 + num_nodes
    depth_T = np.tile(np.arange(per_sequence, dtype=np.int32), num_sequences)
    sequences_T = np.repeat(np.arange(num_sequences, dtype=np.int32), per_sequence)
    node_slots_T = np.where(depth_T > 0, sequences_T * num_nodes + depth_T - 1, NO_NODE).astype(np.int32)
    paths = [range(slot - depth + 1, slot + 1) for slot, depth in zip(node_slots_T, depth_T, strict=True)]
    width = blocks_per_sequence()
    return StepPlan(
        depth_T + 100,
        depth_T + CONTEXT_TOKENS - 1,
        sequences_T,
        np.arange(num_sequences * width, dtype=np.int32).reshape(num_sequences, width),
        np.full(len(depth_T), CONTEXT_TOKENS, np.int32),
        node_slots_T,
        np.concatenate([[0], np.cumsum(depth_T)]).astype(np.int32),
        np.array([slot for path in paths for slot in path], np.int32),
        np.arange(len(depth_T), dtype=np.int32),
    )


def blocks_per_sequence() -> int:
    """Blocks that hold the context of a measured step."""
    return -(-(CONTEXT_TOKENS + 1) // BLOCK_TOKENS)


def time_steps(checkpoint: Checkpoint, sizes: Sizes, *, device: str) -> list[dict[str, Any]]:
    """Median ms of a pass for each batch and number of nodes, in both ways of running a step, alternating."""
    most = max(sizes.batches)
    kinds: tuple[StepKind, StepKind] = ("exact", "static") if device == "cpu" else ("static", "captured")
    decoders = {
        kind: open_torch(
            checkpoint,
            num_blocks=most * blocks_per_sequence(),
            num_node_slots=most * NUM_DRAFT_TOKENS,
            max_rows=most * (1 + NUM_DRAFT_TOKENS),
            device=device,
            steps=kind,
        )
        for kind in kinds
    }
    rows = []
    for number, num_nodes in itertools.product(sizes.batches, (0, NUM_DRAFT_TOKENS)):
        progress(f"step of {number} sequences with {num_nodes} nodes each")
        passes = {kind: partial(decoders[kind].forward, decoding(number, num_nodes=num_nodes)) for kind in kinds}
        figures = time_alternating(passes, sizes.num_repeats)
        rows.append({"sequences": number, "nodes": num_nodes} | {f"{kind}_ms": figures[kind] for kind in kinds})
    return rows


def time_alternating(passes: Mapping[StepKind, Callable[[], object]], num_repeats: int) -> dict[StepKind, float]:
    """Median ms of each, after three rounds that warm up and capture."""
    times: dict[StepKind, list[float]] = {kind: [] for kind in passes}
    for _ in range(3 + num_repeats):
        for kind, run in passes.items():
            synchronise()
            started = time.perf_counter()
            run()
            synchronise()
            times[kind].append((time.perf_counter() - started) * 1e3)
    return {kind: statistics.median(some[3:]) for kind, some in times.items()}


def synchronise() -> None:
    """Wait until the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def serve(
    target: Checkpoint,
    prompts: Sequence[tuple[int, ...]],
    *,
    draft: Checkpoint | None,
    sizes: Sizes,
    device: str,
    decoders: OpenDecoder = open_torch,
) -> tuple[list[list[int]], float]:
    """Greedy tokens of every prompt, and output tokens per second."""
    engine = Engine(
        target,
        limits=EngineLimits(
            max_running_requests=32,
            max_queued_requests=len(prompts),
            max_step_tokens=512,
            max_context_tokens=MAX_PROMPT_TOKENS + sizes.max_tokens,
            num_draft_tokens=NUM_DRAFT_TOKENS,
        ),
        target_digest=target.digest,
        replica_id="benchmark",
        top_n=1,
        observe=lambda _: None,
        metrics=ReplicaMetrics(),
        device=device,
        decoders=decoders,
    )
    if draft is not None:
        engine.install_draft(draft, version=1)
    blocks: list[list[TokenBlock]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.submit(request(index, prompt, max_tokens=sizes.max_tokens), blocks[index].append)
    started = time.perf_counter()
    while engine.step():
        pass
    seconds = time.perf_counter() - started
    outputs = [[token for block in some for token in block.token_ids] for some in blocks]
    return outputs, sum(map(len, outputs)) / seconds


def request(index: int, prompt: tuple[int, ...], *, max_tokens: int) -> Request:
    """A greedy request that runs to `max_tokens`."""
    return Request(
        request_id=str(index),
        prompt_ids=prompt,
        sampling=SamplingParams(seed=index, max_tokens=max_tokens, temperature=0.0),
        tenant="benchmark",
        domain="benchmark",
        may_train=False,
        arrived_at=0.0,
    )


def gap_at_first_difference(
    weights: DecoderWeights, prompt: tuple[int, ...], *, outputs: tuple[Sequence[int], Sequence[int]]
) -> float | None:
    """How much apart the reference's logits of the two tokens are where two outputs part; None if they are equal."""
    first, second = outputs
    length = next((index for index, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), None)
    if length is None:
        return None
    logits_V = reference_logits(weights, (*prompt, *first[:length]))[-1]
    return abs(float(logits_V[first[length]] - logits_V[second[length]]))


def compare_speculation(
    target: Checkpoint,
    draft: Checkpoint,
    *,
    weights: DecoderWeights,
    prompts: Sequence[tuple[int, ...]],
    sizes: Sizes,
    device: str,
) -> dict[str, Any]:
    """Serve the prompts with and without the draft, and count where the tokens part."""
    plain, plain_rate = serve(target, prompts, draft=None, sizes=sizes, device=device)
    drafted, drafted_rate = serve(target, prompts, draft=draft, sizes=sizes, device=device)
    pairs = zip(plain, drafted, strict=True)
    found = [
        gap_at_first_difference(weights, prompt, outputs=pair) for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    gaps = sorted(gap for gap in found if gap is not None)
    return {
        "prompts": len(prompts),
        "tokens": sum(map(len, plain)),
        "diverged": len(gaps),
        "median_gap": statistics.median(gaps) if gaps else 0.0,
        "largest_gap": max(gaps, default=0.0),
        "plain_tokens_per_s": plain_rate,
        "drafted_tokens_per_s": drafted_rate,
    }


def progress(text: str) -> None:
    """Say what is going on, beside the JSON."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure and print; 0 unless it could not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=MODELS / "mix-moe-11m")
    parser.add_argument("--draft", type=Path, default=MODELS / "draft-2m-sibling")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    check_device(arguments.device)
    sizes, device = QUICK if arguments.quick else FULL, arguments.device
    target, draft = load_checkpoint(arguments.checkpoint), load_checkpoint(arguments.draft)
    weights = arrange(target.config, target.weights)
    kind, prompts = load_prompts(arguments.checkpoint, sizes.num_prompts, vocab_size=target.config.vocab_size)
    progress(f"{len(prompts)} prompts: {kind}")
    figures = {
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "checkpoint": arguments.checkpoint.name,
        "parameters": sum(weight.numel() for weight in target.weights.values()),
        "prompts": kind,
        "logits": compare_logits(target, weights, prompts=prompts, device=device),
        "speculation": compare_speculation(target, draft, weights=weights, prompts=prompts, sizes=sizes, device=device),
        "steps": time_steps(target, sizes, device=device),
    }
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
