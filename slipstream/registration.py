"""Versions that were not trained here: a draft from anywhere, checked, registered, and offered to the gate."""

from __future__ import annotations

import tempfile
from pathlib import Path

from slipstream.config import Settings, served_places
from slipstream.errors import ConfigError
from slipstream.models.checkpoint import check_draft, load_checkpoint, save_checkpoint, target_digest
from slipstream.models.config import read_config
from slipstream.stores.protocols import ModelRegistry
from slipstream.versions import DEFAULT_DOMAIN, Lineage, ModelVersion, Place


def register_draft(
    registry: ModelRegistry, draft_dir: Path, *, domain: str, lineage: Lineage, vocab_size: int
) -> ModelVersion:
    """Register a checkpoint as a draft version; the same directory and lineage again give the same version.

    Raises CheckpointError or ArtifactRejected for a directory that cannot serve.
    """
    draft = load_checkpoint(draft_dir)
    check_draft(draft, vocab_size=vocab_size)
    with tempfile.TemporaryDirectory() as staging:
        digest = save_checkpoint(Path(staging), draft.config, draft.weights)
        return registry.register("draft", domain, Path(staging), digest=digest, lineage=lineage)


def offer_draft(
    registry: ModelRegistry, settings: Settings, draft_dir: Path, *, domain: str, note: str
) -> ModelVersion:
    """Register a draft for the settings' target and make it the domain's challenger: the gate decides from here on.

    Raises ConfigError if nothing follows that domain, CheckpointError or ArtifactRejected for a wrong directory.
    """
    serving = settings.config.serving
    if Place("draft", domain) not in served_places(serving):
        raise ConfigError(
            f"domain is {domain!r}; expected {DEFAULT_DOMAIN!r} or one of serving.draft_domains, "
            f"{list(serving.draft_domains)}: name it there for replicas, promoter and evaluator, then register"
        )
    target = Path(serving.target)
    vocab_size = read_config(target / "config.json").vocab_size
    lineage = Lineage(target_digest=target_digest(target), note=note)
    version = register_draft(registry, draft_dir, domain=domain, lineage=lineage, vocab_size=vocab_size)
    registry.set_alias("draft", domain, "challenger", version.version)
    return version
