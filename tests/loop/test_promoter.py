"""The promoter and rollback: the pointer moves first and only forward, and an operator always wins."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer

from deploy.local.queries import builtin_streams
from slipstream.engine.engine import Engine
from slipstream.engine.request import Request, SamplingParams
from slipstream.engine.scheduler import EngineLimits
from slipstream.errors import ConfigError, PromotionFrozen, StoreUnavailable, UnknownVersion
from slipstream.learning.shadow import ComparedVersions, compare, score
from slipstream.models.checkpoint import Checkpoint, checkpoint_digest, load_checkpoint, save_checkpoint
from slipstream.models.decoder import initial_draft
from slipstream.promoter import Fence, Promoter, initial_draft_dir, seed, served_version
from slipstream.promotion import DomainComparison, EvaluationReport, PromotionGate, decide
from slipstream.records import Observation
from slipstream.rollback import rollback
from slipstream.stores.memory import MemoryPointers, MemoryRegistry
from slipstream.stores.protocols import PointerStore
from slipstream.stores.redis import RedisPointers
from slipstream.telemetry import ReplicaMetrics, WorkerMetrics
from slipstream.versions import DEFAULT_DOMAIN, DRAFT, MATRIX, Acknowledgement, Lineage, ModelVersion, Place
from tests.observed import TARGET_DIGEST, VOCAB_SIZE
from tests.servers import ValkeyServer

SQL = Place("draft", "sql")
MODELS = Path(__file__).parents[2] / "deploy" / "models"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["memory", "redis"])
def pointers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PointerStore]:
    if request.param == "memory":
        yield MemoryPointers()
        return
    server: ValkeyServer = request.getfixturevalue("valkey")
    store = RedisPointers(server.url, namespace=f"promoter-{abs(hash(str(tmp_path)))}")
    yield store
    store.close()


class Stage:
    """A registry with drafts, and a promoter."""

    def __init__(self, root: Path, pointers: PointerStore) -> None:
        self.root = root
        self.registry = MemoryRegistry(root / "artifacts")
        self.pointers = pointers
        self.metrics = WorkerMetrics()
        self.promoter = self.start()

    def start(self, *, registry: Any = None, place: Place = DRAFT, fence: Fence | None = None) -> Promoter:
        return Promoter(
            self.pointers,
            registry or self.registry,
            gate=PromotionGate(),
            target_digest=TARGET_DIGEST,
            metrics=self.metrics,
            place=place,
            fence=fence,
        )

    def add(
        self, *, gain: float | None, look: int = 1, target_digest: str = TARGET_DIGEST, place: Place = DRAFT
    ) -> ModelVersion:
        """A new challenger, reported to gain about `gain` tokens a pass (None: not reported)."""
        number = len(self.registry.versions(*place)) + 1
        directory = self.root / f"staged-{'-'.join(place)}-{number}"
        digest = save_checkpoint(directory, *initial_draft(VOCAB_SIZE, seed=number))
        version = self.registry.register(
            *place, directory, digest=digest, lineage=Lineage(target_digest=target_digest, parent_version=number - 1)
        )
        self.registry.set_alias(*place, "challenger", version.version)
        if gain is not None:
            self.report(version.version, gain=gain, look=look, place=place)
        return version

    def report(self, number: int, *, gain: float, look: int = 1, place: Place = DRAFT) -> None:
        champion = served_version(self.pointers.read(*place), TARGET_DIGEST)
        differences = tuple(gain + 0.01 * (index % 3 - 1) for index in range(20))
        domain = DomainComparison(
            domain="math",
            differences=differences,
            challenger_acceptance_length=2.0,
            champion_acceptance_length=2.0 - gain,
            challenger_acceptance_rate=0.5,
            champion_acceptance_rate=0.4,
        )
        self.registry.record_report(
            EvaluationReport(
                role=place.role,
                domain=place.domain,
                challenger_version=number,
                champion_version=champion,
                look=look,
                recent=differences,
                domains=(domain,),
                challenger_overlap=0.5,
                champion_overlap=0.4,
                at=0.0,
            )
        )

    def served(self, place: Place = DRAFT) -> tuple[int, int]:
        """(generation, version) of the pointer."""
        pointer = self.pointers.read(*place)
        assert pointer is not None
        return pointer.generation, pointer.version

    def promote(self, number: int) -> None:
        """Add challengers that pass until `number` of them were promoted."""
        for _ in range(number):
            version = self.add(gain=0.5)
            self.promoter.turn()
            assert self.served()[1] == version.version


def test_a_draft_that_passes_moves_the_pointer_and_then_the_alias(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, pointers)
    version = stage.add(gain=0.5)
    decision = stage.promoter.turn()
    assert decision is not None
    assert decision.verdict == "promote"
    assert stage.served() == (1, version.version)
    assert stage.registry.alias(*DRAFT, "champion") == version.version
    assert pointers.decisions(limit=10) == [decision]
    assert stage.promoter.turn() is None


def test_the_same_hold_is_recorded_once_and_a_new_look_again(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, pointers)
    version = stage.add(gain=0.0)
    decisions = [stage.promoter.turn() for _ in range(3)]
    assert [one is not None for one in decisions] == [True, False, False]
    assert stage.start().turn() is None
    stage.report(version.version, gain=0.002, look=2)
    assert stage.promoter.turn() is not None
    assert [one.verdict for one in pointers.decisions(limit=10)] == ["hold", "hold"]
    assert pointers.read(*DRAFT) is None


def test_an_unreported_challenger_and_one_of_another_target_are_not_promoted(
    tmp_path: Path, pointers: PointerStore
) -> None:
    stage = Stage(tmp_path, pointers)
    stage.add(gain=None)
    assert stage.promoter.turn() is None
    stage.add(gain=0.9, target_digest="0" * 64)
    assert stage.promoter.turn() is None
    assert pointers.read(*DRAFT) is None


def test_a_report_against_an_older_champion_does_not_count(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, pointers)
    stage.promote(1)
    version = stage.add(gain=0.5)
    report = stage.registry.report(*DRAFT, version.version)
    assert report is not None
    stage.registry.record_report(msgspec.structs.replace(report, champion_version=0))
    assert stage.promoter.turn() is None
    assert stage.served() == (1, 1)


@pytest.mark.parametrize("place", [SQL, MATRIX])
def test_places_are_promoted_and_rolled_back_apart_from_each_other(
    tmp_path: Path, pointers: PointerStore, place: Place
) -> None:
    stage = Stage(tmp_path, pointers)
    fence = Fence(pointers)
    promoters = [stage.start(place=one, fence=fence) for one in (DRAFT, place)]
    for _ in range(2):
        stage.add(gain=0.5)
        stage.add(gain=0.5, place=place)
        verdicts = [decision.verdict for promoter in promoters if (decision := promoter.turn()) is not None]
        assert verdicts == ["promote", "promote"]
    assert (stage.served(), stage.served(place)) == ((2, 2), (2, 2))
    assert stage.registry.alias(*place, "champion") == 2
    rollback(pointers, role=place.role, domain=place.domain)
    assert (stage.served(), stage.served(place)) == ((2, 2), (3, 1))
    pointers.unfreeze()
    # A shared token: after the operator's each place needs one attempt in all to learn of it, not one each.
    stage.add(gain=0.5)
    stage.add(gain=0.5, place=place)
    for promoter in (*promoters, *promoters):
        promoter.turn()
    assert (stage.served(), stage.served(place)) == ((3, 3), (4, 3))


def test_decisions_of_several_places_are_recorded_once_each(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, pointers)
    fence = Fence(pointers)
    promoters = [stage.start(place=one, fence=fence) for one in (DRAFT, SQL, MATRIX)]
    for place in (DRAFT, SQL, MATRIX):
        stage.add(gain=0.0, place=place)
    decisions = [promoter.turn() for _ in range(3) for promoter in promoters]
    assert [one is not None for one in decisions] == [True] * 3 + [False] * 6
    assert [(one.role, one.domain) for one in pointers.decisions(limit=10)] == [MATRIX, SQL, DRAFT]


def test_a_pointer_store_that_came_back_empty_gets_every_place_again(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, MemoryPointers())
    for place in (DRAFT, SQL, MATRIX):
        stage.add(gain=0.5, place=place)
        stage.start(place=place).turn()
    stage.pointers = pointers
    for place in (DRAFT, SQL, MATRIX):
        assert pointers.read(*place) is None
        stage.start(place=place).turn()
        assert stage.served(place) == (1, 1)


class AliasFails:
    """A registry that dies when the champion alias is to move."""

    def __init__(self, real: MemoryRegistry) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def set_alias(self, *arguments: object) -> None:
        raise StoreUnavailable("injected outage; wait")


def test_the_pointer_moves_although_the_registry_dies_and_the_alias_is_repaired_later(
    tmp_path: Path, pointers: PointerStore
) -> None:
    stage = Stage(tmp_path, pointers)
    stage.add(gain=0.5)
    with pytest.raises(StoreUnavailable):
        stage.start(registry=AliasFails(stage.registry)).turn()
    assert stage.served() == (1, 1)
    assert [one.verdict for one in pointers.decisions(limit=10)] == ["promote"]
    assert stage.registry.alias(*DRAFT, "champion") is None
    stage.start().turn()
    assert stage.registry.alias(*DRAFT, "champion") == 1


def test_rollback_goes_back_one_version_and_freezes_until_unfreeze(
    tmp_path: Path, pointers: PointerStore, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(tmp_path, pointers)
    stage.promote(2)
    moved = rollback(pointers, role="draft", domain=DEFAULT_DOMAIN, reason="looks slow")
    assert stage.served() == (3, 1)
    assert (moved.digest, moved.reason) == (
        stage.registry.get(*DRAFT, 1).digest,
        "rollback: version 2 to 1, looks slow",
    )
    better = stage.add(gain=0.9)
    with caplog.at_level(logging.WARNING):
        assert [stage.promoter.turn() for _ in range(3)] == [None] * 3
    assert stage.served() == (3, 1)
    assert sum("promotion is frozen" in record.message for record in caplog.records) == 1
    assert stage.registry.alias(*DRAFT, "champion") == 1
    pointers.unfreeze()
    # The first attempt learns that its token is too old, the second has a new one.
    decisions = [stage.promoter.turn() for _ in range(2)]
    assert decisions[-1] is not None
    assert stage.served() == (4, better.version)


def test_a_version_that_was_rolled_back_is_not_promoted_again(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, pointers)
    stage.promote(2)
    rollback(pointers, role="draft", domain=DEFAULT_DOMAIN)
    pointers.unfreeze()
    stage.report(2, gain=0.9, look=2)
    assert [stage.promoter.turn() for _ in range(3)] == [None] * 3
    assert stage.served() == (3, 1)
    rollback(pointers, role="draft", domain=DEFAULT_DOMAIN, to_version=2, reason="it was not the draft")
    assert stage.served() == (4, 2)
    assert rollback(pointers, role="draft", domain=DEFAULT_DOMAIN).version == 1


def test_a_second_rollback_goes_further_back_and_the_last_one_to_no_draft(
    tmp_path: Path, pointers: PointerStore
) -> None:
    stage = Stage(tmp_path, pointers)
    stage.promote(3)
    reached = [rollback(pointers, role="draft", domain=DEFAULT_DOMAIN) for _ in range(3)]
    assert [one.version for one in reached] == [2, 1, 0]
    assert (reached[-1].artifact_uri, reached[-1].digest) == ("", "")
    assert stage.served() == (6, 0)


def test_rollback_to_what_was_never_served_is_refused(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, pointers)
    with pytest.raises(UnknownVersion, match=r"holds no pointer.*the promoter sets it again"):
        rollback(pointers, role="draft", domain=DEFAULT_DOMAIN)
    stage.promote(1)
    with pytest.raises(UnknownVersion, match=r"expected one of \[0, 1\]"):
        rollback(pointers, role="draft", domain=DEFAULT_DOMAIN, to_version=9)
    assert stage.served() == (1, 1)
    assert pointers.frozen() is None


def test_a_promoter_that_decided_before_the_rollback_cannot_undo_it(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, pointers)
    stage.promote(2)
    stage.add(gain=0.5)

    class Slow:
        """A pointer store in front of which an operator acts between the promoter's look and its move."""

        def __getattr__(self, name: str) -> Any:
            if name == "advance":
                rollback(pointers, role="draft", domain=DEFAULT_DOMAIN)
                pointers.unfreeze()
            return getattr(pointers, name)

    slow = Promoter(
        Slow(),  # type: ignore[arg-type]
        stage.registry,
        gate=PromotionGate(),
        target_digest=TARGET_DIGEST,
        metrics=stage.metrics,
    )
    assert slow.turn() is None
    assert stage.served() == (3, 1)


