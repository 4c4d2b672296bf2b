"""The distiller: whatever dies wherever, every acknowledged observation ends in exactly one version."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import msgspec
import pytest
import torch
from house import CURRICULUM, Faulty, House, Killed, no_fault, send, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.engine.artifact import load_verified, local_path
from slipstream.errors import StoreUnavailable
from slipstream.promoter import advance, seed
from slipstream.records import encode
from slipstream.stores.memory import MemoryLog
from slipstream.stores.redis import RedisLog, RedisPointers
from slipstream.versions import DRAFT
from tests.observed import TARGET_DIGEST, VOCAB_SIZE, observation, of_another_target
from tests.servers import ValkeyServer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _polls_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.distiller.worker._POLL_S", 0.01)


def check_ledger(house: House, sent: set[str]) -> set[str]:
    """Every id in one version only, ranges contiguous and disjoint; returns the ids that versions hold."""
    ids = [name for _, file in house.lineage_files() for name in file.observation_ids]
    assert len(ids) == len(set(ids)), "an observation is in two versions"
    assert set(ids) <= sent
    ends: dict[int, int] = {}
    for number, lineage in sorted(house.registry.lineages(*DRAFT).items()):
        for offsets in lineage.offsets:
            assert offsets.start == ends.get(offsets.partition, offsets.start), f"version {number} leaves a gap"
            assert offsets.end > offsets.start
            ends[offsets.partition] = offsets.end
    for (number, file), lineage in zip(house.lineage_files(), house.registry.lineages(*DRAFT).values(), strict=True):
        assert lineage.num_observations == len(file.observation_ids), f"version {number}"
    return set(ids)


def test_observations_become_versions_and_offsets_follow(tmp_path: Path) -> None:
    house = House(tmp_path)
    names = [f"request-{number}" for number in range(40)]
    send(house.log, names)
    house.start()
    house.run()
    versions = house.registry.versions(*DRAFT)
    in_versions = check_ledger(house, trained(names))
    assert len(trained(names)) - len(in_versions) < 5
    assert house.registry.alias(*DRAFT, "challenger") == versions[-1].version
    assert [one.lineage.parent_version for one in versions] == list(range(len(versions)))
    for version in versions:
        load_verified(local_path(version.artifact_uri, house.artifact_root), digest=version.digest)


def test_held_out_foreign_damaged_and_repeated_records_are_counted_and_never_trained_on(tmp_path: Path) -> None:
    house = House(tmp_path)
    names = [f"request-{number}" for number in range(20)]
    send(house.log, names)
    house.log.append([("poison", b"no record"), ("far", encode(of_another_target(observation("far"))))])
    out_of_vocabulary = msgspec.structs.replace(observation("odd"), prompt_ids=b"\xff\xff\xff\x7f")
    house.log.append([("odd", encode(out_of_vocabulary))])
    send(house.log, names)
    house.start()
    house.run()
    check_ledger(house, trained(names))
    counted = {use: house.metrics.consumed.labels(use)._value.get() for use in ("train", "duplicate", "skipped")}
    assert counted == {"train": len(trained(names)), "duplicate": len(trained(names)), "skipped": 3.0}
    assert house.metrics.consumed.labels("held_out")._value.get() == 2 * (20 - len(trained(names)))


FAULTS = ["register", "set_alias", "commit", "prune", "poll", "lineages"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", FAULTS)
def test_kill_9_at_any_step_loses_and_doubles_nothing(tmp_path: Path, step: str, when: str) -> None:
    house = House(tmp_path)
    names = [f"request-{number}" for number in range(30)]
    send(house.log, names)
    num_calls = 0

    def kill_at_second(name: str, moment: str) -> None:
        nonlocal num_calls
        num_calls += (name, moment) == (step, when)
        if num_calls == (1 if step == "lineages" else 2):
            raise Killed

    house.start(kill_at_second)
    with pytest.raises(Killed):
        house.run()
    house.start()
    house.run()
    left = len(trained(names)) - len(check_ledger(house, trained(names)))
    assert 0 <= left < 5
    newest = max(house.registry.lineages(*DRAFT))
    assert house.registry.alias(*DRAFT, "challenger") == newest


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(min_value=0, max_value=2**32 - 1))
def test_any_history_of_crashes_outages_and_duplicates_keeps_the_ledger_exact(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    chance = random.Random(seed)
    house = House(tmp_path_factory.mktemp("house"))
    names: list[str] = []

    def fault(name: str, moment: str) -> None:
        if name in FAULTS and chance.random() < 0.08:
            # A poll whose reply was lost delivers it again, which the log in memory, never failing, cannot do.
            outage = StoreUnavailable("injected outage; wait")
            raise Killed if (name, moment) == ("poll", "after") else chance.choice([Killed, outage])

    house.start(fault)
    for _ in range(25):
        new = [f"request-{len(names) + number}" for number in range(chance.randint(0, 4))]
        names += new
        send(house.log, new + chance.sample(names, min(len(names), chance.randint(0, 2))))
        try:
            assert house.worker is not None
            house.worker.turn()
        except Killed:
            house.start(fault)
        except StoreUnavailable:
            pass
    house.start()
    house.run()
    left = len(trained(names)) - len(check_ledger(house, trained(names)))
    assert 0 <= left < 5


def test_a_registry_outage_does_not_train_or_stage_the_same_version_twice(tmp_path: Path) -> None:
    house = House(tmp_path)
    names = [f"request-{number}" for number in range(12)]
    send(house.log, names)
    is_down = True

    def outage(name: str, moment: str) -> None:
        # The version exists, but the reply is lost: the worst place for an outage.
        if is_down and (name, moment) == ("register", "after"):
            raise StoreUnavailable("injected outage; wait")

    house.start(outage)
    assert house.worker is not None
    num_outages = 0
    for _ in range(12):
        try:
            house.worker.turn()
        except StoreUnavailable:
            num_outages += 1
    assert num_outages > 2
    assert len(house.registry.versions(*DRAFT)) == 1
    is_down = False
    house.run()
    assert len(trained(names)) - len(check_ledger(house, trained(names))) < 5
    assert house.registry.alias(*DRAFT, "challenger") == max(house.registry.lineages(*DRAFT))


def test_training_goes_on_while_the_log_is_down(tmp_path: Path) -> None:
    house = House(tmp_path)
    send(house.log, [f"request-{number}" for number in range(4)])
    is_down = False

    def outage(name: str, moment: str) -> None:
        if is_down and name == "poll":
            raise StoreUnavailable("injected outage; wait")

    curriculum = msgspec.structs.replace(CURRICULUM, steps_per_version=50)
    house.start(outage, curriculum)
    assert house.worker is not None
    house.worker.turn()
    steps_before = house.metrics.train_steps._value.get()
    is_down = True
    with pytest.raises(StoreUnavailable):
        house.worker.turn()
    assert house.metrics.train_steps._value.get() > steps_before


def test_a_lost_buffer_does_not_train_again_on_what_versions_hold(tmp_path: Path) -> None:
    house = House(tmp_path)
    names = [f"request-{number}" for number in range(20)]
    send(house.log, names)
    house.start()
    house.run()
    for path in (tmp_path / "replay").iterdir():
        path.unlink()
    house.start()
    send(house.log, names)
    house.run()
    check_ledger(house, trained(names))


def test_training_resumes_from_the_saved_student_else_from_what_is_served(tmp_path: Path) -> None:
    house = House(tmp_path)
    send(house.log, [f"request-{number}" for number in range(16)])
    house.start()
    house.run()
    newest = max(house.registry.lineages(*DRAFT))
    house.start()
    house.run()
    assert house.worker is not None
    saved = house.worker._distiller._student
    assert saved is not None
    assert saved.num_steps > 0
    assert house.worker._distiller._parent_version == newest
    (tmp_path / "student.safetensors").unlink()
    first = house.registry.get(*DRAFT, 1)
    served = load_verified(local_path(first.artifact_uri, house.artifact_root), digest=first.digest)
    served_dir = tmp_path / "served"
    served_dir.mkdir()
    for path in local_path(first.artifact_uri, house.artifact_root).iterdir():
        (served_dir / path.name).write_bytes(path.read_bytes())
    pointer = seed(house.pointers, house.registry, served_dir, target_digest=TARGET_DIGEST, vocab_size=VOCAB_SIZE)
    assert pointer is not None
    house.start()
    house.run()
    student = house.worker._distiller._student
    assert student is not None
    assert house.worker._distiller._parent_version == pointer.version
    assert all(torch.equal(student.weights[name], tensor.float()) for name, tensor in served.weights.items())


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_log_that_came_back_empty_is_trained_on_from_its_first_record(tmp_path: Path, is_restarted: bool) -> None:
    house = House(tmp_path)
    names = [f"request-{number}" for number in range(32)]
    send(house.log, names)
    house.start()
    house.run()
    num_before = len(house.registry.lineages(*DRAFT))
    reborn = MemoryLog(num_partitions=3)
    others = [f"other-{number}" for number in range(30)]
    send(reborn, others)
    house.log = reborn
    assert house.worker is not None
    if is_restarted:
        house.start()
    else:
        house.worker._log = Faulty(reborn, no_fault)
    house.run()
    lineages = list(house.registry.lineages(*DRAFT).values())
    assert len({one.note for one in lineages}) == 2
    in_versions = [name for _, file in house.lineage_files() for name in file.observation_ids]
    assert len(in_versions) == len(set(in_versions))
    assert len(trained(others)) - len(set(in_versions) & trained(others)) < 5
    ends: dict[int, int] = {}
    for offsets in (one for lineage in lineages[num_before:] for one in lineage.offsets):
        assert offsets.start == ends.get(offsets.partition, 0)
        ends[offsets.partition] = offsets.end


def test_offsets_that_a_log_gave_twice_are_said_once_instead_of_mixed_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    house = House(tmp_path)
    send(house.log, [f"request-{number}" for number in range(30)])
    house.start()
    house.run()
    lineages = house.registry.lineages(*DRAFT)
    rewound = MemoryLog(num_partitions=3)
    rewound._identity = house.log.identity()
    house.log = rewound
    send(house.log, [f"other-{number}" for number in range(10)])
    house.start()
    with caplog.at_level(logging.WARNING):
        house.run()
    assert house.registry.lineages(*DRAFT) == lineages
    assert sum("holds an observation never seen" in record.message for record in caplog.records) == 1


def test_old_versions_are_pruned_but_not_what_was_served(tmp_path: Path) -> None:
    house = House(tmp_path)
    curriculum = msgspec.structs.replace(CURRICULUM, keep_versions=2)
    send(house.log, [f"request-{number}" for number in range(10)])
    house.start(curriculum=curriculum)
    house.run()
    first = house.registry.versions(*DRAFT)[0]
    token = house.pointers.issue_fencing_token()
    advance(house.pointers, first, after=None, fencing_token=token, reason="served")
    send(house.log, [f"more-{number}" for number in range(60)])
    house.run()
    kept = [one.version for one in house.registry.versions(*DRAFT)]
    newest = max(house.registry.lineages(*DRAFT))
    assert kept == [first.version, newest - 1, newest]


@pytest.mark.processes
def test_on_a_real_valkey_the_ledger_is_exact_across_its_kill_9(tmp_path: Path, valkey: ValkeyServer) -> None:
    log = RedisLog(valkey.url, namespace="distiller-ledger")
    house = House(tmp_path, log=log, pointers=RedisPointers(valkey.url, namespace="distiller-ledger"))
    names = [f"request-{number}" for number in range(40)]
    send(log, names[:20])
    house.start()
    house.run()
    valkey.kill()
    assert house.worker is not None
    with pytest.raises(StoreUnavailable):
        house.run()
    valkey.start()
    send(log, names[20:])
    house.run()
    assert len(trained(names)) - len(check_ledger(house, trained(names))) < 5
