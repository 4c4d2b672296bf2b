"""Every op against its roofline: `python kernels/bench/ops.py [--threads N]`.

A line says what an op took, what it read and multiplied in that time, and how that compares with what the machine can
do at best: the larger of the two shares is how near the op is to its roofline. Products may be made of matrix tiles,
all else is made of vectors; each is held against its own. Weights are cycled through so many copies that they come from
memory, as they do in a decoder larger than the caches; activations stay in the cache.
Attention, norm, rotation and routing run on one thread here; they and the choice of tokens read next to nothing, and
their time is what counts.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import slipstream_kernels
from slipstream_kernels import ops
from slipstream_kernels.measure import multiply_adds_per_s, read_gbps
from slipstream_kernels.reference import HeadCache, Places
from slipstream_kernels.sampling import choose, row_bytes, sample_rows

HIDDEN, INNER, HEADS, HEAD_SIZE, EXPERTS, CHOSEN, VOCAB = 1024, 1536, 16, 64, 8, 2, 4096
"""Sizes of mix-moe-11m widened 4 times."""

WORKING_SET_BYTES = 128 << 20
ROWS = (1, 2, 3, 5, 9, 17, 33)
REPEATS = 15
BLOCK_TOKENS = 16


class Line(NamedTuple):
    """One op at one size: how to run it once, the bytes it reads from memory, and its multiply-adds."""

    name: str
    num_rows: int
    run: Callable[[], object]
    num_bytes: float
    num_multiply_adds: float


def lines() -> Iterator[Line]:
    """All ops at all numbers of rows."""
    yield from _products("product, head", VOCAB, HIDDEN)
    yield from _products("product, attention out", HIDDEN, HEADS * HEAD_SIZE)
    yield from _experts()
    for num_committed in (128, 1024):
        yield _attention(num_committed)
    for num_rows in (1, 33):
        yield from _small(num_rows)


def _products(name: str, num_outputs: int, inner: int) -> Iterator[Line]:
    num_bytes = 2 * num_outputs * inner
    copies = max(1, WORKING_SET_BYTES // num_bytes)
    weights = itertools.cycle([ops.PackedMatrix(_random(num_outputs, inner).bfloat16()) for _ in range(copies)])
    for num_rows in ROWS:
        x_TD = _random(num_rows, inner)
        yield Line(
            name,
            num_rows,
            lambda x_TD=x_TD: ops.matrix_product(x_TD, next(weights)),  # type: ignore[misc]
            num_bytes,
            num_rows * num_outputs * inner,
        )


def _experts() -> Iterator[Line]:
    expert_bytes = 2 * 3 * HIDDEN * INNER
    gate_up = [_random(2 * INNER, HIDDEN).bfloat16() for _ in range(EXPERTS)]
    down = [_random(HIDDEN, INNER).bfloat16() for _ in range(EXPERTS)]
    layers = itertools.cycle([ops.PackedExperts(gate_up, down) for _ in range(WORKING_SET_BYTES // expert_bytes // 4)])
    for num_rows in ROWS:
        x_TD = _random(num_rows, HIDDEN)
        ids_TK = _random(num_rows, EXPERTS).argsort(dim=1)[:, :CHOSEN].contiguous()
        weights_TK = torch.full((num_rows, CHOSEN), 1 / CHOSEN)
        yield Line(
            f"experts, {len(ids_TK.unique())} of {EXPERTS}",
            num_rows,
            lambda x_TD=x_TD, ids_TK=ids_TK, weights_TK=weights_TK: ops.expert_mlp(  # type: ignore[misc]
                x_TD, next(layers), ids_TK, weights_TK
            ),
            len(ids_TK.unique()) * expert_bytes,
            num_rows * CHOSEN * 3 * HIDDEN * INNER,
        )


def _attention(num_committed: int) -> Line:
    num_blocks, num_nodes = num_committed // BLOCK_TOKENS, 9
    keys_NdB = _random(num_blocks + 1, HEAD_SIZE, BLOCK_TOKENS)
    values_NBd = _random(num_blocks + 1, BLOCK_TOKENS, HEAD_SIZE)
    tables_BC = torch.arange(num_blocks, dtype=torch.int32)[None]
    committed_T = torch.full((num_nodes,), num_committed, dtype=torch.int32)
    query_THd = _random(num_nodes, 1, HEAD_SIZE)
    cache = HeadCache(keys_NdB, values_NBd, num_blocks)
    ancestors = [range(node + 1) for node in range(num_nodes)]
    places = Places(torch.zeros(num_nodes, dtype=torch.int32), tables_BC, committed_T, ancestors)
    return Line(
        f"attention, one head, {num_committed} positions",
        num_nodes,
        lambda: ops.tree_attention(query_THd, cache, places),
        keys_NdB.nbytes + values_NBd.nbytes,
        num_nodes * 2 * HEAD_SIZE * (num_committed + num_nodes / 2),
    )


def _small(num_rows: int) -> Iterator[Line]:
    x_TD, norm_D, router_ED = _random(num_rows, HIDDEN), _random(HIDDEN), _random(EXPERTS, HIDDEN)
    yield Line("norm", num_rows, lambda: ops.rms_norm(x_TD, norm_D, epsilon=1e-6), 0, num_rows * HIDDEN)
    yield Line(
        "routing",
        num_rows,
        lambda: ops.route(x_TD, router_ED, CHOSEN, normalizes=True),
        router_ED.nbytes,
        num_rows * router_ED.numel(),
    )
    heads_Hd, angles_d = _random(num_rows * HEADS, HEAD_SIZE), _random(HEAD_SIZE)
    yield Line("rotation", num_rows, lambda: ops.rotate(heads_Hd, angles_d, angles_d), 0, 2 * heads_Hd.numel())
    logits_XV = _random(num_rows, VOCAB)
    for name, temperature, top_p in (("greedy", 0.0, 1.0), ("temperature 1", 1.0, 1.0), ("top-p 0.9", 1.0, 0.9)):
        row = row_bytes(seed=1, temperature=temperature, top_p=top_p)
        rows_X = sample_rows([row] * num_rows, list(range(num_rows)))
        run = functools.partial(choose, logits_XV, rows_X)
        yield Line(f"choice, {name}", num_rows, run, 0, 0)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def seconds(run: Callable[[], object]) -> float:
    """Median seconds of a call; the first two are not counted."""
    times = []
    for _ in range(REPEATS + 2):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    num_threads = parser.parse_args().threads
    if not slipstream_kernels.is_available():
        print(f"nothing to measure: {slipstream_kernels.why_unavailable()}")
        return 1
    slipstream_kernels.set_num_threads(num_threads)
    gbps = read_gbps(WORKING_SET_BYTES, num_threads=num_threads)
    chosen = slipstream_kernels.instruction_set()
    rate = multiply_adds_per_s(num_threads=num_threads) / 1e9
    if chosen == "amx":
        slipstream_kernels.use_instruction_set("avx512")
    vector_rate = multiply_adds_per_s(num_threads=num_threads) / 1e9
    slipstream_kernels.use_instruction_set(chosen)
    print(
        f"{chosen}, {num_threads} threads: {gbps:.1f} GB/s, {rate:.1f} GFMA/s at best, {vector_rate:.1f} in vectors\n"
    )
    print(f"| {'op':36} | {'rows':>4} | {'us':>8} | {'GB/s':>6} | {'of it':>5} | {'GFMA/s':>6} | {'of it':>5} |")
    print(f"| {'-' * 36} | {'-' * 4} | {'-' * 8} | {'-' * 6} | {'-' * 5} | {'-' * 6} | {'-' * 5} |")
    for line in lines():
        took_s = seconds(line.run)
        best_rate = rate if line.name.startswith(("product", "experts")) else vector_rate
        read, multiplied = line.num_bytes / took_s / 1e9, line.num_multiply_adds / took_s / 1e9
        print(
            f"| {line.name:36} | {line.num_rows:4} | {took_s * 1e6:8.1f} | {read:6.1f} | {read / gbps:5.0%} "
            f"| {multiplied:6.1f} | {multiplied / best_rate:5.0%} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
