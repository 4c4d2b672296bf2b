"""Token Recycling beside its authors' own code, on the same small Llama checkpoints: `python -m benchmarks.recycling`.

    git clone https://github.com/Luowaterbi/TokenRecycling CHECKOUT
    python3.11 -m venv VENV && VENV/bin/pip install torch==2.13.0 && VENV/bin/pip install transformers==4.37.1
    python -m benchmarks.recycling --reference CHECKOUT --python VENV/bin/python

Both decode the same prompts greedily, one after another, with a matrix kept from prompt to prompt. Token ids are
compared as far as both go: theirs overshoots the limit and goes on behind the end of text. Tokens per call are accepted
tokens and the one behind them. Calls at both ends of an answer are left out: the first is a prompt's in ours and has no
tree, the last is cut off in ours and not in theirs. Theirs at 16 nodes has the 16 of its 80 nodes with the lowest sum
of ranks, counted from 1. At temperature 1, which theirs does not know, ours is compared with itself. Ours runs through
the engine, as served; what the target says at every verified row is taken where the decoder gives it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from benchmarks.report import Goal, Table, finish, progress
from slipstream.drafting.recycling import RecyclingDrafter, TreeShape, paper_template
from slipstream.engine.decoders import open_decoder
from slipstream.engine.engine import Engine
from slipstream.engine.plan import Move, PagedDecoder, StepOutput, StepPlan
from slipstream.engine.request import Request, SamplingParams, TokenBlock
from slipstream.engine.scheduler import EngineLimits
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.models.config import ModelConfig
from slipstream.telemetry import ReplicaMetrics
from slipstream_kernels.adjacency import WIDTH
from slipstream_kernels.logprobs import host_logprobs, top_logprobs

MODELS = ("tinystories-656k", "stories260k")
MAX_TOKENS, QUICK_MAX_TOKENS = 200, 60
_TIMEOUT_S = 900
_PEER = Path(__file__).parent / "peers" / "token_recycling.py"
_END_OF_TEXT = 2

# Openings that stop within a sentence: behind a full stop the smaller checkpoint likes to end its story.
PROMPTS = (
    "Once upon a time, there was a little girl named",
    "One day, a boy named Tim went to the",
    "The big dog was very hungry and",
    "Tom and Sara found a shiny key under",
    "There was a small bird who could not",
    "Mia had a red ball that she",
    "It was a rainy day and Ben",
    "The farmer had a cow, a pig and",
    "Grandma baked a cake for",
    "A little fish lived in a big",
    "Anna wanted to build the tallest",
    "In the forest there lived a kind",
    "Max lost his favorite toy car and",
    "The moon was bright and the stars",
    "Lucy and her brother played",
    "Once there was a king who did not",
)


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One way for ours to draft. `reads_prompts`: rows of prompts are taken over as well."""

    shape: TreeShape
    num_nodes: int
    temperature: float = 0.0
    reads_prompts: bool = False

    def name(self) -> str:
        """As a row of the table says it."""
        prompts = ", prompts too" if self.reads_prompts else ""
        return f"ours, {self.shape.replace('_', ' ')}{prompts}"


SETTINGS = (
    Setting(shape="template", num_nodes=80),
    Setting(shape="best_first", num_nodes=80),
    Setting(shape="best_first", num_nodes=32),
    Setting(shape="best_first", num_nodes=16),
    Setting(shape="best_first", num_nodes=8),
    Setting(shape="best_first", num_nodes=16, reads_prompts=True),
    Setting(shape="template", num_nodes=80, temperature=1.0),
    Setting(shape="best_first", num_nodes=80, temperature=1.0),
    Setting(shape="best_first", num_nodes=16, temperature=1.0),
)
GOALS: tuple[tuple[TreeShape, int], ...] = (("template", 80), ("best_first", 16))
PLAIN = Setting(shape="best_first", num_nodes=0)


class Decoded(msgspec.Struct, frozen=True):
    """What came out behind each prompt, and the tokens of every call but the first and last."""

    token_ids: list[list[int]]
    accepted: list[int]

    def tokens_per_call(self) -> float:
        """Mean over all calls."""
        return float(np.mean(self.accepted))


