"""Which implementation of each store the settings name.

Every client library is imported inside the function that needs it: a replica must start without MLflow (2 s and
100 MB of imports), and a machine that keeps its log on Redis needs no Kafka client installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slipstream.config import Settings, log_kind
from slipstream.errors import ConfigError

if TYPE_CHECKING:
    from slipstream.stores.protocols import ModelRegistry, ObservationLog, PointerStore

ARTIFACTS = "artifacts"
"""Folder of the state directory that holds the versions' files."""


def open_log(settings: Settings) -> ObservationLog:
    """The observation log: Kafka when brokers are named, else Redis; connects at the first call.

    Raises ConfigError if neither is named.
    """
    if log_kind(settings.addresses) == "kafka" and settings.addresses.kafka is not None:
        from slipstream.stores.kafka import KafkaLog  # noqa: PLC0415 - see the module's docstring

        return KafkaLog(settings.addresses.kafka)
    from slipstream.stores.redis import RedisLog  # noqa: PLC0415 - see the module's docstring

    return RedisLog(_redis_url(settings), max_records=settings.config.observing.log_max_records)


def open_pointers(settings: Settings) -> PointerStore:
    """The pointer store on Redis; connects at the first call. Raises ConfigError if none is named."""
    from slipstream.stores.redis import RedisPointers  # noqa: PLC0415 - see the module's docstring

    return RedisPointers(_redis_url(settings))


def open_registry(settings: Settings) -> ModelRegistry:
    """The registry on MLflow: the named tracking server, else a SQLite file in the state directory.

    Versions' files lie under `artifacts` in the state directory, which every process must see at the same path.
    """
    from slipstream.stores.mlflow import MlflowRegistry  # noqa: PLC0415 - see the module's docstring

    tracking_uri = settings.addresses.mlflow or f"sqlite:///{settings.state_dir / 'mlflow.db'}"
    return MlflowRegistry(tracking_uri, artifact_root=settings.state_dir / ARTIFACTS)


def _redis_url(settings: Settings) -> str:
    if settings.addresses.redis is None:
        raise ConfigError(
            "SLIPSTREAM_REDIS is not set; expected redis://, rediss:// or unix:// "
            "(`make up` starts a server and sets it)"
        )
    return settings.addresses.redis
