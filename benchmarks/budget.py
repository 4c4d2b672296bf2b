"""What deciding costs beside a step: `python -m benchmarks.budget [--requests 64] [--nodes 32]`.

Prints the median time of each part of a budgeted step over random trees: reading survivals, multiplying them along
paths, pricing every number of nodes, choosing; then of learning from the step's outcomes, and of the look-ups. These
are the definitions in numpy; last comes what the engine calls, one compiled call that looks up, grows all trees, judges
the trees before and chooses, and that call without any node to grow.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from slipstream.drafting.budget import DrawnNodes, choose_nodes
from slipstream.drafting.merged_survival import MergedSurvival
from slipstream.drafting.recycling import RecyclingDrafter
from slipstream.drafting.step_cost import ExpertUnion, MeasuredSteps, StepCost
from slipstream.drafting.survival import NodeFeatures, SurvivalModel, Trials, along_paths
from slipstream.drafting.tree import ROOT
from slipstream_kernels.lookup import OutputPool, SuffixAutomaton
from slipstream_kernels.merging import DRAFTERS, Estimates, Merger, Price, Wanted
from slipstream_kernels.recycling import DEFAULT_RULE
from slipstream_kernels.sampling import at_position, row_bytes

REPEATS = 500
CONTEXT_TOKENS = 300
TOKEN_RATE = 10_000.0
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CONTEXTS = (16, 256, 1024)
TEXT_TOKENS = 1024
VOCAB = 4096
SCORING = ("chain", "recycling")


def lines(num_requests: int, nodes_each: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what to time) of every part."""
    rng = np.random.default_rng(1)
    features, parents_X = _forest(rng, num_requests, nodes_each)
    num_nodes = len(parents_X)
    scores_X = rng.random(num_nodes)
    model, cost = SurvivalModel(scoring={"chain": 1_000}), _cost()
    reading = model.read("chain", features, scores_X)
    survivals_X = along_paths(np.minimum(reading + 0.4 * scores_X, 1.0), parents_X)
    nodes = DrawnNodes(survivals_X, parents_X)

    def price() -> NDArray[np.float64]:
        return cost.over_nodes(num_rows=num_requests, max_nodes=num_nodes, context_tokens=CONTEXT_TOKENS).seconds

    def choose(step_s: NDArray[np.float64]) -> object:
        return choose_nodes(nodes, step_s, num_requests=num_requests, token_rate=TOKEN_RATE, rule="equality")

    priced = price()
    outcome = Trials(parents_X == ROOT, scores_X > 0.5)
    yield "read survivals", lambda: model.read("chain", features, scores_X)
    yield "multiply along paths", lambda: along_paths(scores_X, parents_X)
    yield "price every number of nodes", price
    yield "choose", lambda: choose(priced)
    yield "budget: price and choose", lambda: choose(price())
    yield "learn survivals", lambda: model.observe("chain", features, scores_X, outcome)
    yield (
        "learn the step's cost",
        lambda: cost.observe(num_rows=num_requests, context_tokens=CONTEXT_TOKENS, seconds=0.01, num_experts=7.0),
    )
    yield from _look_ups(rng)
    yield from _compiled(rng, num_requests, nodes_each)


def _forest(rng: np.random.Generator, num_requests: int, nodes_each: int) -> tuple[NodeFeatures, NDArray[np.int32]]:
    parents: list[int] = []
    depths: list[int] = []
    for node in range(num_requests * nodes_each):
        first = node - node % nodes_each
        parent = int(rng.integers(max(first - 1, node - 6), node)) if node > first else ROOT
        parents.append(parent if parent >= first else ROOT)
        depths.append(1 if parents[-1] == ROOT else depths[parents[-1]] + 1)
    ranks = rng.integers(0, 4, len(parents)).astype(np.int32)
    return NodeFeatures(ranks, np.array(depths, dtype=np.int32), np.zeros_like(ranks)), np.array(
        parents, dtype=np.int32
    )