class ListeningDecoder:
    """A decoder that tells a drafter what the target says at every row that logits are wanted of."""

    def __init__(self, decoder: PagedDecoder, drafter: RecyclingDrafter, *, reads_prompts: bool) -> None:
        self.config: ModelConfig = decoder.config
        self.is_exact = decoder.is_exact
        self._decoder = decoder
        self._drafter = drafter
        self._reads_prompts = reads_prompts

    def forward(self, plan: StepPlan) -> StepOutput:
        """The decoder's, and `observe`."""
        wanted = plan.logit_rows_X
        if self._reads_prompts:
            plan = msgspec.structs.replace(plan, logit_rows_X=np.arange(len(plan.ids_T), dtype=np.int32))
        output = self._decoder.forward(plan)
        rows = range(len(plan.logit_rows_X))
        said = host_logprobs(top_logprobs(output.logits_XV, rows, [0] * len(rows), num_top=WIDTH))
        self._drafter.observe(plan.ids_T[plan.logit_rows_X], said.top_ids_GN, said.top_logprobs_GN)
        if self._reads_prompts:
            return msgspec.structs.replace(output, logits_XV=output.logits_XV[wanted])
        return output

    def keep(self, moves: Sequence[Move]) -> None:
        """The decoder's."""
        self._decoder.keep(moves)


def decode(target: Checkpoint, prompts: Sequence[Sequence[int]], setting: Setting, *, max_tokens: int) -> Decoded:
    """Decode prompts one after another through the engine, with one drafter for all."""
    drafter = RecyclingDrafter(target.config.vocab_size, shape=setting.shape)

    def listening(
        checkpoint: Checkpoint, *, num_blocks: int, num_node_slots: int, max_rows: int, device: str = "cpu"
    ) -> PagedDecoder:
        decoder = open_decoder(
            checkpoint, num_blocks=num_blocks, num_node_slots=num_node_slots, max_rows=max_rows, device=device
        )
        return ListeningDecoder(decoder, drafter, reads_prompts=setting.reads_prompts)

    engine = Engine(
        target,
        limits=EngineLimits(
            max_running_requests=1,
            max_queued_requests=1,
            max_step_tokens=512,
            max_context_tokens=target.config.max_position_embeddings,
            num_draft_tokens=setting.num_nodes,
        ),
        target_digest=target.digest,
        replica_id="benchmark",
        top_n=1,
        observe=lambda _: None,
        metrics=ReplicaMetrics(),
        decoders=listening,
    )
    engine.install_drafter(drafter)
    decoded = Decoded([], [])
    for index, prompt in enumerate(prompts):
        blocks: list[TokenBlock] = []
        engine.submit(_request(index, prompt, setting, max_tokens), blocks.append)
        while engine.step():
            pass
        decoded.token_ids.append([token for block in blocks for token in block.token_ids])
        decoded.accepted.extend(1 + block.num_accepted for block in blocks[1:-1])
    return decoded


def _request(index: int, prompt: Sequence[int], setting: Setting, max_tokens: int) -> Request:
    return Request(
        request_id=f"request-{index}",
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(
            seed=index, max_tokens=max_tokens, temperature=setting.temperature, stop_token_ids=(_END_OF_TEXT,)
        ),
        tenant="",
        domain="default",
        may_train=False,
        arrived_at=0.0,
    )


def decode_with_reference(
    interpreter: str,
    checkout: Path,
    *,
    model: Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    template: list[list[int]] | None,
) -> Decoded:
    """The same with the authors' code, in a process of its own."""
    task = {
        "checkout": str(checkout.resolve()),
        "model": str(model.resolve()),
        "prompts": prompts,
        "max_tokens": max_tokens,
        "template": template,
    }
    done = subprocess.run(
        [interpreter, str(_PEER)], input=msgspec.json.encode(task), capture_output=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        sys.exit(f"{interpreter} {_PEER} fails; it needs torch 2.13.0 and transformers 4.37.1: {done.stderr.decode()}")
    answers = msgspec.json.decode(done.stdout)
    return Decoded(
        [answer["token_ids"] for answer in answers],
        [number for answer in answers for number in answer["accepted"][1:-1]],
    )


def lowest_ranks(num_nodes: int) -> list[list[int]]:
    """The nodes of the paper's tree with the lowest sums of ranks counted from 1, as rank paths, breadth first."""
    paths: list[list[int]] = []
    for parent, rank in zip(*(column.tolist() for column in paper_template()[:2]), strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), rank])
    chosen = sorted(paths, key=lambda path: (sum(path) + len(path), path))[:num_nodes]
    return [path for path in paths if path in chosen]


