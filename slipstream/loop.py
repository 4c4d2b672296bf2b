"""One whole turn of the loop, in memory: read this file first.

Serving and learning run as separate processes and meet only in three stores (`docs/loop.md`). Here one function walks
through them in order, with the in-memory stores and the functions that the processes call. `python -m slipstream.loop
TARGET_DIRECTORY` runs it: a draft is born from some answers, and the next answers need fewer passes of the target.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from slipstream.acceptance import AcceptanceCounts, acceptance_length, acceptance_rate, count
from slipstream.engine.artifact import fetch, load_verified
from slipstream.engine.engine import Engine
from slipstream.engine.request import Request, SamplingParams
from slipstream.engine.scheduler import EngineLimits
from slipstream.learning.distillation import Student, make_batch
from slipstream.learning.replay import Kept, ReplayBuffer
from slipstream.learning.shadow import ComparedVersions, compare, score
from slipstream.models.checkpoint import load_checkpoint, target_digest
from slipstream.models.decoder import initial_draft
from slipstream.promotion import PromotionDecision, PromotionGate, decide
from slipstream.records import Observation, decode_observation, encode, is_held_out
from slipstream.stores.memory import MemoryLog, MemoryPointers, MemoryRegistry
from slipstream.stores.protocols import LogEntry
from slipstream.telemetry import ReplicaMetrics
from slipstream.versions import DEFAULT_DOMAIN, Lineage, OffsetRange, ServingPointer

NUM_DRAFT_TOKENS = 4
NUM_STEPS = 120
BATCH_SEQUENCES = 8


class Turn(msgspec.Struct, frozen=True):
    """A turn's outcome: acceptance before and after it, what the gate said, and where the pointer stands."""

    before: AcceptanceCounts
    after: AcceptanceCounts
    decision: PromotionDecision
    pointer: ServingPointer | None


def turn(target_directory: Path, questions: Iterable[str], state: Path) -> Turn:
    """Answer `questions` twice, learning in between; `state` is an empty directory for artifacts and replay."""
    target, digest = load_checkpoint(target_directory), target_digest(target_directory)
    prompts = tokenize(target_directory, questions)
    log, registry, pointers = MemoryLog(), MemoryRegistry(state / "artifacts"), MemoryPointers()
    observed: list[Observation] = []
    engine = Engine(
        target,
        limits=EngineLimits(
            max_running_requests=32,
            max_queued_requests=len(prompts),
            max_step_tokens=512,
            max_context_tokens=1024,
            num_draft_tokens=NUM_DRAFT_TOKENS,
        ),
        target_digest=digest,
        replica_id="replica",
        top_n=16,
        observe=observed.append,
        metrics=ReplicaMetrics(),
    )

    # Serving: answer, and put what was seen into the log.
    before = answer(engine, prompts, observed)
    log.append([(one.request_id, encode(one)) for one in observed])

    # The distiller: read, keep what may be trained on, fit a student, register it, only then commit.
    subscription = log.subscribe("distiller")
    entries = subscription.poll(max_records=len(observed), timeout_s=1.0)
    replay = ReplayBuffer(state / "replay", max_per_domain=512)
    for entry in entries:
        observation = decode_observation(entry.record)
        if not is_held_out(observation.request_id):
            replay.append(Kept(entry.partition, entry.offset, observation))
    replay.flush()
    student = fit(replay, target.config.vocab_size)
    student_digest = student.snapshot(state / "student")
    lineage = Lineage(target_digest=digest, offsets=ranges(entries), num_observations=len(replay))
    version = registry.register("draft", DEFAULT_DOMAIN, state / "student", digest=student_digest, lineage=lineage)
    registry.set_alias("draft", DEFAULT_DOMAIN, "challenger", version.version)
    subscription.commit({one.partition: one.end for one in lineage.offsets})

    # The evaluator: replay challenger and champion (here: no draft) on requests that nobody trained on.
    held_out = [one for one in observed if is_held_out(one.request_id)]
    challenger = load_checkpoint(state / "student")
    report = compare(
        [score(challenger, one, num_draft_tokens=NUM_DRAFT_TOKENS) for one in held_out],
        [score(None, one, num_draft_tokens=NUM_DRAFT_TOKENS) for one in held_out],
        of=ComparedVersions(domain=DEFAULT_DOMAIN, challenger_version=version.version, look=1),
        num_recent=len(held_out),
        at=time.time(),
    )
    registry.record_report(report)

    # The promoter: let the gate decide; the pointer moves first, the registry's alias follows.
    decision = decide(PromotionGate(), report, at=time.time())
    pointers.record_decision(decision)
    if decision.verdict == "promote":
        pointer = ServingPointer(
            role="draft",
            domain=DEFAULT_DOMAIN,
            version=version.version,
            artifact_uri=version.artifact_uri,
            digest=version.digest,
            target_digest=digest,
            generation=1,
            fencing_token=pointers.issue_fencing_token(),
            reason=decision.reason,
            set_at=time.time(),
        )
        pointers.advance(pointer, expected_generation=0)
        registry.set_alias("draft", DEFAULT_DOMAIN, "champion", version.version)

    # The replica: follow the pointer, trust only digests, switch between two steps, and answer again.
    current = pointers.read("draft", DEFAULT_DOMAIN)
    if current is not None:
        directory = fetch(current, artifact_root=state / "artifacts", into=state / "cache")
        engine.install_draft(load_verified(directory, digest=current.digest), version=current.version)
    return Turn(before, answer(engine, prompts, observed), decision, current)