def _cost() -> StepCost:
    union = ExpertUnion(num_experts=8, experts_per_token=2)
    experts = np.repeat(union.expected(np.array(ROWS, dtype=np.float64))[:, None], len(CONTEXTS), axis=1)
    seconds = 0.004 + 1e-4 * np.array(ROWS)[:, None] + 1e-8 * np.outer(ROWS, CONTEXTS)
    few = np.full_like(experts, 2.0)
    return StepCost(MeasuredSteps(ROWS, CONTEXTS, seconds + 1e-4 * experts, seconds, experts, few), experts=union)


def _look_ups(rng: np.random.Generator) -> Iterator[tuple[str, Callable[[], object]]]:
    # Words of a few tokens that come again, as in text.
    words = [rng.integers(0, 4096, int(rng.integers(1, 5))).tolist() for _ in range(200)]
    tokens = [token for word in rng.zipf(1.3, TEXT_TOKENS) % len(words) for token in words[word]][:TEXT_TOKENS]
    text_T = np.array(tokens, np.int32)
    automaton, fresh, pool = SuffixAutomaton(), SuffixAutomaton(), OutputPool(max_tokens=1 << 16)
    automaton.extend(text_T)
    pool.add(0, text_T)

    def take_in() -> None:
        fresh.clear()
        fresh.extend(text_T)

    yield f"look-up: take in {TEXT_TOKENS} tokens", take_in
    yield "look-up: continuations of one request", lambda: automaton.continuations(max_tokens=8, max_continuations=4)
    yield "pool: continuations of one request", lambda: pool.look_up(0, text_T, max_tokens=8, max_continuations=4)


def _compiled(
    rng: np.random.Generator, num_requests: int, nodes_each: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    model = SurvivalModel(matching=dict.fromkeys(("lookup", "pool"), 1), scoring=dict.fromkeys(SCORING, 1))
    estimates = Estimates([model.cells(name) for name in DRAFTERS], MergedSurvival())
    merger = Merger(
        num_slots=num_requests,
        max_nodes=nodes_each,
        vocab_size=VOCAB,
        pool_tokens=0,
        greedy=estimates,
        sampled=estimates,
        rule=DEFAULT_RULE,
    )
    recycling = RecyclingDrafter(VOCAB)
    tokens = np.arange(VOCAB, dtype=np.int32)
    ids = np.array([rng.permutation(VOCAB)[:8] for _ in tokens], np.int32)
    recycling.observe(tokens, ids, np.sort(-rng.exponential(2.0, ids.shape))[:, ::-1])
    matrices = recycling.matrices_of([""])[0]
    step_s = 0.004 + 1e-4 * np.arange(num_requests * nodes_each + 1.0)
    texts_BT = rng.integers(0, VOCAB, (num_requests, 100)).astype(np.int32)

    def wanted(num_nodes: int, new_BT: NDArray[np.int32]) -> list[Wanted]:
        draw = at_position(row_bytes(seed=1, temperature=0.0), 100)
        return [
            Wanted(slot, new_ids, new_ids[-1], draw, num_nodes, 8, matrix=0, stop_ids=(0,))
            for slot, new_ids in enumerate(new_BT.tolist())
        ]

    price = Price(step_s, TOKEN_RATE, num_requests)
    merger.grow(wanted(nodes_each, texts_BT), matrices, price)
    new_BT = texts_BT[:, :2]
    yield "compiled: look up, grow, judge, choose", lambda: merger.grow(wanted(nodes_each, new_BT), matrices, price)
    yield "compiled: the same without nodes", lambda: merger.grow(wanted(0, new_BT), matrices, price)


def _median_us(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    """Time every part and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=32, help="nodes per request")
    asked = parser.parse_args()
    print(f"{asked.requests} requests x {asked.nodes} nodes, median of {REPEATS}")
    for name, run in lines(asked.requests, asked.nodes):
        print(f"{name:<40} {_median_us(run):9.1f} us")


if __name__ == "__main__":
    main()
