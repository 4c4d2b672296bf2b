"""The settings decide which store opens, and no process imports a client it does not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.config import load_config
from slipstream.errors import ConfigError
from slipstream.stores.kafka import KafkaLog
from slipstream.stores.mlflow import MlflowRegistry
from slipstream.stores.opening import open_log, open_pointers, open_registry
from slipstream.stores.redis import RedisLog, RedisPointers

REDIS = {"SLIPSTREAM_REDIS": "redis://127.0.0.1:1"}


def test_kafka_holds_the_log_when_it_is_named_else_redis(tmp_path: Path) -> None:
    assert isinstance(open_log(load_config({**REDIS, "SLIPSTREAM_KAFKA": "127.0.0.1:1"})), KafkaLog)
    assert isinstance(open_log(load_config(REDIS)), RedisLog)


def test_pointers_and_registry_open_while_their_servers_are_down(tmp_path: Path) -> None:
    settings = load_config({**REDIS, "SLIPSTREAM_MLFLOW": "http://127.0.0.1:1", "SLIPSTREAM_STATE": str(tmp_path)})
    assert isinstance(open_pointers(settings), RedisPointers)
    assert isinstance(open_registry(settings), MlflowRegistry)


def test_no_address_for_redis_is_a_config_error() -> None:
    for open_one in (open_log, open_pointers):
        with pytest.raises(ConfigError, match="SLIPSTREAM_REDIS is not set"):
            open_one(load_config({}))


def test_a_replicas_stores_import_neither_mlflow_nor_kafka() -> None:
    code = (
        "import sys\n"
        "from slipstream.config import load_config\n"
        "from slipstream.stores.opening import open_log, open_pointers\n"
        "settings = load_config({'SLIPSTREAM_REDIS': 'redis://127.0.0.1:1'})\n"
        "open_log(settings), open_pointers(settings)\n"
        "print(sorted({'mlflow', 'kafka', 'redis'} & set(sys.modules)))\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "['redis']\n"
