"""The service: a local Ray, Ray Serve on it, the replicas, and an orderly end."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

from services.target.data_path import data_path_environment
from services.target.deployment import ReplicaProcess
from services.target.run_dir import RunDir
from slipstream.config import ServingConfig, Settings, load_tenants
from slipstream.errors import CheckpointError, ConfigError
from slipstream.models.config import read_config

logger = logging.getLogger(__name__)

APPLICATION = "slipstream"
_SPARE_REQUESTS = 128
"""HTTP requests Serve lets through beyond the engine's queue, so that the engine's own 429 is the one callers see."""

_NODE = "127.0.0.1"


def check_settings(settings: Settings) -> Path:
    """The target's directory, after everything was checked that can be without loading it.

    Raises ConfigError or CheckpointError with one clear line.
    """
    serving = settings.config.serving
    directory = Path(serving.target).absolute()
    read_config(directory / "config.json")
    for pattern, what in (("*.safetensors", "weights"), ("tokenizer.json", "a tokenizer")):
        if not any(directory.glob(pattern)):
            raise CheckpointError(f"{directory} has no {pattern}, expected {what}; set serving.target to a checkpoint")
    if settings.addresses.api_keys is not None:
        load_tenants(settings.addresses.api_keys)
    _check_port(serving)
    return directory


def serve_until_stopped(settings: Settings, directory: Path) -> None:
    """Start the service and return after SIGTERM or SIGINT, with every process gone and the port free.

    Raises ConfigError or CheckpointError if a replica refuses its settings or its target.
    """
    run_dir = RunDir(settings.state_dir)
    try:
        _prepare_environment(settings, run_dir)
        _serve(settings.config.serving, directory, run_dir.path)
    except KeyboardInterrupt:
        logger.info("stopped during the start")
    finally:
        run_dir.release()


def _serve(serving: ServingConfig, directory: Path, run_dir: Path) -> None:
    # Ray reads its environment when it is imported, so it is imported after that has been set.
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415

    try:
        _start_ray(serving, run_dir)
        _on_signals(signal.default_int_handler)
        _deploy(serving, directory)
        _wait_for_signal(serving)
    finally:
        _on_signals(signal.SIG_IGN)
        logger.info("stopping")
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()


def _start_ray(serving: ServingConfig, run_dir: Path) -> None:
    import ray  # noqa: PLC0415 - see _serve

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=1,
        object_store_memory=100 * 2**20,
        _temp_dir=str(run_dir / "ray"),
        _node_ip_address=_NODE,
        logging_level=logging.WARNING,
    )
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    if serving.device == "cuda" and num_gpus < serving.num_replicas:
        # Serve would wait for the missing devices, without a word and without end.
        raise ConfigError(
            f"serving.device is 'cuda' with serving.num_replicas = {serving.num_replicas}; Ray sees {num_gpus} GPUs "
            "here, expected one for each replica: lower the number, or set serving.device to 'cpu'"
        )


def _deploy(serving: ServingConfig, directory: Path) -> None:
    from ray import serve  # noqa: PLC0415 - see _serve

    proxy = threading.Thread(target=_start_proxy, args=(serving,), name="proxy", daemon=True)
    proxy.start()
    _wait_for_controller(proxy)
    deployment = serve.deployment(
        name="Replica",
        num_replicas=serving.num_replicas,
        max_ongoing_requests=serving.max_running_requests + serving.max_queued_requests + _SPARE_REQUESTS,
        max_queued_requests=10 * _SPARE_REQUESTS,
        max_constructor_retry_count=1,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0, "num_gpus": int(serving.device == "cuda")},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )(serve.ingress()(ReplicaProcess))
    try:
        serve.run(deployment.bind(str(directory), model_name(serving, directory)), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise _start_error(_deployment_message() or str(error)) from error


def _deployment_message() -> str:
    """What Serve's controller knows of a deployment that failed: the traceback of the replica's constructor."""
    from ray import serve  # noqa: PLC0415 - see _serve

    application = serve.status().applications.get(APPLICATION)
    return "\n".join(one.message for one in application.deployments.values()) if application else ""


def _start_proxy(serving: ServingConfig) -> None:
    """Start Serve; returns when its proxy listens. The replicas load meanwhile, which saves some 3 s of the start."""
    from ray import serve  # noqa: PLC0415 - see _serve
    from ray.serve.config import HTTPOptions  # noqa: PLC0415

    serve.start(
        http_options=HTTPOptions(host=serving.host, port=serving.port, keep_alive_timeout_s=90),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def _wait_for_controller(proxy: threading.Thread) -> None:
    """Until Serve takes deployments; raises RuntimeError if its start failed before."""
    import ray  # noqa: PLC0415 - see _serve

    while True:
        is_starting = proxy.is_alive()
        try:
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        except ValueError:
            if not is_starting:
                raise RuntimeError("Ray Serve did not start; the traceback before this line says why") from None
            time.sleep(0.05)
        else:
            return


def model_name(serving: ServingConfig, directory: Path) -> str:
    """The name callers use for the model: the configured one, else the directory's."""
    return serving.model_name or directory.name


def _wait_for_signal(serving: ServingConfig) -> None:
    logger.info("ready at http://%s:%d", serving.host, serving.port)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        logger.info("asked to stop")


def _on_signals(handler: signal._HANDLER) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _start_error(message: str) -> Exception:
    """What a replica's constructor said, out of Serve's report about it."""
    found = re.search(r"slipstream\.errors\.(CheckpointError|ConfigError): (.+)", message)
    if found is None:
        return RuntimeError(message)
    return CheckpointError(found[2]) if found[1] == "CheckpointError" else ConfigError(found[2])


def _prepare_environment(settings: Settings, run_dir: RunDir) -> None:
    """What Ray and the replicas read from the environment; paths absolute, because workers run elsewhere."""
    environ = os.environ
    environ["SLIPSTREAM_STATE"] = str(settings.state_dir)
    for name in ("SLIPSTREAM_CONFIG", "SLIPSTREAM_API_KEYS"):
        if environ.get(name):
            environ[name] = str(Path(environ[name]).absolute())
    if not environ.get("SLIPSTREAM_CONFIG") and Path("slipstream.toml").exists():
        environ["SLIPSTREAM_CONFIG"] = str(Path("slipstream.toml").absolute())
    environ.setdefault("OMP_NUM_THREADS", str(settings.config.serving.num_threads))
    environ.pop("RAY_ADDRESS", None)
    environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(run_dir.token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        # Ray runs workers at nice 15 by default; ours serve, and must not wait behind everything else.
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "AUTOSCALER_METRIC_PORT": "0",
        "DASHBOARD_METRIC_PORT": "0",
    }
    environ |= data_path_environment(run_dir.path, environ)


def _check_port(serving: ServingConfig) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {serving.host}:{serving.port}: {error.strerror}; set serving.host and serving.port"
            ) from error
