"""What every `ModelRegistry` does, on every implementation."""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

from slipstream.errors import ArtifactRejected, StoreUnavailable, UnknownVersion
from slipstream.promotion import DomainComparison, EvaluationReport
from slipstream.stores.mlflow import MlflowRegistry
from slipstream.stores.protocols import ModelRegistry
from slipstream.versions import Lineage, ModelVersion, OffsetRange
from tests.servers import free_port


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "artifact"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (directory / "config.json").write_text("{}")
    return directory


def lineage_of(number: int) -> Lineage:
    return Lineage(
        target_digest="target",
        parent_version=max(0, number - 1),
        offsets=(OffsetRange(0, 10 * number, 10 * number + 10), OffsetRange(3, 0, number)),
        num_observations=10,
        num_train_steps=60,
        note=f"turn {number}, 'quoted' and \"twice\" ü",
    )


def register(registry: ModelRegistry, artifact: Path, number: int) -> ModelVersion:
    return registry.register("draft", "default", artifact, digest=f"digest-{number}", lineage=lineage_of(number))


def files_of(version: ModelVersion) -> dict[str, bytes]:
    parts = urlsplit(version.artifact_uri)
    assert parts.scheme == "file"
    return {file.name: file.read_bytes() for file in Path(parts.path).iterdir()}


def test_an_empty_registry_has_nothing(registry: ModelRegistry) -> None:
    assert registry.versions("draft", "default") == []
    assert registry.lineages("draft", "default") == {}
    assert registry.alias("draft", "default", "champion") is None
    assert registry.prune("draft", "default", keep=1) == []
    with pytest.raises(UnknownVersion, match="draft version 1 of domain 'default'"):
        registry.get("draft", "default", 1)


def test_versions_count_up_and_read_back_whole(registry: ModelRegistry, artifact: Path) -> None:
    made = [register(registry, artifact, number) for number in range(3)]
    assert [version.version for version in made] == [1, 2, 3]
    assert registry.versions("draft", "default") == made
    assert [registry.get("draft", "default", number) for number in (1, 2, 3)] == made
    assert made[2].lineage == lineage_of(2)
    assert made[2].digest == "digest-2"


def test_roles_and_domains_count_for_themselves(registry: ModelRegistry, artifact: Path) -> None:
    register(registry, artifact, 0)
    other = registry.register("draft", "sql", artifact, digest="digest", lineage=lineage_of(0))
    routing = registry.register("routing", "default", artifact, digest="digest", lineage=lineage_of(0))
    assert (other.version, other.domain, routing.version, routing.role) == (1, "sql", 1, "routing")
    assert len(registry.versions("draft", "default")) == 1


def test_registering_again_gives_the_same_version(registry: ModelRegistry, artifact: Path) -> None:
    first = register(registry, artifact, 0)
    register(registry, artifact, 1)
    assert register(registry, artifact, 0) == first
    assert len(registry.versions("draft", "default")) == 2
    changed = msgspec.structs.replace(lineage_of(0), num_train_steps=61)
    assert registry.register("draft", "default", artifact, digest="digest-0", lineage=changed).version == 3


