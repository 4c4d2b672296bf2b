"""Drafts adapted to a target, for the benchmark of drafting: `python -m benchmarks.adapt [--quick]`.

The target answers training prompts, half of them greedily and half at temperature 1; a draft is distilled on the
log-probabilities kept of those answers, as the distiller does from serving traffic, but patiently: the learning rate
falls by a cosine. Widened copies of a target say the same up to rounding, so one draft serves them all.

Measured before and after, on held-out prompts and the target's own answers to them: the share of tokens that the draft,
behind the same text, would have proposed; greedily, and at temperature 1 with the request's own noise. Answers that end
in a loop are left out everywhere. Drafts are kept under `results/models`, named by a digest of what made them.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor

import slipstream_kernels
from benchmarks.drafting_figures import is_loop
from benchmarks.drafting_prompts import MAX_TOKENS, Prompt, held_out_prompts, training_prompts
from benchmarks.engine_sizes import PLACES, QUERIES
from benchmarks.reference.corpus import CONTEXT_TOKENS, END
from benchmarks.report import RESULTS, Goal, Table, finish, progress
from slipstream.engine.engine import Engine
from slipstream.engine.request import Request, SamplingParams
from slipstream.engine.sampling import draft_tokens
from slipstream.engine.scheduler import EngineLimits
from slipstream.learning.distillation import Student, make_batch
from slipstream.models.checkpoint import Checkpoint, checkpoint_digest, load_checkpoint
from slipstream.models.decoder import causal_logits
from slipstream.records import Observation, decode_observation, encode, unpack_ids
from slipstream.telemetry import ReplicaMetrics

BATCH_REQUESTS = 32
TOP_N = 16
HELD_OUT_PROMPTS = 200
SMALLEST_RATE_RATIO = 0.02
_POOL_BATCHES = 16
_ANSWERS_A_LINE = 500
GREEDY_GOAL = 0.65


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a draft: whose answers, which checkpoint it starts from, and how long it learns.

    Of the start only `layers` are kept, if any are named: every layer takes its time in every drafted token. A step
    takes about `batch_tokens` tokens, prompts and padding included.
    """

    target: str
    start: str
    layers: tuple[int, ...] = ()
    answers_per_domain: int = 1200
    num_steps: int = 500
    batch_tokens: int = 2048
    learning_rate: float = 1e-3
    seed: int = 1


def _pruned(target: str, layers: tuple[int, ...]) -> Recipe:
    """Some of the target's own layers, trained to say together what all of them do."""
    return Recipe(target=target, start=target, layers=layers, answers_per_domain=4000, num_steps=1500)


RECIPES = (
    _pruned("mix-moe-11m", layers=(0, 1, 3)),
    _pruned("mix-dense-6m", layers=(0, 3, 5)),
    Recipe(target="mix-moe-11m", start="draft-2m-sibling"),
    Recipe(target="mix-dense-6m", start="draft-2m-sibling"),
)
BEST = {recipe.target: recipe for recipe in RECIPES[:2]}
"""By target, the draft that the benchmark of drafting uses."""

