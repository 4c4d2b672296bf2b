"""The outermost loop of every worker and of the promoter: turns until told to stop, outages, errors, signals."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from prometheus_client import start_http_server

from slipstream.config import Settings, load_config
from slipstream.errors import CheckpointError, ConfigError, StoreUnavailable
from slipstream.telemetry import WorkerMetrics, configure_logging

_logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
_STORES = "stores"


def run_process(module: str, run: Callable[[Settings], None]) -> int:
    """Run a process until it is told to stop; its exit code: 2, after one line, for a wrong setting or checkpoint."""
    configure_logging(module.rpartition(".")[2])
    try:
        run(load_config())
    except (ConfigError, CheckpointError) as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    return 0


def run_turns(turn: Callable[[], bool], *, stop: threading.Event, metrics: WorkerMetrics, idle_s: float = 1.0) -> None:
    """Call `turn` until `stop` is set; it returns whether there may be more to do at once.

    While a store is down the pauses grow to 8 s; an outage is one log line at its start and one at its end. Any other
    error is logged with its traceback, counted, and the loop goes on. ConfigError ends it: waiting would not help.
    """
    pause_s, down_since = _FIRST_PAUSE_S, None
    metrics.store_up.labels(_STORES).set(1)
    while not stop.is_set():
        try:
            is_busy = turn()
        except ConfigError:
            raise
        except StoreUnavailable as error:
            if down_since is None:
                down_since = time.monotonic()
                metrics.store_up.labels(_STORES).set(0)
                _logger.warning("store unavailable: %s; trying again until it answers", error)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except Exception:
            # The outermost loop: one bad turn must not end a worker.
            _logger.exception("unexpected error, going on")
            metrics.errors.inc()
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        else:
            if down_since is not None:
                _logger.info("the stores answer again after %.1f s", time.monotonic() - down_since)
                metrics.store_up.labels(_STORES).set(1)
                down_since = None
            pause_s = _FIRST_PAUSE_S
            stop.wait(0.0 if is_busy else idle_s)
            continue
        stop.wait(pause_s)


def run_parts(parts: Sequence[Callable[[], bool]]) -> bool:
    """Call the parts of one turn in order; whether any of them did something.

    A store that is down stops only the part that needs it: the first StoreUnavailable is raised at the end.
    """
    is_busy, outages = False, []
    for part in parts:
        try:
            is_busy |= part()
        except StoreUnavailable as error:
            outages.append(error)
    if outages:
        raise outages[0]
    return is_busy


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; call from the main thread."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stop


def serve_metrics(metrics: WorkerMetrics, address: str | None) -> None:
    """Serve a worker's metrics at `host:port` in a thread; None serves nothing. ConfigError if the port is taken."""
    if address is None:
        return
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), addr=host.strip("[]"), registry=metrics.registry)
    except OSError as error:
        raise ConfigError(f"SLIPSTREAM_METRICS={address}: {error.strerror}; name a free port of this host") from error
