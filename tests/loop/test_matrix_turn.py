"""One whole turn for a Token Recycling matrix: observed, registered, judged, promoted, and a replica starts warm."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slipstream.acceptance import AcceptanceCounts, acceptance_length, count
from slipstream.drafting.merge import DraftingOptions
from slipstream.engine.engine import Engine
from slipstream.engine.request import Request, SamplingParams
from slipstream.engine.runner import EngineRunner
from slipstream.engine.scheduler import EngineLimits
from slipstream.engine.served import ServedMatrix
from slipstream.engine.swap import PointerFollower
from slipstream.learning.distiller import Curriculum, Distiller
from slipstream.learning.evaluator import Evaluator
from slipstream.learning.judge import Exam
from slipstream.learning.replay import ReplayBuffer
from slipstream.loop import questions, tokenize
from slipstream.models.checkpoint import Checkpoint, load_checkpoint, target_digest
from slipstream.promoter import Promoter
from slipstream.promotion import PromotionGate
from slipstream.records import Observation, encode
from slipstream.stores.memory import MemoryLog, MemoryPointers, MemoryRegistry
from slipstream.telemetry import ReplicaMetrics, WorkerMetrics
from slipstream.versions import DRAFT, MATRIX
from tests.servers import eventually
from workers.distiller.worker import DistillerWorker
from workers.evaluator.worker import EvaluatorWorker

TARGET = Path(__file__).parents[2] / "deploy" / "models" / "mix-moe-11m"
NUM_DRAFT_TOKENS = 4

pytestmark = pytest.mark.usefixtures("exact_kernels")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for worker in ("distiller", "evaluator"):
        monkeypatch.setattr(f"workers.{worker}.worker._POLL_S", 0.01)


class Replica:
    """An engine on its thread that drafts with Token Recycling alone, from an empty matrix, and its follower."""

    def __init__(self, target: Checkpoint, digest: str, pointers: MemoryPointers, state: Path) -> None:
        self.observed: list[Observation] = []
        metrics = ReplicaMetrics()
        self.runner = EngineRunner(
            Engine(
                target,
                limits=EngineLimits(
                    max_running_requests=32,
                    max_queued_requests=128,
                    max_step_tokens=512,
                    max_context_tokens=1024,
                    num_draft_tokens=NUM_DRAFT_TOKENS,
                ),
                target_digest=digest,
                replica_id="replica",
                top_n=16,
                observe=self.observed.append,
                metrics=metrics,
                drafting=DraftingOptions(sources=("recycling",), fixed_nodes=NUM_DRAFT_TOKENS),
            )
        )
        self.follower = PointerFollower(
            pointers,
            ServedMatrix(self.runner),
            target_digest=digest,
            replica_id="replica",
            artifact_root=state / "artifacts",
            cache_dir=state / "cache",
            poll_s=0.05,
            metrics=metrics,
        )

    def __enter__(self) -> Replica:
        self.runner.start()
        self.follower.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.follower.stop(10)
        self.runner.stop(10)

    def answer(self, prompts: list[tuple[int, ...]]) -> AcceptanceCounts:
        """Serve all prompts at once; what this took."""
        self.observed.clear()
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
            self.runner.submit(request, lambda block: None)
        eventually(lambda: len(self.observed) == len(prompts), timeout_s=60)
        return count(one for observation in self.observed for one in observation.rounds)


def until_idle(turn: Callable[[], bool]) -> None:
    num_idle = 0
    while num_idle < 2:
        num_idle = 0 if turn() else num_idle + 1


def distil(log: MemoryLog, registry: MemoryRegistry, pointers: MemoryPointers, state: Path, vocab_size: int) -> None:
    """Everything that the log holds becomes versions: here one draft, of no use, and one matrix."""
    curriculum = Curriculum(
        target_digest=target_digest(TARGET),
        vocab_size=vocab_size,
        observations_per_version=50,
        steps_per_version=1,
        batch_sequences=1,
        learning_rate=1e-3,
        replay_ratio=0.5,
        keep_versions=5,
    )
    metrics = WorkerMetrics()
    distiller = Distiller(
        registry,
        pointers,
        ReplayBuffer(state / "replay", max_per_domain=512),
        curriculum=curriculum,
        state_dir=state / "distiller",
        artifact_root=state / "artifacts",
        metrics=metrics,
    )
    until_idle(DistillerWorker(distiller, log, pointers, metrics=metrics, max_poll=50).turn)


def judge(log: MemoryLog, registry: MemoryRegistry, pointers: MemoryPointers, state: Path, vocab_size: int) -> None:
    """A report on the challenger of every place."""
    exam = Exam(
        target_digest=target_digest(TARGET), vocab_size=vocab_size, num_draft_tokens=NUM_DRAFT_TOKENS, num_recent=48
    )
    metrics = WorkerMetrics()
    evaluator = Evaluator(
        registry,
        pointers,
        ReplayBuffer(state / "held-out", max_per_domain=512),
        exam=exam,
        artifact_root=state / "artifacts",
        metrics=metrics,
    )
    until_idle(EvaluatorWorker(evaluator, log, pointers, metrics=metrics).turn)


def promoter(registry: MemoryRegistry, pointers: MemoryPointers) -> Promoter:
    return Promoter(
        pointers,
        registry,
        gate=PromotionGate(),
        target_digest=target_digest(TARGET),
        metrics=WorkerMetrics(),
        place=MATRIX,
    )


def test_what_replicas_observed_lets_the_next_replica_start_warm(tmp_path: Path) -> None:
    target, digest = load_checkpoint(TARGET), target_digest(TARGET)
    log, registry, pointers = MemoryLog(), MemoryRegistry(tmp_path / "artifacts"), MemoryPointers()
    with Replica(target, digest, pointers, tmp_path) as first:
        first.answer(tokenize(TARGET, questions(72, seed=0)))
        log.append([(one.request_id, encode(one)) for one in first.observed])

    distil(log, registry, pointers, tmp_path, target.config.vocab_size)
    version = registry.get(*MATRIX, 1)
    assert version.lineage.offsets == registry.get(*DRAFT, 1).lineage.offsets
    judge(log, registry, pointers, tmp_path, target.config.vocab_size)
    decision = promoter(registry, pointers).turn()
    assert decision is not None
    assert (decision.role, decision.verdict) == ("recycling", "promote")

    others = tokenize(TARGET, questions(4, seed=1))
    with Replica(target, digest, MemoryPointers(), tmp_path / "elsewhere") as cold:
        before = cold.answer(others)
        outputs = {one.request_id: one.output_ids for one in cold.observed}
    with Replica(target, digest, pointers, tmp_path) as warm:
        eventually(lambda: [one.digest for one in pointers.acknowledgements(*MATRIX)] == [version.digest], timeout_s=60)
        after = warm.answer(others)
        assert {one.request_id: one.output_ids for one in warm.observed} == outputs
    assert acceptance_length(after) > acceptance_length(before) + 0.2
