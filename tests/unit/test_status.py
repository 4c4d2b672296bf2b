"""What an operator reads: the status, its problems and the command line around it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from slipstream import __main__ as command_line
from slipstream.config import load_config
from slipstream.promotion import PromotionDecision
from slipstream.status import problems, read_status, render
from slipstream.stores.memory import MemoryPointers
from slipstream.stores.protocols import WorkerStatus
from slipstream.versions import Acknowledgement, ServingPointer

NOW = 1_000_000.0
DIGEST, OTHER = "a" * 64, "b" * 64


def pointer(**changes: object) -> ServingPointer:
    one = ServingPointer(
        role="draft",
        domain="default",
        version=7,
        artifact_uri="file:///versions/7",
        digest=DIGEST,
        target_digest="t",
        generation=1,
        fencing_token=1,
        reason="gain +0.3",
        set_at=NOW - 12,
    )
    return msgspec.structs.replace(one, **changes)


def acknowledgement(**changes: object) -> Acknowledgement:
    one = Acknowledgement(
        replica_id="replica-1",
        role="draft",
        domain="default",
        version=7,
        digest=DIGEST,
        generation=1,
        state="serving",
        error="",
        at=NOW - 1,
    )
    return msgspec.structs.replace(one, **changes)


def served() -> MemoryPointers:
    pointers = MemoryPointers()
    token = pointers.issue_fencing_token()
    pointers.advance(pointer(fencing_token=token), expected_generation=0)
    pointers.report_worker(WorkerStatus(worker="promoter", lag=-1, detail="deciding", at=NOW - 2))
    return pointers


def look(**changes: object) -> str:
    """The rendered status of one pointer and one replica whose word has these changes."""
    pointers = served()
    pointers.acknowledge(acknowledgement(**changes))
    status = read_status(pointers, at=NOW)
    assert len(problems(status)) == (0 if not changes else 1)
    return render(status)


def test_a_replica_on_the_pointer_with_an_equal_digest_is_no_problem() -> None:
    text = look()
    assert "v7  generation 1  digest aaaaaaaaaaaa  serving, digest equal, heard 1 s ago" in text
    assert "set 12 s ago: gain +0.3" in text
    assert text.endswith("ok         every replica runs what the pointer says")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"digest": OTHER}, "runs v7 bbbbbbbbbbbb, the pointer says v7 aaaaaaaaaaaa"),
        ({"generation": 0, "version": 6}, "runs generation 0, the pointer is at 1"),
        ({"state": "refused", "error": "not finite", "version": 6}, "refused generation 1 and runs v6: not finite"),
    ],
)
def test_a_replica_that_differs_is_a_problem_that_says_how(changes: dict[str, object], said: str) -> None:
    assert said in look(**changes)


NO_REPLICA = "no replica heard within 60 s: none runs, or none reaches the pointer store"
NO_WORKER = "no worker heard: distiller, evaluator and promoter never reached this pointer store"


def test_a_pointer_that_nobody_acknowledges_is_a_problem() -> None:
    assert problems(read_status(served(), at=NOW)) == [NO_REPLICA]


def test_a_store_that_nobody_uses_is_no_service_in_order() -> None:
    status = read_status(MemoryPointers(), at=NOW)
    assert problems(status) == [NO_REPLICA, NO_WORKER]
    assert "ok " not in render(status)


def test_no_pointer_yet_is_no_problem_where_replicas_and_workers_are_heard() -> None:
    pointers = MemoryPointers()
    pointers.acknowledge(acknowledgement(version=0, digest="", generation=0))
    pointers.report_worker(WorkerStatus(worker="promoter", lag=-1, detail="deciding", at=NOW - 2))
    status = read_status(pointers, at=NOW)
    assert problems(status) == []
    assert render(status).endswith("ok         every replica runs what the pointer says")


def test_every_place_has_its_pointer_and_replicas_and_problems_say_where() -> None:
    pointers = served()
    pointers.acknowledge(acknowledgement())
    pointers.acknowledge(acknowledgement(role="recycling", version=0, digest="", generation=0))
    pointers.acknowledge(acknowledgement(domain="sql", version=0, digest="", generation=0))
    status = read_status(pointers, at=NOW)
    assert problems(status) == []
    text = render(status)
    assert "pointer    draft/sql  none yet: requests of this domain use the draft of default" in text
    assert "pointer    recycling/default  none yet: Token Recycling starts empty" in text
    for place in ({"role": "recycling"}, {"domain": "sql"}):
        token = pointers.issue_fencing_token()
        pointers.advance(pointer(fencing_token=token, **place), expected_generation=0)
    pointers.advance(pointer(fencing_token=pointers.issue_fencing_token(), domain="math"), expected_generation=0)
    assert problems(read_status(pointers, at=NOW)) == [
        "draft/math: no replica follows this pointer; is the domain named in serving.draft_domains?",
        "draft/sql: replica-1 runs generation 0, the pointer is at 1",
        "recycling/default: replica-1 runs generation 0, the pointer is at 1",
    ]


def test_a_silent_worker_is_a_problem_and_a_frozen_pointer_says_why() -> None:
    pointers = MemoryPointers()
    pointers.freeze("bad traffic")
    pointers.acknowledge(acknowledgement(version=0, digest="", generation=0))
    pointers.report_worker(WorkerStatus(worker="distiller", lag=3, detail="training", at=NOW - 500))
    pointers.report_worker(WorkerStatus(worker="evaluator", lag=0, detail="waiting", at=NOW - 5))
    status = read_status(pointers, at=NOW)
    assert problems(status) == ["distiller has been silent for 8 min"]
    assert "FROZEN: bad traffic" in render(status)
    assert "evaluator  lag 0 records, heard 5 s ago  waiting" in render(status)


def test_decisions_come_with_their_reasons_newest_first() -> None:
    pointers = MemoryPointers()
    for version, verdict in ((2, "hold"), (3, "promote")):
        pointers.record_decision(
            PromotionDecision(
                role="draft",
                domain="default",
                challenger_version=version,
                champion_version=1,
                verdict=verdict,  # type: ignore[arg-type]
                reason=f"because {version}",
                mean_difference=0.1,
                lower_bound=0.0,
                num_requests=20,
                at=NOW - 10 + version,
            )
        )
    lines = render(read_status(pointers, at=NOW)).splitlines()
    decisions = [line for line in lines if line.startswith("decision")]
    assert decisions == [
        "decision   draft/default promote v3 over v1, 7 s ago: because 3",
        "decision   draft/default hold v2 over v1, 8 s ago: because 2",
    ]


def test_without_a_store_the_command_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIPSTREAM_STATE", str(tmp_path))
    monkeypatch.delenv("SLIPSTREAM_REDIS", raising=False)
    assert command_line.main(["status"]) == 2
    assert "SLIPSTREAM_REDIS" in capsys.readouterr().err


def test_an_outage_of_the_store_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIPSTREAM_REDIS", f"unix://{tmp_path / 'nobody.sock'}")
    assert command_line.main(["status"]) == 1
    assert "StoreUnavailable" in capsys.readouterr().err


def test_the_store_of_a_running_supervisor_is_found_unless_one_is_named(tmp_path: Path) -> None:
    (tmp_path / command_line.ENDPOINTS).write_text('{"redis_url": "unix:///somewhere.sock", "pid": 1}')
    settings = load_config({"SLIPSTREAM_STATE": str(tmp_path)})
    assert command_line.with_local_store(settings).addresses.redis == "unix:///somewhere.sock"
    named = load_config({"SLIPSTREAM_STATE": str(tmp_path), "SLIPSTREAM_REDIS": "redis://host:1"})
    assert command_line.with_local_store(named).addresses.redis == "redis://host:1"


def test_doctor_fails_for_a_target_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "slipstream.toml"
    config.write_text(f'[serving]\ntarget = "{tmp_path / "none"}"\n')
    monkeypatch.setenv("SLIPSTREAM_CONFIG", str(config))
    monkeypatch.setenv("SLIPSTREAM_STATE", str(tmp_path))
    assert command_line.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "bad     target: no" in shown
    assert "ok      torch 2.13" in shown