def tokenize(target_directory: Path, questions: Iterable[str]) -> list[tuple[int, ...]]:
    """Token ids of the questions in the reference target's prompt format."""
    tokenizer = Tokenizer.from_file(str(target_directory / "tokenizer.json"))
    return [tuple(tokenizer.encode(f"<|user|>{question}<|assistant|>").ids) for question in questions]


def answer(engine: Engine, prompts: Iterable[tuple[int, ...]], observed: list[Observation]) -> AcceptanceCounts:
    """Serve all prompts in one batch; `observed` is emptied and then holds what the engine saw."""
    observed.clear()
    for index, prompt in enumerate(prompts):
        request = Request(
            request_id=f"question-{index}",
            prompt_ids=prompt,
            sampling=SamplingParams(seed=index, max_tokens=32, temperature=0.0, stop_token_ids=(0,)),
            tenant="anonymous",
            domain="math",
            may_train=True,
            arrived_at=time.monotonic(),
        )
        engine.submit(request, lambda block: None)
    while engine.step():
        pass
    return count(one for observation in observed for one in observation.rounds)


def fit(replay: ReplayBuffer, vocab_size: int) -> Student:
    """A fresh student after NUM_STEPS steps on the buffer."""
    student = Student(*initial_draft(vocab_size, seed=0), learning_rate=2e-3)
    chance = random.Random(0)
    for _ in range(NUM_STEPS):
        batch: list[Observation] = replay.sample(
            BATCH_SEQUENCES, num_fresh=len(replay), replay_ratio=0.0, chance=chance
        )
        student.train_step(make_batch(batch))
    return student


def ranges(entries: Iterable[LogEntry]) -> tuple[OffsetRange, ...]:
    """The offset range per partition that these entries span."""
    offsets: dict[int, list[int]] = {}
    for entry in entries:
        offsets.setdefault(entry.partition, []).append(entry.offset)
    return tuple(OffsetRange(partition, min(some), max(some) + 1) for partition, some in sorted(offsets.items()))


def questions(number: int, *, seed: int) -> list[str]:
    """Small sums in words, the kind of question the reference target was trained on."""
    chance = random.Random(seed)
    names, things = ("Tom", "Mia", "Sam", "Ana", "Leo"), ("apples", "books", "coins", "cards")
    return [
        f"{chance.choice(names)} has {chance.randint(2, 60)} {chance.choice(things)} and buys {chance.randint(2, 60)} "
        f"more every day for {chance.randint(2, 9)} days. How many are there in the end?"
        for _ in range(number)
    ]


def main() -> None:
    """Run one turn and say what it brought."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m slipstream.loop TARGET_DIRECTORY")
    with tempfile.TemporaryDirectory() as state:
        result = turn(Path(sys.argv[1]), questions(80, seed=0), Path(state))
    for name, counts in (("before", result.before), ("after", result.after)):
        print(f"{name}: {acceptance_length(counts):.2f} tokens a pass, acceptance rate {acceptance_rate(counts):.2f}")
    print(f"gate: {result.decision.verdict}, {result.decision.reason}")


if __name__ == "__main__":
    main()