def acknowledge(pointers: PointerStore, *, version: int, generation: int) -> None:
    word = Acknowledgement(
        replica_id="replica",
        role="draft",
        domain=DEFAULT_DOMAIN,
        version=version,
        digest="",
        generation=generation,
        state="serving",
        error="",
        at=time.time(),
    )
    pointers.acknowledge(word)


def test_a_pointer_store_that_came_back_empty_gets_the_champion_again_and_no_initial_draft(
    tmp_path: Path, pointers: PointerStore
) -> None:
    stage = Stage(tmp_path, MemoryPointers())
    stage.promote(2)
    stage.add(gain=None)
    stage.pointers = pointers
    general = MODELS / "draft-2m-general"
    assert seed(pointers, stage.registry, general, target_digest=TARGET_DIGEST, vocab_size=VOCAB_SIZE) is None
    assert stage.start().turn() is None
    pointer = pointers.read(*DRAFT)
    assert pointer is not None
    assert (pointer.generation, pointer.version) == (1, 2)
    assert pointer.reason == "restored: the pointer store was empty"
    assert pointer.digest == stage.registry.get(*DRAFT, 2).digest


def test_what_replicas_run_is_restored_rather_than_the_champion(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, MemoryPointers())
    stage.promote(2)
    stage.pointers = pointers
    acknowledge(pointers, version=0, generation=7)
    stage.start().turn()
    assert pointers.read(*DRAFT) is None
    acknowledge(pointers, version=1, generation=8)
    stage.start().turn()
    # The champion is the challenger of what was restored, with a report that lets it pass.
    assert [one.version for one in pointers.history(*DRAFT, limit=2)] == [2, 1]


