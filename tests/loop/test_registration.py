"""A draft that was made elsewhere becomes a challenger of its domain, by an operator's command."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream import __main__ as command_line
from slipstream.config import load_config
from slipstream.errors import ArtifactRejected, ConfigError
from slipstream.models.checkpoint import load_checkpoint, save_checkpoint, target_digest
from slipstream.models.decoder import initial_draft
from slipstream.registration import offer_draft
from slipstream.stores.memory import MemoryRegistry
from slipstream.stores.mlflow import MlflowRegistry

MODELS = Path(__file__).parents[2] / "deploy" / "models"
TARGET, GENERAL = MODELS / "mix-moe-11m", MODELS / "draft-2m-general"


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """The environment of a deployment whose domain sql may have a draft of its own."""
    config = tmp_path / "slipstream.toml"
    config.write_text(f'[serving]\ntarget = "{TARGET}"\ndraft_domains = ["sql"]\n')
    return {"SLIPSTREAM_CONFIG": str(config), "SLIPSTREAM_STATE": str(tmp_path / "state")}


def test_an_offered_draft_is_the_domains_challenger_and_names_its_target(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    registry = MemoryRegistry(tmp_path / "artifacts")
    version = offer_draft(registry, load_config(variables), GENERAL, domain="sql", note="made by hand")
    assert (version.role, version.domain, version.version) == ("draft", "sql", 1)
    assert version.digest == load_checkpoint(GENERAL).digest
    assert version.lineage.target_digest == target_digest(TARGET)
    assert registry.alias("draft", "sql", "challenger") == 1
    assert registry.alias("draft", "default", "challenger") is None
    assert offer_draft(registry, load_config(variables), GENERAL, domain="sql", note="made by hand") == version


def test_a_domain_that_nothing_follows_and_a_draft_of_another_vocabulary_are_refused(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    registry, settings = MemoryRegistry(tmp_path / "artifacts"), load_config(variables)
    with pytest.raises(ConfigError, match=r"'math'; expected 'default' or one of serving.draft_domains, \['sql'\]"):
        offer_draft(registry, settings, GENERAL, domain="math", note="")
    save_checkpoint(tmp_path / "odd", *initial_draft(512, seed=1))
    with pytest.raises(ArtifactRejected, match="512"):
        offer_draft(registry, settings, tmp_path / "odd", domain="sql", note="")
    assert registry.versions("draft", "sql") == []


def test_the_command_registers_in_the_registry_of_the_settings(
    tmp_path: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("SLIPSTREAM_MLFLOW", "SLIPSTREAM_REDIS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "state").mkdir()
    assert command_line.main(["register", str(GENERAL), "--domain", "sql"]) == 0
    assert "draft/sql has v1" in capsys.readouterr().out
    state = tmp_path / "state"
    registry = MlflowRegistry(f"sqlite:///{state / 'mlflow.db'}", artifact_root=state / "artifacts")
    assert registry.alias("draft", "sql", "challenger") == 1
    assert command_line.main(["register", str(tmp_path / "none"), "--domain", "sql"]) == 1
    assert "is no directory" in capsys.readouterr().err