QUICK = Recipe(target="mix-moe-11m", start="draft-2m-sibling", answers_per_domain=24, num_steps=6)


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Share of matched tokens by temperature and domain; the domain "all" weighs every token alike."""

    greedy: dict[str, float]
    sampled: dict[str, float]


class Adapted(msgspec.Struct, frozen=True, kw_only=True):
    """A draft on disk and what it was measured to do; the file of this beside its weights is `adapted.json`."""

    recipe: Recipe
    target_digest: str
    start_digest: str
    before: Rates
    after: Rates
    num_answer_tokens: int
    training_s: float


def place(name: str) -> Path | None:
    """Where a trained model lies; None if it is not on this machine."""
    return next((directory / name for directory in PLACES if (directory / name / "config.json").is_file()), None)


def adapted_draft(recipe: Recipe) -> tuple[Path, Adapted]:
    """The draft that this recipe makes: what lies under `results/models`, or made now: a quarter of an hour of a core.

    Raises FileNotFoundError if one of its models or the query sets are not on this machine.
    """
    target_at, start_at = place(recipe.target), place(recipe.start)
    if target_at is None or start_at is None or not QUERIES.is_dir():
        missing = [recipe.target] * (target_at is None) + [recipe.start] * (start_at is None)
        raise FileNotFoundError(f"no {', '.join(missing) or QUERIES} on this machine; drafts are adapted with it")
    target, start = load_checkpoint(target_at), with_layers(load_checkpoint(start_at), recipe.layers)
    made_of = (msgspec.json.encode(recipe), target.digest.encode(), start.digest.encode())
    digest = hashlib.sha256(b"\n".join(made_of)).hexdigest()[:12]
    directory = RESULTS / "models" / f"adapted-{recipe.target}-from-{recipe.start}-{digest}"
    if not (directory / "adapted.json").exists():
        tokenizer = Tokenizer.from_file(str(target_at / "tokenizer.json"))
        _make(recipe, directory, target=target, start=start, tokenizer=tokenizer)
    return directory, msgspec.json.decode((directory / "adapted.json").read_bytes(), type=Adapted)


def with_layers(checkpoint: Checkpoint, layers: Sequence[int]) -> Checkpoint:
    """Only these layers of a checkpoint, in this order; all of them if none are named."""
    if not layers:
        return checkpoint
    config = msgspec.structs.replace(checkpoint.config, num_layers=len(layers))
    weights: dict[str, Tensor] = {}
    for name, tensor in checkpoint.weights.items():
        parts = name.split(".", 3)
        if parts[1] == "layers":
            if int(parts[2]) not in layers:
                continue
            parts[2] = str(layers.index(int(parts[2])))
        weights[".".join(parts)] = tensor
    return Checkpoint(config, weights, checkpoint_digest(config, weights))


def _make(recipe: Recipe, directory: Path, *, target: Checkpoint, start: Checkpoint, tokenizer: Tokenizer) -> None:
    training, held_out = _answers_of(recipe, target, tokenizer)
    before = rates(start, held_out)
    progress(f"{directory.name}: before {_line(before)}")
    began = time.process_time()
    student = train(start, training, recipe)
    training_s = time.process_time() - began
    directory.mkdir(parents=True, exist_ok=True)
    student.snapshot(directory)
    after = rates(load_checkpoint(directory), held_out)
    progress(f"{directory.name}: after {_line(after)}; {training_s:.0f} s of one core")
    made = Adapted(
        recipe=recipe,
        target_digest=target.digest,
        start_digest=start.digest,
        before=before,
        after=after,
        num_answer_tokens=sum(len(one.output_ids) // 4 for one in training),
        training_s=training_s,
    )
    (directory / "adapted.json").write_bytes(msgspec.json.format(msgspec.json.encode(made)))


def _answers_of(
    recipe: Recipe, target: Checkpoint, tokenizer: Tokenizer
) -> tuple[list[Observation], list[Observation]]:
    """The target's answers to training prompts and to held-out ones, loops left out; kept for the next draft."""
    name = f"adapted-answers-{recipe.target}-{recipe.answers_per_domain}-{recipe.seed}-{target.digest[-8:]}.msgpack"
    path = RESULTS / "models" / name
    if not path.exists():
        prompts = training_prompts(QUERIES, tokenizer, per_domain=recipe.answers_per_domain, seed=recipe.seed)
        half = len(prompts) // 2
        parts = [answers(target, prompts[:half], temperature=0.0), answers(target, prompts[half:], temperature=1.0)]
        held = held_out_prompts(QUERIES, tokenizer, seed=recipe.seed)[:HELD_OUT_PROMPTS]
        parts += [answers(target, held, temperature=temperature) for temperature in (0.0, 1.0)]
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = [[encode(one) for one in _without_loops(part)] for part in (parts[0] + parts[1], parts[2] + parts[3])]
        path.write_bytes(msgspec.msgpack.encode(encoded))
    training, held_out = msgspec.msgpack.decode(path.read_bytes(), type=list[list[bytes]])
    return [decode_observation(one) for one in training], [decode_observation(one) for one in held_out]


def answers(target: Checkpoint, prompts: Sequence[Prompt], *, temperature: float) -> list[Observation]:
    """What the target answers, decoded plainly BATCH_REQUESTS at a time; the seed of a prompt is its place."""
    observations: list[Observation] = []

    def keep(one: Observation) -> None:
        observations.append(one)
        if len(observations) % _ANSWERS_A_LINE == 0:
            progress(f"  answer {len(observations)} of {len(prompts)} at temperature {temperature:g}")

    engine = Engine(
        target,
        limits=EngineLimits(
            max_running_requests=BATCH_REQUESTS,
            max_queued_requests=len(prompts),
            max_step_tokens=512,
            max_context_tokens=CONTEXT_TOKENS,
            num_draft_tokens=0,
            reuses_prefixes=False,
        ),
        target_digest=target.digest,
        replica_id="adapt",
        top_n=TOP_N,
        observe=keep,
        metrics=ReplicaMetrics(),
    )
    for index, prompt in enumerate(prompts):
        engine.submit(_request(index, prompt, temperature), lambda block: None)
    while engine.step():
        pass
    return observations


def _request(index: int, prompt: Prompt, temperature: float) -> Request:
    return Request(
        request_id=prompt.id,
        prompt_ids=prompt.token_ids,
        sampling=SamplingParams(seed=index, max_tokens=MAX_TOKENS, temperature=temperature, stop_token_ids=(END,)),
        tenant="",
        domain=prompt.domain,
        may_train=True,
        arrived_at=0.0,
    )


def _without_loops(observations: Sequence[Observation]) -> list[Observation]:
    return [one for one in observations if not is_loop([i for i in unpack_ids(one.output_ids).tolist() if i != END])]