def test_one_version_comes_of_registering_at_once(registry: ModelRegistry, artifact: Path) -> None:
    made: list[ModelVersion] = []
    threads = [threading.Thread(target=lambda: made.append(register(registry, artifact, 0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [version.version for version in made] == [1, 1, 1, 1]


def test_the_copy_keeps_its_bytes_when_the_source_changes_or_goes(registry: ModelRegistry, artifact: Path) -> None:
    before = {file.name: file.read_bytes() for file in artifact.iterdir()}
    version = register(registry, artifact, 0)
    (artifact / "config.json").write_text("changed")
    (artifact / "model.safetensors").unlink()
    assert files_of(version) == before
    assert register(registry, artifact, 0) == version
    assert files_of(version) == before


@pytest.mark.parametrize("oddity", ["symlink", "subdirectory", "empty", "missing", "linked directory"])
def test_a_directory_with_anything_but_regular_files_is_refused(
    registry: ModelRegistry, artifact: Path, tmp_path: Path, oddity: str
) -> None:
    directory = artifact
    if oddity == "symlink":
        (artifact / "extra.json").symlink_to(artifact / "config.json")
    elif oddity == "subdirectory":
        (artifact / "deeper").mkdir()
    elif oddity == "linked directory":
        directory = tmp_path / "link"
        directory.symlink_to(artifact, target_is_directory=True)
    else:
        directory = tmp_path / oddity
        if oddity == "empty":
            directory.mkdir()
    with pytest.raises(ArtifactRejected, match="flat directory of regular files"):
        register(registry, directory, 0)
    assert registry.versions("draft", "default") == []


def test_a_domain_that_could_leave_its_directory_is_refused(registry: ModelRegistry, artifact: Path) -> None:
    with pytest.raises(ValueError, match=r"domain '\.\./evil'"):
        registry.register("draft", "../evil", artifact, digest="d", lineage=lineage_of(0))


def test_an_alias_points_at_a_known_version_and_moves(registry: ModelRegistry, artifact: Path) -> None:
    for number in range(2):
        register(registry, artifact, number)
    registry.set_alias("draft", "default", "challenger", 2)
    registry.set_alias("draft", "default", "champion", 1)
    registry.set_alias("draft", "default", "champion", 2)
    assert registry.alias("draft", "default", "champion") == 2
    assert registry.alias("draft", "default", "challenger") == 2
    assert registry.alias("routing", "default", "champion") is None
    with pytest.raises(UnknownVersion, match="version 3"):
        registry.set_alias("draft", "default", "champion", 3)


def report_on(version: int, *, num_differences: int = 3) -> EvaluationReport:
    differences = tuple(0.1 * number for number in range(num_differences))
    comparison = DomainComparison(
        domain="maths & sql: 'x'",
        differences=differences,
        challenger_acceptance_length=2.5,
        champion_acceptance_length=2.25,
        challenger_acceptance_rate=0.5,
        champion_acceptance_rate=0.4,
    )
    return EvaluationReport(
        role="draft",
        domain="default",
        challenger_version=version,
        champion_version=0,
        look=1,
        recent=differences,
        domains=(comparison,),
        challenger_overlap=0.6,
        champion_overlap=0.5,
        at=12.5,
    )


def test_a_report_reads_back_whole_however_long_and_a_later_one_replaces_it(
    registry: ModelRegistry, artifact: Path
) -> None:
    for number in range(2):
        register(registry, artifact, number)
    assert registry.report("draft", "default", 1) is None
    registry.record_report(report_on(1))
    long_report = report_on(1, num_differences=20_000)
    registry.record_report(long_report)
    assert registry.report("draft", "default", 1) == long_report
    assert registry.report("draft", "default", 2) is None
    with pytest.raises(UnknownVersion):
        registry.record_report(report_on(3))
    with pytest.raises(UnknownVersion):
        registry.report("draft", "default", 3)


def test_pruning_spares_the_newest_the_aliased_and_the_protected(registry: ModelRegistry, artifact: Path) -> None:
    made = [register(registry, artifact, number) for number in range(7)]
    registry.set_alias("draft", "default", "champion", 2)
    gone = registry.prune("draft", "default", keep=2, protected=frozenset({4}))
    assert gone == [1, 3, 5]
    assert [version.version for version in registry.versions("draft", "default")] == [2, 4, 6, 7]
    for version in made:
        assert Path(urlsplit(version.artifact_uri).path).exists() == (version.version not in gone)
    with pytest.raises(UnknownVersion):
        registry.get("draft", "default", 3)


def test_lineages_outlive_pruning(registry: ModelRegistry, artifact: Path) -> None:
    for number in range(4):
        register(registry, artifact, number)
    registry.prune("draft", "default", keep=2)
    registry.prune("draft", "default", keep=1)
    assert registry.lineages("draft", "default") == {number + 1: lineage_of(number) for number in range(4)}


def test_a_pruned_number_is_never_given_again(registry: ModelRegistry, artifact: Path) -> None:
    for number in range(3):
        register(registry, artifact, number)
    assert registry.prune("draft", "default", keep=0) == [1, 2, 3]
    assert registry.alias("draft", "default", "champion") is None
    reborn = register(registry, artifact, 2)
    assert reborn.version == 4
    assert set(files_of(reborn)) == {"model.safetensors", "config.json"}


def test_mlflow_finds_everything_again_in_a_new_process(mlflow_database: str, artifact: Path, tmp_path: Path) -> None:
    first = MlflowRegistry(mlflow_database, artifact_root=tmp_path / "root", namespace=tmp_path.name[:40])
    version = register(first, artifact, 0)
    first.set_alias("draft", "default", "champion", 1)
    first.record_report(report_on(1))
    second = MlflowRegistry(mlflow_database, artifact_root=tmp_path / "root", namespace=tmp_path.name[:40])
    assert second.versions("draft", "default") == [version]
    assert second.alias("draft", "default", "champion") == 1
    assert second.report("draft", "default", 1) == report_on(1)


def test_mlflow_draws_reports_over_versions(mlflow_database: str, artifact: Path, tmp_path: Path) -> None:
    namespace = tmp_path.name[:40]
    registry = MlflowRegistry(mlflow_database, artifact_root=tmp_path / "root", namespace=namespace)
    for number in range(2):
        registry.record_report(report_on(register(registry, artifact, number).version))
    client = registry._client()
    experiment = client.get_experiment_by_name(namespace)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "acceptance_length/maths___sql___x_")
    assert [(point.step, point.value) for point in history] == [(1, 2.5), (2, 2.5)]


def test_mlflow_that_does_not_answer_is_store_unavailable(artifact: Path, tmp_path: Path) -> None:
    registry = MlflowRegistry(f"http://127.0.0.1:{free_port()}", artifact_root=tmp_path / "root")
    with pytest.raises(StoreUnavailable):
        register(registry, artifact, 0)
    with pytest.raises(StoreUnavailable):
        registry.versions("draft", "default")
    with pytest.raises(StoreUnavailable):
        registry.alias("draft", "default", "champion")


def test_an_interrupted_copy_is_not_taken_for_a_version(mlflow_database: str, artifact: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    registry = MlflowRegistry(mlflow_database, artifact_root=root, namespace=tmp_path.name[:40])
    first = register(registry, artifact, 0)
    leftover = Path(urlsplit(first.artifact_uri).path).parent / ".incoming-dead"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert set(files_of(register(registry, artifact, 1))) == {"model.safetensors", "config.json"}
