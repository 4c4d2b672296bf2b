from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.errors import ConfigError
from slipstream.models.hub import target_directory


def test_a_directory_wins_over_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "organisation" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert target_directory("organisation/model") == tmp_path / "organisation" / "model"


@pytest.mark.parametrize("name", ["/no/such/checkpoint", "model", "../up/model", "a/b/c", "", "organisation/"])
def test_what_is_neither_directory_nor_hub_id_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="no directory and no hub id"):
        target_directory(name)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"cannot be fetched from the hub.*name its directory"):
        target_directory("organisation/no-such-model-here")