def num_differing(one: Decoded, other: Decoded) -> int:
    """Prompts whose tokens differ within the common length."""
    pairs = zip(one.token_ids, other.token_ids, strict=True)
    return sum(any(a != b for a, b in zip(first, second, strict=False)) for first, second in pairs)


Row = tuple[str, str, str, str, str, str]


def compare(
    model: Path, arguments: argparse.Namespace, *, max_tokens: int
) -> tuple[Table, dict[str, float], list[Goal]]:
    """One checkpoint: the table, the figures, and the goals."""
    name, target = model.name, load_checkpoint(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    plain = {
        temperature: decode(
            target, prompts, msgspec.structs.replace(PLAIN, temperature=temperature), max_tokens=max_tokens
        )
        for temperature in (0.0, 1.0)
    }
    theirs = {
        num_nodes: decode_with_reference(
            arguments.python,
            arguments.reference,
            model=model,
            prompts=prompts,
            max_tokens=max_tokens,
            template=template,
        )
        for num_nodes, template in ((80, None), (16, lowest_ranks(16)))
    }
    ours = {}
    for setting in SETTINGS:
        ours[setting] = decode(target, prompts, setting, max_tokens=max_tokens)
        progress(f"{name}: {setting.name()}, {setting.num_nodes} nodes: {ours[setting].tokens_per_call():.3f}")
    rows: list[Row] = [_row(name, "theirs", nodes, decoded, plain[0.0]) for nodes, decoded in theirs.items()]
    rows += [
        _row(name, one.name(), one.num_nodes, decoded, plain[one.temperature], temperature=one.temperature)
        for one, decoded in ours.items()
    ]
    columns = ("model", "drafter", "nodes", "temperature", "tokens per call", "prompts that differ from plain")
    figures = {f"{row[0]} {row[1]} {row[2]} T={row[3]}": float(row[4]) for row in rows}
    return Table(columns=columns, rows=tuple(rows)), figures, _goals(name, rows, theirs, ours)


def _row(
    model: str, drafter: str, num_nodes: int, decoded: Decoded, plain: Decoded, *, temperature: float = 0.0
) -> Row:
    rate, num_different = decoded.tokens_per_call(), num_differing(decoded, plain)
    return model, drafter, str(num_nodes), f"{temperature:g}", f"{rate:.3f}", str(num_different)


def _goals(name: str, rows: Sequence[Row], theirs: dict[int, Decoded], ours: dict[Setting, Decoded]) -> list[Goal]:
    """No other tokens; like for like the fixed tree of 80, and with few nodes, where it matters which, best first."""
    return [
        Goal(figure=f"{name}: prompts whose tokens differ", value=sum(int(row[5]) for row in rows), at_most=0),
        *(
            Goal(
                figure=f"{name}: tokens per call, {shape.replace('_', ' ')} at {num_nodes} nodes",
                value=ours[Setting(shape=shape, num_nodes=num_nodes)].tokens_per_call(),
                at_least=theirs[num_nodes].tokens_per_call(),
            )
            for shape, num_nodes in GOALS
        ),
    ]


def main() -> int:
    """Compare on every checkpoint that is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recycling", description=__doc__)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of the authors' repository")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with transformers 4.37.1")
    parser.add_argument("--models", type=Path, default=Path("../shared/models"), help="where the checkpoints are")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MAX_TOKENS} tokens a prompt")
    arguments = parser.parse_args()
    missing = [name for name in MODELS if not (arguments.models / name).is_dir()]
    if missing or not arguments.reference.is_dir():
        print(f"skipped: no {', '.join(missing) or arguments.reference}; see --models and --reference")
        return 0
    max_tokens = QUICK_MAX_TOKENS if arguments.quick else MAX_TOKENS
    tables: list[Table] = []
    figures: dict[str, float] = {}
    goals: list[Goal] = []
    for name in MODELS:
        table, some_figures, some_goals = compare(arguments.models / name, arguments, max_tokens=max_tokens)
        tables.append(table)
        figures |= some_figures
        goals += some_goals
    return finish("recycling", tables=tables, figures=figures, goals=goals)


if __name__ == "__main__":
    sys.exit(main())
