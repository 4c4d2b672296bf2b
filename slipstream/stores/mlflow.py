"""MLflow: the registry of versions, and the dashboard that draws acceptance over them.

The only file that imports mlflow. One registered model per role and domain, and one run beside it: its artifact
directory holds the versions' files and reports, its metrics have the version number as their step. Files are whole
and synced before a version names them. Nothing is pickled: a version is a plain directory of safetensors and JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from slipstream.config import redacted
from slipstream.errors import ConfigError, StoreError, StoreUnavailable
from slipstream.promotion import EvaluationReport, lower_bound
from slipstream.stores.artifacts import (
    checked_name,
    delete_artifact,
    lineage_key,
    path_of_uri,
    store_artifact,
    write_durably,
)
from slipstream.stores.protocols import Alias
from slipstream.stores.rules import prunable, unknown_version
from slipstream.versions import Lineage, ModelVersion, Role

# Read by mlflow at its import and at its calls. No retries inside the client: it would repeat a create whose reply was
# lost, and that makes a second version; our callers repeat `register`, which finds the first one.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")

from mlflow import MlflowClient
from mlflow.entities import Metric, ViewType
from mlflow.exceptions import MlflowException

DEFAULT_NAMESPACE = "slipstream"
"""The experiment, and the first part of the registered models' names."""

_MODEL_TAG = "slipstream.model"
_REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED")
_MISTAKES = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")


