"""Finding a target by path or by its id on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from slipstream.errors import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
"""Data only: no code of a repository is ever fetched, let alone run."""


def target_directory(path_or_hub_id: str) -> Path:
    """The checkpoint directory that a path names, or the local copy of a hub repository (`organisation/name`).

    A directory that exists wins. Raises ConfigError for neither, or if the hub does not give the repository.
    """
    path = Path(path_or_hub_id)
    if path_or_hub_id and path.is_dir():
        return path.absolute()
    if not _HUB_ID.fullmatch(path_or_hub_id):
        raise ConfigError(
            f"target {path_or_hub_id!r} is no directory and no hub id; expected a Hugging Face checkpoint directory or "
            "organisation/name"
        )
    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"target {path_or_hub_id!r} cannot be fetched from the hub: {first_line}; check the name, the network and "
            "HF_TOKEN, or download it and name its directory"
        ) from error
