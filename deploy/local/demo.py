"""`make demo`: the whole loop on this machine, from no draft at all, in about four minutes.

Starts everything (`supervisor`), sends the streams math, sql, code, math (or those of `--queries FILE`), shows what
the service's own counters say, and stops everything. Exit code 0 only if at least two drafts were promoted, the last
one beats the first promoted one on the held-out requests of the second and third stream's domains, no request failed,
and neither a process nor a port is left.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec

from deploy.local import verdict
from deploy.local.demo_screen import ALL_SENT, Screen, StreamRow, draw
from deploy.local.processes import (
    Child,
    Listener,
    all_listeners,
    is_loopback,
    listeners,
    marked_processes,
    unix_peer,
    wait_until,
)
from deploy.local.queries import Query, builtin_streams, file_streams
from deploy.local.supervisor import READY_TIMEOUT_S, ROOT, Endpoints, embedded_socket, read_endpoints, with_target
from deploy.local.traffic import Client, Outcome, connected, measure_speed, send_stream
from deploy.local.watch import Watch, between
from slipstream.acceptance import acceptance_rate
from slipstream.config import Settings, load_config
from slipstream.errors import ConfigError, SlipstreamError
from slipstream.stores.opening import open_log, open_pointers
from slipstream.versions import DEFAULT_DOMAIN, ServingPointer

CONCURRENCY, QUERIES_PER_S = 6, 4.5
BUDGET_S = 255.0
"""Seconds from the start of the demo to the end of its last stream; the streams share what the start left."""

SHARES = {"code": 1.4}
"""A stream's share of that time, 1 if not named: code is what a small draft learns slowest."""

PROBE_S = 7.0
SETTLE_QUERIES, SETTLE_PASSES, SETTLED_WITHIN = 160, 800, 0.02
PROBE_PROMPTS = 4
LOOK_EVERY_S = 1.0
STOP_TIMEOUT_S = 60.0
PICTURE = ROOT / "results" / "demo.png"
DEMO_CONFIG = Path(__file__).with_name("demo.toml")
SEED = 20_250


class Failed(Exception):
    """The demo cannot go on; the message says why."""