def test_a_replica_that_never_had_a_pointer_and_a_champion_of_another_target_restore_nothing(
    tmp_path: Path, pointers: PointerStore
) -> None:
    stage = Stage(tmp_path, pointers)
    acknowledge(pointers, version=0, generation=0)
    stage.promoter.turn()
    foreign = stage.add(gain=None, target_digest="0" * 64)
    stage.registry.set_alias(*DRAFT, "champion", foreign.version)
    stage.promoter.turn()
    assert pointers.read(*DRAFT) is None


def test_an_empty_store_stays_empty_while_promotion_is_frozen(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, MemoryPointers())
    stage.promote(1)
    stage.pointers = pointers
    pointers.freeze("by hand")
    promoter = stage.start()
    promoter.turn()
    assert pointers.read(*DRAFT) is None
    pointers.unfreeze()
    promoter.turn()
    assert stage.served() == (1, 1)


def test_the_first_start_serves_the_initial_draft_and_a_later_start_changes_nothing(
    tmp_path: Path, pointers: PointerStore
) -> None:
    registry = MemoryRegistry(tmp_path / "artifacts")
    general = load_checkpoint(MODELS / "draft-2m-general")
    for _ in range(2):
        seed(
            pointers,
            registry,
            MODELS / "draft-2m-general",
            target_digest=TARGET_DIGEST,
            vocab_size=general.config.vocab_size,
        )
    pointer = pointers.read(*DRAFT)
    assert pointer is not None
    assert (pointer.generation, pointer.version, pointer.digest) == (1, 1, general.digest)
    assert len(registry.versions(*DRAFT)) == 1