def train(start: Checkpoint, observations: Sequence[Observation], recipe: Recipe) -> Student:
    """A student that has taken all steps of the recipe, from this checkpoint."""
    student = Student(start.config, start.weights, learning_rate=recipe.learning_rate)
    batches = _batches(observations, batch_tokens=recipe.batch_tokens, seed=recipe.seed)
    losses: list[float] = []
    for step in range(recipe.num_steps):
        share = (1 + math.cos(math.pi * step / recipe.num_steps)) / 2
        student.learning_rate = recipe.learning_rate * max(SMALLEST_RATE_RATIO, share)
        losses.append(student.train_step(make_batch(next(batches))))
        if (step + 1) % 50 == 0:
            progress(f"  step {step + 1} of {recipe.num_steps}: {sum(losses[-50:]) / 50:.3f} nats a token")
    return student


def _batches(observations: Sequence[Observation], *, batch_tokens: int, seed: int) -> Iterator[list[Observation]]:
    """Epoch after epoch, answers of similar length together, so that little is padding."""
    chance = random.Random(seed)
    lengths = {id(one): (len(one.prompt_ids) + len(one.output_ids)) // 4 for one in observations}
    while True:
        order = chance.sample(observations, len(observations))
        mean_tokens = max(1, sum(lengths.values()) // len(observations))
        pool = _POOL_BATCHES * max(1, batch_tokens // mean_tokens)
        for first in range(0, len(order), pool):
            batches: list[list[Observation]] = [[]]
            for one in sorted(order[first : first + pool], key=lambda one: lengths[id(one)]):
                if batches[-1] and (len(batches[-1]) + 1) * lengths[id(one)] > batch_tokens:
                    batches.append([])
                batches[-1].append(one)
            chance.shuffle(batches)
            yield from batches


def rates(draft: Checkpoint, observations: Sequence[Observation]) -> Rates:
    """How often the draft proposes the token that the target went on with, behind the same text."""
    matches: dict[tuple[bool, str], list[bool]] = {}
    for one in observations:
        found = _matches(draft, one)
        for domain in (one.domain, "all"):
            matches.setdefault((one.sampling.temperature == 0, domain), []).extend(found)
    shares = {key: sum(found) / len(found) for key, found in matches.items()}
    return Rates(
        greedy={domain: share for (is_greedy, domain), share in sorted(shares.items()) if is_greedy},
        sampled={domain: share for (is_greedy, domain), share in sorted(shares.items()) if not is_greedy},
    )


@torch.no_grad()
def _matches(draft: Checkpoint, one: Observation) -> list[bool]:
    """At each token of an answer, whether the draft proposes it with the request's own noise."""
    prompt, output = unpack_ids(one.prompt_ids).tolist(), unpack_ids(one.output_ids).tolist()
    weights = {name: tensor.float() for name, tensor in draft.weights.items()}
    logits_TV = causal_logits(draft.config, weights, torch.tensor([prompt + output[:-1]]))[0, len(prompt) - 1 :]
    positions = range(one.first_position, one.first_position + len(output))
    proposed = draft_tokens(logits_TV, [one.sampling] * len(output), positions).tolist()
    return [mine == theirs for mine, theirs in zip(proposed, output, strict=True)]


def _line(measured: Rates) -> str:
    parts = (("greedy", measured.greedy), ("sampled", measured.sampled))
    return "; ".join(
        f"{name} " + ", ".join(f"{domain} {share:.3f}" for domain, share in shares.items()) for name, shares in parts
    )


def table_of(made: Sequence[Adapted]) -> Table:
    """A row for each draft, temperature and domain."""
    rows = [
        (one.recipe.target, one.recipe.start, temperature, domain, f"{before[domain]:.3f}", f"{after[domain]:.3f}")
        for one in made
        for temperature, before, after in (
            ("0", one.before.greedy, one.after.greedy),
            ("1", one.before.sampled, one.after.sampled),
        )
        for domain in after
    ]
    return Table(
        columns=("target", "draft started from", "temperature", "domain", "matched before", "matched after"),
        rows=tuple(rows),
        caption="Share of the target's own held-out tokens that the draft proposes.",
    )


def main() -> int:
    """Make every draft that is not there yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one draft of a few steps, which shows that it runs")
    parser.add_argument("--only", metavar="TARGET<START", help="one recipe, as in mix-moe-11m<mix-dense-6m")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if slipstream_kernels.is_available():
        slipstream_kernels.set_num_threads(1)
    recipes = (QUICK,) if arguments.quick else RECIPES
    chosen = [one for one in recipes if arguments.only in (None, f"{one.target}<{one.start}")]
    try:
        made = [adapted_draft(recipe)[1] for recipe in chosen]
    except FileNotFoundError as error:
        progress(f"skipped: {error}")
        return 0
    figures = {f"{one.recipe.target} from {one.recipe.start}": one.after.greedy["all"] for one in made}
    bars = [] if arguments.quick else [(one, GREEDY_GOAL) for one in made if one.recipe in BEST.values()]
    goals = [
        Goal(
            figure=f"greedy tokens matched, {one.recipe.target} from {one.recipe.start}",
            value=one.after.greedy["all"],
            at_least=bar,
        )
        for one, bar in bars
    ]
    return finish("adapt", tables=[table_of(made)], figures=figures, goals=goals)


if __name__ == "__main__":
    sys.exit(main())