class Demo:
    """One run: its state directory, its supervisor and what it saw."""

    def __init__(
        self,
        settings: Settings,
        streams: list[tuple[str, Iterator[Query]]],
        *,
        began_at: float,
        is_other_target: bool = False,
    ) -> None:
        self._settings = settings
        self._began_at = began_at
        self._redis_url = ""
        self._streams = streams
        self.rows = [StreamRow(number, domain) for number, (domain, _) in enumerate(streams, start=1)]
        self.screen = Screen(self.rows)
        self.reasons: list[str] = []
        state = settings.state_dir
        target = ("--target", settings.config.serving.target) if is_other_target else ()
        self._supervisor = Child(
            "supervisor",
            (sys.executable, "-m", "deploy.local.supervisor", "--state", str(state), *target),
            environment=os.environ,
            log=state / "logs" / "supervisor.log",
        )

    def run(self) -> int:
        """The whole demo; returns the exit code."""
        ports: set[Listener] = set()
        try:
            self._supervisor.start(directory=ROOT)
            endpoints = self._wait_until_ready()
            self.screen.say(f"API      {endpoints.api_url}/v1\nmetrics  {endpoints.api_url}/metrics")
            asyncio.run(self._converse(endpoints))
            ports = self._open_ports()
        except (Failed, SlipstreamError, httpx.HTTPError) as error:
            self.reasons.append(f"{type(error).__name__}: {error}; logs: {self._settings.state_dir / 'logs'}")
        except KeyboardInterrupt:
            self.reasons.append("interrupted")
        finally:
            ports |= self._open_ports()
            self._stop(ports)
        return self._conclude()

    def _wait_until_ready(self) -> Endpoints:
        """Show the supervisor's lines until the API serves; raises Failed."""
        num_shown = 0

        def is_ready() -> bool:
            nonlocal num_shown
            lines = self._supervisor.log.read_text().splitlines() if self._supervisor.log.exists() else []
            for line in lines[num_shown:]:
                self.screen.say(f"  {line}")
            num_shown = len(lines)
            endpoints = read_endpoints(self._settings.state_dir)
            return (endpoints is not None and endpoints.is_ready) or not self._supervisor.is_running()

        is_in_time = wait_until(is_ready, timeout_s=READY_TIMEOUT_S)
        endpoints = read_endpoints(self._settings.state_dir)
        if not is_in_time or endpoints is None or not endpoints.is_ready:
            raise Failed(f"the service did not come up: {self._supervisor.last_line()}")
        return endpoints

    async def _converse(self, endpoints: Endpoints) -> None:
        self._redis_url = endpoints.redis_url
        addresses = msgspec.structs.replace(self._settings.addresses, redis=endpoints.redis_url)
        self._settings = msgspec.structs.replace(self._settings, addresses=addresses)
        pointers = open_pointers(self._settings)
        try:
            async with connected(endpoints.api_url) as client:
                await self._show_first_token(client)
                with httpx.Client(base_url=endpoints.api_url, timeout=5.0, trust_env=False) as http:
                    watch = Watch(http, pointers)
                    with self.screen:
                        await self._send_all(client, watch)
            draw(PICTURE, self.rows, watch)
            self._judge(pointers.history("draft", DEFAULT_DOMAIN, limit=1000))
        finally:
            pointers.close()

    async def _show_first_token(self, client: Client) -> None:
        domain, queries = self._streams[0]
        text = await client.first_token(next(queries))
        seconds = time.monotonic() - self._began_at
        initial = self._settings.config.serving.initial_draft
        start = f"starting from {initial}" if initial else f"no draft yet: the first is born from {domain}"
        self.screen.say(f"first token {text!r} after {seconds:.1f} s; {start}")

    async def _send_all(self, client: Client, watch: Watch) -> None:
        looking = asyncio.create_task(self._look(watch))
        try:
            for row, (domain, queries) in zip(self.rows, self._streams, strict=True):
                await self._send_one(client, watch, row, queries)
                row.state = "probing"
                row.speed = await measure_speed(client, queries, num_prompts=PROBE_PROMPTS, errors=row.errors)
                row.state = row.ending
                self.screen.say(f"{row.number} {domain}: {' | '.join(row.cells()[2:])}")
        finally:
            looking.cancel()

    async def _send_one(self, client: Client, watch: Watch, row: StreamRow, queries: Iterator[Query]) -> None:
        await asyncio.to_thread(watch.look)
        row.began_at, row.state = time.monotonic(), "running"
        ends_at = row.began_at + self._share_s(row)

        def count(outcome: Outcome) -> None:
            row.num_queries += 1
            if outcome.error:
                row.errors.append(outcome.error)

        def is_over() -> bool:
            if is_settled(row, watch):
                row.ending = "settled"
            elif time.monotonic() > ends_at:
                row.ending = "cap"
            return row.ending != ALL_SENT

        await send_stream(
            client,
            queries,
            domain=row.domain,
            concurrency=CONCURRENCY,
            queries_per_s=QUERIES_PER_S,
            is_over=is_over,
            on_outcome=count,
        )
        await asyncio.to_thread(watch.look)
        row.ended_at = time.monotonic()
        row.update(watch)

    def _share_s(self, row: StreamRow) -> float:
        """The seconds that this stream may take of what is left for it and those after it."""
        waiting = self.rows[row.number - 1 :]
        left_s = self._began_at + BUDGET_S - time.monotonic() - PROBE_S * len(waiting)
        shares = [SHARES.get(one.domain, 1.0) for one in waiting]
        return max(0.0, left_s) * shares[0] / sum(shares)

    async def _look(self, watch: Watch) -> None:
        announced = False
        while True:
            await asyncio.to_thread(watch.look)
            for row in self.rows:
                if row.state == "running":
                    row.update(watch)
            self.screen.refresh()
            endpoints = read_endpoints(self._settings.state_dir)
            if not announced and endpoints is not None and endpoints.mlflow_url:
                self.screen.say(f"MLflow   {endpoints.mlflow_url}")
                announced = True
            await asyncio.sleep(LOOK_EVERY_S)

    def _judge(self, history: list[ServingPointer]) -> None:
        """Fill `reasons` with what is missing, and print the comparison of the first and the last promoted draft."""
        promoted = verdict.promoted(history)
        self.screen.say(
            f"{len(promoted)} drafts promoted: {', '.join(f'v{one.version}' for one in promoted) or 'none'}"
        )
        if len({one.version for one in promoted}) < 2:
            self.reasons.append(f"{len(promoted)} drafts were promoted, expected at least 2")
            return
        log = open_log(self._settings)
        observations = verdict.held_out(log, group="demo")
        log.close()
        drafts = (verdict.load_draft(promoted[0]), verdict.load_draft(promoted[-1]))
        for domain in dict.fromkeys(row.domain for row in self.rows):
            num_draft_tokens = self._settings.config.serving.num_draft_tokens
            one = verdict.compare(*drafts, observations, domain=domain, num_draft_tokens=num_draft_tokens)
            self.screen.say(
                f"held out, {domain} ({one.num_requests} requests): first v{promoted[0].version} rate "
                f"{one.first_rate:.3f} length {one.first_length:.2f}, last v{promoted[-1].version} rate "
                f"{one.last_rate:.3f} length {one.last_length:.2f}, gain {one.gain:+.3f} (95 %: > {one.gain_low:+.3f})"
            )
            if domain in {row.domain for row in self.rows[1:3]} and not one.gain > 0:
                self.reasons.append(
                    f"{domain}: the last draft gains {one.gain:+.3f} over the first, expected more than 0"
                )

    def _open_ports(self) -> set[Listener]:
        return listeners(marked_processes(self._settings.state_dir))

    def _stop(self, ports: set[Listener]) -> None:
        """Stop everything and look whether anything is left."""
        self._supervisor.ask_to_stop()
        self._supervisor.stop(timeout_s=STOP_TIMEOUT_S)
        processes = marked_processes(self._settings.state_dir)
        valkey = "" if os.environ.get("SLIPSTREAM_REDIS") else embedded_socket(self._redis_url)
        processes += [pid] if valkey and (pid := unix_peer(valkey)) else []
        open_ports = ports & all_listeners()
        outside = sorted(one.port for one in ports if not is_loopback(one.address))
        if processes or open_ports:
            self.reasons.append(f"left behind: processes {processes}, ports {sorted(one.port for one in open_ports)}")
        self.screen.say(f"stopped: {len(processes)} processes left, {len(open_ports)} of {len(ports)} ports still open")
        if outside:  # looked at one by one: all are Ray's, which cannot be told to bind to loopback
            self.screen.say(f"not on loopback while it ran: {outside} (Ray's gRPC behind its token, two metrics pages)")

    def _conclude(self) -> int:
        errors = [error for row in self.rows for error in row.errors]
        if errors:
            self.reasons.append(f"{len(errors)} requests failed, expected 0; the first: {errors[0]}")
        self.screen.summary()
        num_queries = sum(row.num_queries for row in self.rows)
        seconds = time.monotonic() - self._began_at
        self.screen.say(f"{num_queries} queries, {len(errors)} failed, {seconds:.0f} s in all; picture: {PICTURE}")
        for reason in self.reasons:
            self.screen.say(f"NOT MET: {reason}")
        if not self.reasons:
            self.screen.say("the loop is closed: drafts were born from traffic, promoted, swapped in, and got better")
        return 1 if self.reasons else 0


