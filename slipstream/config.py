"""One TOML file for settings, environment variables for addresses and secrets; read once, checked whole.

    SLIPSTREAM_CONFIG     path of the TOML file (default: slipstream.toml beside the process if there is one)
    SLIPSTREAM_STATE      directory for what must outlive a restart (default: .state)
    SLIPSTREAM_REDIS      redis://, rediss:// or unix:// URL of the pointer store (and of the log, if that is Redis)
    SLIPSTREAM_KAFKA      host:port[,host:port...] of the Kafka brokers; naming it puts the observation log on Kafka
    SLIPSTREAM_MLFLOW     tracking URI of the registry: http(s)://, sqlite:/// or postgresql://
    SLIPSTREAM_METRICS    host:port where a worker or the promoter serves its /metrics; without it they serve none
    SLIPSTREAM_API_KEYS   path of a TOML file of tenants; without it every caller is the tenant `anonymous`

A wrong value stops the start with the value seen and the value expected. Constructors elsewhere take values, never
the `Config`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec

from slipstream.errors import ConfigError
from slipstream.promotion import PromotionGate
from slipstream.versions import DRAFT, MATRIX, Place

_GATE = PromotionGate()

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
DomainName = Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9_-]{0,31}$")]


class ServingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The target's replicas and their HTTP face; `initial_draft` is the draft of day one, "" for none.

    `draft_domains` are the domains that may have drafts of their own, beside the one of all others: each costs a
    replica the memory of a draft.
    `drafting` "auto" drafts with everything there is, at most `max_draft_nodes` nodes a request, and only as much as is
    expected to make answers faster; "chain" with the draft model alone and always `num_draft_tokens` tokens (what the
    evaluator compares drafts with), "off" not at all. Output is the same.
    `kv_cache_tokens` is the K/V cache of a replica in positions, rounded up to blocks of 16: what bounds its memory.
    `device` is where the target and its draft run: a GPU in the machine may be meant for something else.
    """

    target: str = "deploy/models/mix-moe-11m"
    initial_draft: str = ""
    draft_domains: Annotated[tuple[DomainName, ...], msgspec.Meta(max_length=15)] = ()
    model_name: str = ""
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8000
    num_replicas: PositiveInt = 1
    num_threads: PositiveInt = 1
    device: Literal["cpu", "cuda"] = "cpu"
    max_running_requests: PositiveInt = 32
    max_queued_requests: PositiveInt = 64
    max_step_tokens: PositiveInt = 512
    max_context_tokens: PositiveInt = 1024
    kv_cache_tokens: PositiveInt = 16384
    drafting: Literal["auto", "chain", "off"] = "auto"
    num_draft_tokens: Annotated[int, msgspec.Meta(ge=0, le=16)] = 2
    max_draft_nodes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 16
    pointer_poll_s: PositiveFloat = 2.0


class ObservingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a replica writes to the log."""

    top_n: Annotated[int, msgspec.Meta(ge=1, le=256)] = 16
    max_queued_records: PositiveInt = 1024
    log_max_records: PositiveInt = 20_000


class LearningConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The distiller: when it trains and what it keeps."""

    observations_per_version: PositiveInt = 48
    steps_per_version: PositiveInt = 120
    batch_sequences: PositiveInt = 4
    learning_rate: PositiveFloat = 3e-3
    replay_ratio: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.5
    replay_per_domain: PositiveInt = 512
    keep_versions: PositiveInt = 20
    num_threads: PositiveInt = 1


class GateConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The evaluator's window and the promotion gate; lengths in tokens per verification pass."""

    margin: float = _GATE.margin
    domain_tolerance: float = _GATE.domain_tolerance
    error_rate: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = _GATE.error_rate
    min_requests: PositiveInt = _GATE.min_requests
    recent_requests: PositiveInt = 48


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """Where the stores are; None means the embedded or local default."""

    redis: str | None = None
    kafka: str | None = None
    mlflow: str | None = None
    api_keys: str | None = None
    metrics: str | None = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a process reads at its start."""

    serving: ServingConfig = ServingConfig()
    observing: ObservingConfig = ObservingConfig()
    learning: LearningConfig = LearningConfig()
    gate: GateConfig = GateConfig()


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A config with the addresses and the state directory of this process."""

    config: Config
    addresses: Addresses
    state_dir: Path


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A caller: the SHA-256 (hex) of its API key, and whether its requests may be learned from."""

    key_sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    train: bool = True


class _Tenants(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenants: dict[str, Tenant]


def load_config(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings that these environment variables (default: the process's) name.

    Raises ConfigError for a missing file, an unknown key, a wrong type or range, or a malformed address.
    """
    environ = os.environ if environ is None else environ
    named = environ.get("SLIPSTREAM_CONFIG")
    path = Path(named or "slipstream.toml")
    config = _read_toml(path, Config) if named or path.exists() else Config()
    if config.serving.kv_cache_tokens < config.serving.max_context_tokens:
        raise ConfigError(
            f"serving.kv_cache_tokens is {config.serving.kv_cache_tokens}; expected at least "
            f"serving.max_context_tokens, {config.serving.max_context_tokens}, or no request of that length ever fits"
        )
    domains = (DRAFT.domain, *config.serving.draft_domains)
    if len(set(domains)) < len(domains):
        raise ConfigError(
            f"serving.draft_domains is {list(domains[1:])}; expected different names without {DRAFT.domain!r}, which "
            "always has a draft"
        )
    addresses = Addresses(
        redis=_checked_url("SLIPSTREAM_REDIS", environ, ("redis", "rediss", "unix")),
        kafka=_checked_hosts("SLIPSTREAM_KAFKA", environ),
        mlflow=_checked_url("SLIPSTREAM_MLFLOW", environ, ("http", "https", "sqlite", "postgresql", "mysql")),
        api_keys=environ.get("SLIPSTREAM_API_KEYS") or None,
        metrics=_checked_hosts("SLIPSTREAM_METRICS", environ),
    )
    return Settings(
        config=config,
        addresses=addresses,
        state_dir=Path(environ.get("SLIPSTREAM_STATE") or ".state").absolute(),
    )


def served_places(serving: ServingConfig) -> tuple[Place, ...]:
    """What replicas follow, the promoter moves and the evaluator judges: every draft's place, and the matrix's."""
    return (DRAFT, *(Place("draft", domain) for domain in serving.draft_domains), MATRIX)


def load_tenants(path: str) -> dict[str, Tenant]:
    """Tenants by name from a TOML file of `[tenants.NAME]` tables; raises ConfigError."""
    tenants = _read_toml(Path(path), _Tenants).tenants
    if not tenants:
        raise ConfigError(f"{path}: no tenants, expected at least one [tenants.NAME] table with key_sha256")
    return tenants


_T = TypeVar("_T")


def _read_toml(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; expected a TOML file") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; correct the file and start again") from error


def _checked_url(name: str, environ: Mapping[str, str], schemes: tuple[str, ...]) -> str | None:
    value = environ.get(name)
    if not value:
        return None
    try:
        parts = urlsplit(value)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        raise ConfigError(f"{name}={redacted(value)}: not a URL; expected {_expected(schemes)}") from None
    has_place = bool(parts.path) if parts.scheme in ("unix", "sqlite") else bool(parts.hostname)
    if parts.scheme not in schemes or not has_place or not port_is_valid:
        raise ConfigError(f"{name}={redacted(value)}: expected {_expected(schemes)}")
    return value


def _checked_hosts(name: str, environ: Mapping[str, str]) -> str | None:
    value = environ.get(name)
    if not value:
        return None
    for broker in value.split(","):
        match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(\d{1,5})", broker.strip())
        if match is None or not 0 < int(match[2]) < 65536:
            raise ConfigError(f"{name}={value}: {broker!r} is no host:port; expected host:port[,host:port]")
    return value


def _expected(schemes: tuple[str, ...]) -> str:
    return "a URL that starts with " + " or ".join(f"{scheme}://" for scheme in schemes) + " and names its place"


def redacted(url: str) -> str:
    """`url`, or a text with one in it, without user and password: fit for a message or a log."""
    # Greedy, up to the last @: a password may hold a slash or an @, which is then just what is wrong with the URL.
    return re.sub(r"password=[^&]*", "password=***", re.sub(r"//.*@", "//***@", url))


LogKind = Literal["redis", "kafka"]


def log_kind(addresses: Addresses) -> LogKind:
    """Which store holds the observation log: Kafka when brokers are named, else Redis Streams."""
    return "kafka" if addresses.kafka else "redis"