def test_an_initial_draft_that_cannot_serve_stops_the_start(tmp_path: Path) -> None:
    assert initial_draft_dir("", vocab_size=4096) is None
    with pytest.raises(ConfigError, match="is no directory"):
        initial_draft_dir(str(tmp_path / "missing"), vocab_size=4096)
    with pytest.raises(ConfigError, match="vocabulary of 4096 tokens, the target 99"):
        initial_draft_dir(str(MODELS / "draft-2m-general"), vocab_size=99)


def test_promotion_stays_frozen_for_a_direct_move(tmp_path: Path, pointers: PointerStore) -> None:
    stage = Stage(tmp_path, pointers)
    stage.promote(1)
    pointers.freeze("by hand")
    current = pointers.read(*DRAFT)
    assert current is not None
    token = pointers.issue_fencing_token()
    move = msgspec.structs.replace(current, generation=2, fencing_token=token)
    with pytest.raises(PromotionFrozen):
        pointers.advance(move, expected_generation=1)


@pytest.fixture(scope="module")
def real_observations() -> list[Observation]:
    """What the reference target answered to 40 questions of two domains, sampled at temperature 0.8."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(MODELS / "mix-moe-11m" / "tokenizer.json"))
    observed: list[Observation] = []
    engine = Engine(
        load_checkpoint(MODELS / "mix-moe-11m"),
        limits=EngineLimits(
            max_running_requests=32,
            max_queued_requests=64,
            max_step_tokens=512,
            max_context_tokens=1024,
            num_draft_tokens=4,
        ),
        target_digest=TARGET_DIGEST,
        replica_id="replica",
        top_n=16,
        observe=observed.append,
        metrics=ReplicaMetrics(),
    )
    streams = dict(builtin_streams(seed=3)[:2])
    for name, stream in streams.items():
        for index, query in zip(range(20), stream, strict=False):
            request = Request(
                request_id=f"{name}-{index}",
                prompt_ids=tuple(tokenizer.encode(f"<|user|>{query.prompt}<|assistant|>").ids),
                sampling=SamplingParams(seed=index, max_tokens=48, temperature=0.8, stop_token_ids=(0,)),
                tenant="anonymous",
                domain=name,
                may_train=True,
                arrived_at=time.monotonic(),
            )
            engine.submit(request, lambda block: None)
    while engine.step():
        pass
    random.Random(0).shuffle(observed)
    return observed


def judged(challenger: Checkpoint, champion: Checkpoint, observations: list[Observation]) -> str:
    report = compare(
        [score(challenger, one, num_draft_tokens=4) for one in observations],
        [score(champion, one, num_draft_tokens=4) for one in observations],
        of=ComparedVersions(domain=DEFAULT_DOMAIN, challenger_version=2, champion_version=1, look=1),
        num_recent=len(observations),
        at=0.0,
    )
    return decide(PromotionGate(), report, at=0.0).verdict


def with_noise(draft: Checkpoint, *, scale: float, seed: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: tensor * (1 + scale * torch.randn(tensor.shape, generator=generator))
        for name, tensor in draft.weights.items()
    }
    return Checkpoint(draft.config, weights, checkpoint_digest(draft.config, weights))


def test_the_gate_promotes_a_draft_that_is_truly_better(real_observations: list[Observation]) -> None:
    general, sibling = (load_checkpoint(MODELS / f"draft-2m-{name}") for name in ("general", "sibling"))
    assert judged(sibling, general, real_observations) == "promote"
    assert judged(general, sibling, real_observations) == "reject"


@pytest.mark.parametrize("noise_seed", range(4))
def test_the_gate_holds_a_draft_that_differs_by_noise_alone(
    real_observations: list[Observation], noise_seed: int
) -> None:
    sibling = load_checkpoint(MODELS / "draft-2m-sibling")
    noisy = with_noise(sibling, scale=0.01, seed=noise_seed)
    assert noisy.digest != sibling.digest
    assert judged(noisy, sibling, real_observations) == "hold"