def is_settled(row: StreamRow, watch: Watch) -> bool:
    """Whether a replica swapped during this stream, and acceptance has stayed where it was since the last swap."""
    if row.num_queries < SETTLE_QUERIES:
        return False
    mine = [swap for swap in watch.swaps if swap.at >= row.began_at]
    since = [reading for reading in watch.readings if mine and reading.at >= mine[-1].at]
    if len(since) < 3:
        return False
    middle = since[len(since) // 2]
    halves = [between(since[0], middle, row.domain), between(middle, since[-1], row.domain)]
    if min(half.num_passes for half in halves) < SETTLE_PASSES:
        return False
    return abs(acceptance_rate(halves[0]) - acceptance_rate(halves[1])) <= SETTLED_WITHIN


def main() -> int:
    """Run the demo; returns the exit code: 0 the loop closed, 1 something is missing, 2 wrong arguments."""
    began_at = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=Path, help="a .jsonl or .jsonl.gz file of id, domain, prompt to replay")
    parser.add_argument("--state", type=Path, help="state directory to use and keep (default: one that is removed)")
    parser.add_argument(
        "--target", metavar="PATH_OR_HUB_ID", help="checkpoint to serve (default: the reference target)"
    )
    arguments = parser.parse_args()
    try:
        streams = file_streams(arguments.queries) if arguments.queries else builtin_streams(seed=SEED)
        state = arguments.state.absolute() if arguments.state else _fresh_state()
        os.environ["SLIPSTREAM_STATE"] = str(state)
        os.environ.setdefault("SLIPSTREAM_CONFIG", str(DEMO_CONFIG))
        settings = load_config()
        if arguments.target is not None:
            settings = with_target(settings, arguments.target)
        code = Demo(settings, streams, began_at=began_at, is_other_target=arguments.target is not None).run()
    except ConfigError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    if code == 0 and arguments.state is None:
        shutil.rmtree(state, ignore_errors=True)
    return code


def _fresh_state() -> Path:
    parent = ROOT / ".state"
    parent.mkdir(exist_ok=True, mode=0o700)
    return Path(tempfile.mkdtemp(prefix="demo-", dir=parent))


if __name__ == "__main__":
    sys.exit(main())