class MlflowRegistry:
    """A `ModelRegistry` on a tracking URI (`sqlite:///FILE`, `http://HOST:PORT`, ...); connects at the first call.

    Files lie under `artifact_root`, which every process of the deployment must see at the same path. Lineages of
    pruned versions are kept there in `MODEL.pruned.jsonl`.
    """

    def __init__(self, tracking_uri: str, *, artifact_root: Path, namespace: str = DEFAULT_NAMESPACE) -> None:
        self._tracking_uri = tracking_uri
        self._root = artifact_root.absolute()
        self._namespace = checked_name("namespace", namespace)
        self._connected: MlflowClient | None = None

    def register(self, role: Role, domain: str, artifact_dir: Path, *, digest: str, lineage: Lineage) -> ModelVersion:
        """See `ModelRegistry.register`."""
        name, key = self._model(role, domain), lineage_key(digest, lineage)
        with self._writing(), self._translated():
            found = self._search(name, f" AND tags.lineage_key = '{key}'")
            if found:
                return _version(found[0], role, domain)
            run_id, directory = self._run(name)
            uri = store_artifact(artifact_dir, directory / key)
            self._create_model(name)
            tags = {"digest": digest, "lineage": msgspec.json.encode(lineage).decode(), "lineage_key": key}
            created = self._client().create_model_version(
                name, source=uri, run_id=run_id, tags=tags, await_creation_for=0
            )
            return ModelVersion(
                role=role,
                domain=domain,
                version=int(created.version),
                artifact_uri=uri,
                digest=digest,
                lineage=lineage,
                created_at=created.creation_timestamp / 1000,
            )

    def get(self, role: Role, domain: str, version: int) -> ModelVersion:
        """See `ModelRegistry.get`."""
        name = self._model(role, domain)
        try:
            with self._translated():
                return _version(self._client().get_model_version(name, str(version)), role, domain)
        except _Missing as error:
            raise unknown_version(
                role, domain, version, [one.version for one in self.versions(role, domain)]
            ) from error

    def versions(self, role: Role, domain: str) -> list[ModelVersion]:
        """See `ModelRegistry.versions`."""
        with self._translated():
            found = self._search(self._model(role, domain))
        return sorted((_version(one, role, domain) for one in found), key=lambda one: one.version)

    def set_alias(self, role: Role, domain: str, alias: Alias, version: int) -> None:
        """See `ModelRegistry.set_alias`."""
        self.get(role, domain, version)
        with self._translated():
            self._client().set_registered_model_alias(self._model(role, domain), alias, str(version))

    def alias(self, role: Role, domain: str, alias: Alias) -> int | None:
        """See `ModelRegistry.alias`."""
        return self._aliases(role, domain).get(alias)

    def record_report(self, report: EvaluationReport) -> None:
        """See `ModelRegistry.record_report`; its figures become metrics of the run, with the version as their step."""
        version = self.get(report.role, report.domain, report.challenger_version)
        with self._writing():
            write_durably(_report_path(version), msgspec.msgpack.encode(report))
        with self._translated():
            run_id, _ = self._run(self._model(report.role, report.domain))
            self._client().log_batch(run_id, metrics=_metrics(report))

    def report(self, role: Role, domain: str, version: int) -> EvaluationReport | None:
        """See `ModelRegistry.report`."""
        path = _report_path(self.get(role, domain, version))
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=EvaluationReport)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreError(f"{path} is no evaluation report: {error}; another program wrote it") from error

    def prune(self, role: Role, domain: str, *, keep: int, protected: frozenset[int] = frozenset()) -> list[int]:
        """See `ModelRegistry.prune`."""
        name = self._model(role, domain)
        with self._writing():
            kept = {one.version: one for one in self.versions(role, domain)}
            spared = protected | set(self._aliases(role, domain).values())
            gone = prunable(list(kept), keep=keep, spared=spared)
            # In this order a kill in between leaves a version to prune again, never a lineage lost.
            self._keep_lineages(name, {version: kept[version].lineage for version in gone})
            for version in gone:
                delete_artifact(kept[version].artifact_uri, root=self._root)
                _report_path(kept[version]).unlink(missing_ok=True)
                with self._translated():
                    self._client().delete_model_version(name, str(version))
            return gone

    def lineages(self, role: Role, domain: str) -> dict[int, Lineage]:
        """See `ModelRegistry.lineages`."""
        lineages = _read_lineages(self._pruned_path(self._model(role, domain)))
        lineages.update({one.version: one.lineage for one in self.versions(role, domain)})
        return dict(sorted(lineages.items()))

    def close(self) -> None:
        """Nothing to release: the client opens a connection per call."""

    def _client(self) -> MlflowClient:
        if self._connected is None:
            # A first connection to SQLite creates the tables; two processes at once would collide.
            with self._locked("connect"):
                self._connected = MlflowClient(tracking_uri=self._tracking_uri, registry_uri=self._tracking_uri)
                if self._tracking_uri.startswith("sqlite"):
                    self._connected.search_experiments(max_results=1)
                    self._connected.search_registered_models(max_results=1)
        return self._connected

    def _model(self, role: Role, domain: str) -> str:
        return f"{self._namespace}.{role}.{checked_name('domain', domain)}"

    def _search(self, name: str, condition: str = "") -> list[Any]:
        found: list[Any] = []
        token = None
        while token is None or token:
            page = self._client().search_model_versions(f"name = '{name}'{condition}", page_token=token)
            found.extend(page)
            token = page.token or ""
        return found

    def _aliases(self, role: Role, domain: str) -> dict[str, int]:
        try:
            with self._translated():
                aliases = self._client().get_registered_model(self._model(role, domain)).aliases
        except _Missing:
            return {}
        return {alias: int(version) for alias, version in aliases.items()}

    def _create_model(self, name: str) -> None:
        try:
            self._client().create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _run(self, name: str) -> tuple[str, Path]:
        """The run beside a registered model, made if missing, and its artifact directory."""
        client = self._client()
        experiment = client.get_experiment_by_name(self._namespace)
        experiment_id = (
            client.create_experiment(self._namespace, artifact_location=self._root.as_uri())
            if experiment is None
            else experiment.experiment_id
        )
        condition = f"tags.`{_MODEL_TAG}` = '{name}'"
        runs = client.search_runs([experiment_id], condition, ViewType.ACTIVE_ONLY, max_results=1)
        run = runs[0] if runs else client.create_run(experiment_id, run_name=name, tags={_MODEL_TAG: name})
        directory = path_of_uri(run.info.artifact_uri)
        if urlsplit(run.info.artifact_uri).scheme != "file" or not directory.is_relative_to(self._root):
            raise ConfigError(
                f"experiment {self._namespace!r} keeps its files at {run.info.artifact_uri}, expected a place below "
                f"{self._root}; start with the state directory it was made with, or give MLflow a fresh database"
            )
        return run.info.run_id, directory

    def _pruned_path(self, name: str) -> Path:
        return self._root / f"{name}.pruned.jsonl"

    def _keep_lineages(self, name: str, lineages: dict[int, Lineage]) -> None:
        if lineages:
            path = self._pruned_path(name)
            known = {**_read_lineages(path), **lineages}
            lines = [msgspec.json.encode((version, lineage)) for version, lineage in sorted(known.items())]
            write_durably(path, b"\n".join(lines) + b"\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._locked("write"):
            yield

    @contextlib.contextmanager
    def _locked(self, what: str) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / f".{what}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the client as errors of ours."""
        try:
            yield
        except MlflowException as error:
            first_line = next(iter(str(error).splitlines()), "no reason given")
            text = redacted(f"mlflow at {self._tracking_uri}: {first_line}")
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise _Missing(text) from error
            if error.error_code in _REFUSALS:
                raise ConfigError(f"{text}; correct the credentials") from error
            if error.error_code in _MISTAKES:
                raise StoreError(text) from error
            raise StoreUnavailable(text) from error


class _Missing(StoreError):
    """MLflow knows no such thing."""


def _version(found: Any, role: Role, domain: str) -> ModelVersion:
    try:
        lineage = msgspec.json.decode(found.tags["lineage"], type=Lineage)
        digest = found.tags["digest"]
    except (KeyError, msgspec.MsgspecError) as error:
        raise StoreError(
            f"mlflow version {found.version} of {found.name} is none of ours ({error!r}); another program made it: "
            "delete it there"
        ) from error
    return ModelVersion(
        role=role,
        domain=domain,
        version=int(found.version),
        artifact_uri=found.source,
        digest=digest,
        lineage=lineage,
        created_at=found.creation_timestamp / 1000,
    )


def _report_path(version: ModelVersion) -> Path:
    artifact = path_of_uri(version.artifact_uri)
    return artifact.parent / "reports" / f"{artifact.name}.msgpack"


def _read_lineages(path: Path) -> dict[int, Lineage]:
    if not path.exists():
        return {}
    lines = path.read_bytes().splitlines()
    return dict(msgspec.json.decode(line, type=tuple[int, Lineage]) for line in lines)


def _metrics(report: EvaluationReport) -> list[Metric]:
    """The figures of a report that the dashboard draws over versions; `overlap` is a mean probability mass."""
    mean, lower = lower_bound(report.recent, error_rate=0.05)
    figures = {"gain": mean, "gain_lower_bound": lower}
    figures |= {"overlap": report.challenger_overlap, "champion_overlap": report.champion_overlap}
    for one in report.domains:
        domain = re.sub(r"[^A-Za-z0-9._-]", "_", one.domain)[:64]
        figures[f"acceptance_length/{domain}"] = one.challenger_acceptance_length
        figures[f"champion_acceptance_length/{domain}"] = one.champion_acceptance_length
        figures[f"acceptance_rate/{domain}"] = one.challenger_acceptance_rate
    now_ms = int(time.time() * 1000)
    # The bound of a single request is infinite, and JSON, which carries metrics, knows no infinity.
    drawn = {name: value for name, value in figures.items() if math.isfinite(value)}
    return [Metric(name, value, now_ms, report.challenger_version) for name, value in drawn.items()]
