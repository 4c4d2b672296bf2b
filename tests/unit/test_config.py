"""A wrong setting stops the start with its name; the set of knobs is frozen; secrets stay out of messages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from slipstream.config import Addresses, Config, Tenant, load_config, load_tenants, log_kind, served_places
from slipstream.errors import ConfigError
from slipstream.versions import DRAFT, MATRIX

KNOBS = {
    "serving": {
        "target",
        "initial_draft",
        "draft_domains",  # a draft costs memory, and callers name domains: only an operator can say which are worth it
        "model_name",
        "host",
        "port",
        "num_replicas",
        "num_threads",
        "device",  # weights, cache and numbers differ by it, so it is not guessed from what the machine has
        "max_running_requests",
        "max_queued_requests",
        "max_step_tokens",
        "max_context_tokens",
        "kv_cache_tokens",  # memory no longer follows from slots times context: blocks are shared, so it needs a bound
        "drafting",  # "auto" decides by what it measures; the others are for comparison, and to be sure
        "num_draft_tokens",
        "max_draft_nodes",  # what the budget may reach: memory for nodes is set aside at start
        "pointer_poll_s",
    },
    "observing": {"top_n", "max_queued_records", "log_max_records"},
    "learning": {
        "observations_per_version",
        "steps_per_version",
        "batch_sequences",
        "learning_rate",
        "replay_ratio",
        "replay_per_domain",
        "keep_versions",
        "num_threads",
    },
    "gate": {"margin", "domain_tolerance", "error_rate", "min_requests", "recent_requests"},
}
ADDRESSES = {"redis", "kafka", "mlflow", "api_keys", "metrics"}


def test_the_set_of_knobs_is_frozen() -> None:
    """A new knob replaces one or proves that it is needed; then it is added here."""
    seen = {table.name: {knob.name for knob in msgspec.structs.fields(table.type)} for table in fields_of(Config)}
    assert seen == KNOBS
    assert {address.name for address in fields_of(Addresses)} == ADDRESSES


def fields_of(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(kind)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "slipstream.toml"


def load_text(toml: Path, text: str) -> Config:
    toml.write_text(text)
    return load_config({"SLIPSTREAM_CONFIG": str(toml)}).config


def test_without_a_file_everything_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_config({})
    assert settings.config == Config()
    assert settings.addresses == Addresses()
    assert settings.state_dir == tmp_path / ".state"


def test_a_file_beside_the_process_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slipstream.toml").write_text("[serving]\nport = 9001\n")
    assert load_config({}).config.serving.port == 9001


def test_named_values_replace_defaults_and_leave_the_others(toml: Path) -> None:
    config = load_text(toml, "[gate]\nmargin = 0.5\n[learning]\nreplay_ratio = 0\n")
    assert (config.gate.margin, config.learning.replay_ratio) == (0.5, 0.0)
    assert config.serving == Config().serving


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[serving]\nprot = 1\n", "prot"),
        ("[servng]\nport = 1\n", "servng"),
        ("port = 1\n", "port"),
        ("[serving]\nport = 0\n", r"serving\.port"),
        ('[serving]\ndraft_domains = ["Math"]\n', r"serving\.draft_domains"),
        ('[serving]\ndraft_domains = ["../math"]\n', r"serving\.draft_domains"),
        (f"[serving]\ndraft_domains = {[f'd{number}' for number in range(16)]}\n", r"serving\.draft_domains"),
        ("[serving]\nport = 65536\n", r"serving\.port"),
        ("[serving]\nport = '8000'\n", r"serving\.port"),
        ("[serving]\nnum_draft_tokens = 17\n", r"serving\.num_draft_tokens"),
        ("[serving]\nnum_draft_tokens = -1\n", r"serving\.num_draft_tokens"),
        ("[serving]\nmax_queued_requests = 1.5\n", r"serving\.max_queued_requests"),
        ("[serving]\npointer_poll_s = 0\n", r"serving\.pointer_poll_s"),
        ("[serving]\npointer_poll_s = '2s'\n", r"serving\.pointer_poll_s"),
        ("[observing]\ntop_n = 0\n", r"observing\.top_n"),
        ("[observing]\ntop_n = 257\n", r"observing\.top_n"),
        ("[observing]\nlog_max_records = 0\n", r"observing\.log_max_records"),
        ("[learning]\nreplay_ratio = 1\n", r"learning\.replay_ratio"),
        ("[learning]\nlearning_rate = -0.1\n", r"learning\.learning_rate"),
        ("[learning]\nkeep_versions = 0\n", r"learning\.keep_versions"),
        ("[gate]\nerror_rate = 0.5\n", r"gate\.error_rate"),
        ("[gate]\nmin_requests = true\n", r"gate\.min_requests"),
        ('[serving]\ndevice = "gpu"\n', r"serving\.device"),
        ("[serving\n", "slipstream.toml"),
        ("\xff", "slipstream.toml"),
    ],
)
def test_an_unknown_key_a_wrong_type_or_range_is_named(toml: Path, text: str, named: str) -> None:
    toml.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=named):
        load_config({"SLIPSTREAM_CONFIG": str(toml)})


@pytest.mark.parametrize("domains", ['["sql", "sql"]', '["default"]'])
def test_domains_named_twice_or_like_the_default_stop_the_start(toml: Path, domains: str) -> None:
    with pytest.raises(ConfigError, match=r"serving\.draft_domains is .*different names without 'default'"):
        load_text(toml, f"[serving]\ndraft_domains = {domains}\n")


def test_every_domain_with_a_draft_is_served_beside_the_default_one_and_the_matrix(toml: Path) -> None:
    assert served_places(Config().serving) == (DRAFT, MATRIX)
    serving = load_text(toml, '[serving]\ndraft_domains = ["sql", "math_2"]\n').serving
    assert served_places(serving) == (DRAFT, ("draft", "sql"), ("draft", "math_2"), MATRIX)


def test_a_cache_smaller_than_one_context_stops_the_start(toml: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_tokens is 1000; expected at least .*max_context_tokens, 1024"):
        load_text(toml, "[serving]\nkv_cache_tokens = 1000\n")
    assert load_text(toml, "[serving]\nkv_cache_tokens = 1024\n").serving.kv_cache_tokens == 1024


def test_a_named_file_that_is_missing_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load_config({"SLIPSTREAM_CONFIG": str(tmp_path / "absent.toml")})


GOOD = [
    ("SLIPSTREAM_REDIS", "redis://localhost:6379/0"),
    ("SLIPSTREAM_REDIS", "rediss://user:secret@redis.example:6380"),
    ("SLIPSTREAM_REDIS", "unix://:secret@/run/valkey.sock"),
    ("SLIPSTREAM_KAFKA", "localhost:9092"),
    ("SLIPSTREAM_KAFKA", "a.example:9092, b.example:9093,[::1]:9094"),
    ("SLIPSTREAM_MLFLOW", "http://localhost:5000"),
    ("SLIPSTREAM_MLFLOW", "sqlite:////var/lib/mlflow.db"),
    ("SLIPSTREAM_MLFLOW", "postgresql://mlflow@db.example/mlflow"),
]


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_a_well_formed_address_is_kept_as_it_is(name: str, value: str) -> None:
    addresses = load_config({name: value}).addresses
    assert value in (addresses.redis, addresses.kafka, addresses.mlflow)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLIPSTREAM_REDIS", "localhost:6379"),
        ("SLIPSTREAM_REDIS", "http://localhost:6379"),
        ("SLIPSTREAM_REDIS", "redis://"),
        ("SLIPSTREAM_REDIS", "redis://localhost:port"),
        ("SLIPSTREAM_REDIS", "redis://localhost:99999"),
        ("SLIPSTREAM_REDIS", "unix://"),
        ("SLIPSTREAM_REDIS", "redis://[::1"),
        ("SLIPSTREAM_KAFKA", "localhost"),
        ("SLIPSTREAM_KAFKA", "localhost:0"),
        ("SLIPSTREAM_KAFKA", "localhost:70000"),
        ("SLIPSTREAM_KAFKA", "localhost:9092,"),
        ("SLIPSTREAM_KAFKA", "kafka://localhost:9092"),
        ("SLIPSTREAM_MLFLOW", "./mlruns"),
        ("SLIPSTREAM_MLFLOW", "file:///mlruns"),
        ("SLIPSTREAM_MLFLOW", "sqlite://"),
        ("SLIPSTREAM_MLFLOW", "http://"),
        ("SLIPSTREAM_METRICS", "replica"),
    ],
)
def test_a_malformed_address_is_named_with_what_is_expected(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*expected"):
        load_config({name: value})


@pytest.mark.parametrize(
    "url",
    [
        "http://:hunter2@localhost:6379",
        "redis://user:hunter2@localhost:port",
        "redis://:hunter2/with-slash@localhost:6379",
        "redis://:hunter2@twice@localhost:none",
        "tcp:///run/valkey.sock?password=hunter2",
    ],
)
def test_a_malformed_address_does_not_show_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"SLIPSTREAM_REDIS": url})
    assert "hunter2" not in str(caught.value)


def test_naming_brokers_puts_the_log_on_kafka() -> None:
    assert log_kind(Addresses(kafka="localhost:9092", redis="redis://localhost")) == "kafka"
    assert log_kind(Addresses(redis="redis://localhost")) == "redis"


def test_tenants_are_read_by_name(tmp_path: Path) -> None:
    path, digest = tmp_path / "tenants.toml", hashlib.sha256(b"key").hexdigest()
    path.write_text(f'[tenants.acme]\nkey_sha256 = "{digest}"\n[tenants.shy]\nkey_sha256 = "{digest}"\ntrain = false\n')
    assert load_tenants(str(path)) == {"acme": Tenant(key_sha256=digest), "shy": Tenant(key_sha256=digest, train=False)}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "tenants"),
        ("[tenants]\n", "no tenants"),
        ('[tenants.acme]\nkey_sha256 = "plain-key"\n', "key_sha256"),
        ("[tenants.acme]\ntrain = true\n", "key_sha256"),
        (f'[tenants.acme]\nkey_sha256 = "{"0" * 64}"\ntarin = false\n', "tarin"),
    ],
)
def test_a_broken_file_of_tenants_stops_the_start(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_tenants(str(path))
