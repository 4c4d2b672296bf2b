"""Redis (or Valkey): the observation log on a stream, the pointer by a Lua compare-and-set.

The only file that imports the redis client. Calls are bounded by short socket timeouts and are not retried here:
with the client's defaults a dead server costs seconds, a silent one half a minute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import redis

from slipstream.config import redacted
from slipstream.errors import ConfigError, StoreError, StoreUnavailable
from slipstream.promotion import PromotionDecision
from slipstream.stores import redis_scripts
from slipstream.stores.artifacts import checked_name
from slipstream.stores.protocols import ACKNOWLEDGEMENT_TTL_S, HISTORY_LIMIT, LogEntry, WorkerStatus
from slipstream.stores.rules import (
    check_generation,
    check_record_sizes,
    promotion_frozen,
    stale_fence,
    stale_pointer,
)
from slipstream.versions import Acknowledgement, Place, Role, ServingPointer

logger = logging.getLogger(__name__)

DEFAULT_NAMESPACE = "slipstream"
"""Prefix of every key, as one hash tag: deployments that share a server take different ones."""

_PARTITION = 0
_APPEND_BYTES = 1 << 20
_BLOCK_S = 0.5
"""Longest wait inside the server, below the socket timeout."""

_TRANSIENT = ("OOM", "MISCONF", "READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS")


class RedisLog:
    """An `ObservationLog` on one Redis stream, so with one partition (0); keeps about the latest `max_records`.

    When the server runs out of memory the oldest quarter of the stream goes, and a log line says so.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        max_records: int = 20_000,
        timeout_s: float = 2.0,
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._max_records = max_records
        self._prefix = _prefix(namespace)
        self._stream, self._counter = f"{self._prefix}:observations", f"{self._prefix}:num_observations"
        self._client = _client(url, timeout_s=timeout_s)
        self._append = self._client.register_script(redis_scripts.APPEND)

    def append(self, records: Sequence[tuple[str, bytes]]) -> None:
        """See `ObservationLog.append`."""
        check_record_sizes(records)
        with _translated(self._url):
            for batch in _batches(records):
                arguments = [self._max_records, *(part for pair in batch for part in pair)]
                try:
                    self._append(keys=[self._stream, self._counter], args=arguments)
                except redis.exceptions.OutOfMemoryError:
                    self._drop_oldest_quarter()
                    self._append(keys=[self._stream, self._counter], args=arguments)

    def subscribe(self, group: str) -> RedisSubscription:
        """See `ObservationLog.subscribe`; connects at the first call of the subscription."""
        member = f"{checked_name('group', group)}/{os.getpid()}.{uuid.uuid4().hex[:12]}"
        client = _client(self._url, timeout_s=self._timeout_s, client_name=member, max_connections=1)
        return RedisSubscription(client, url=self._url, keys=(self._stream, self._counter), group=group, member=member)

    def identity(self) -> str:
        """See `ObservationLog.identity`: a random number that lies, and is lost, beside the stream."""
        key = f"{self._prefix}:log"
        with _translated(self._url):
            found = self._client.get(key)
            if found is None:
                self._client.set(key, uuid.uuid4().hex, nx=True)
                found = self._client.get(key)
        return f"redis {found.decode()}"

    def close(self) -> None:
        """See `ObservationLog.close`."""
        self._client.close()

    def _drop_oldest_quarter(self) -> None:
        num_records = self._client.xlen(self._stream)
        num_dropped = self._client.xtrim(self._stream, maxlen=max(1, num_records * 3 // 4), approximate=False)
        logger.warning("redis is out of memory: dropped the oldest %d of %d observations", num_dropped, num_records)


class RedisSubscription:
    """A `Subscription` of `RedisLog`.

    A member is alive while its connection is: its name stands in the server's client list. Entries delivered to a
    member that is gone are claimed by the next one that polls. Two members share the one partition entry by entry,
    and a commit covers a member's own entries only.
    """

    def __init__(self, client: Any, *, url: str, keys: tuple[str, str], group: str, member: str) -> None:
        self._client = client
        self._url = url
        self._stream, self._counter = keys
        self._group = group
        self._member = member
        self._is_joined = False
        self._delivered: set[int] = set()
        # Our pending entries above this id may not have reached the caller; None when all have.
        self._backlog_after: int | None = 0
        self._claimed_at = -1.0
        self._claim = client.register_script(redis_scripts.CLAIM)
        self._commit = client.register_script(redis_scripts.COMMIT)
        self._lag = client.register_script(redis_scripts.LAG)

    def poll(self, *, max_records: int, timeout_s: float) -> list[LogEntry]:
        """See `Subscription.poll`."""
        deadline = time.monotonic() + timeout_s
        with self._in_group():
            while True:
                self._claim_abandoned()
                remaining_s = max(0.0, deadline - time.monotonic())
                entries = self._read_backlog(max_records) or self._read_fresh(max_records, remaining_s)
                if entries or time.monotonic() >= deadline:
                    return entries

    def commit(self, ends: Mapping[int, int]) -> None:
        """See `Subscription.commit`."""
        end = ends.get(_PARTITION)
        if end is None:
            return
        with self._in_group():
            self._claim_abandoned()
            self._commit(keys=[self._stream], args=[self._group, self._member, end])
            self._delivered = {offset for offset in self._delivered if offset >= end}

    def lag(self) -> int:
        """See `Subscription.lag`."""
        with self._in_group():
            return int(self._lag(keys=[self._stream, self._counter], args=[self._group]))

    def close(self) -> None:
        """See `Subscription.close`; what is pending is claimed by the group's next member."""
        self._client.close()

    @contextlib.contextmanager
    def _in_group(self) -> Iterator[None]:
        try:
            with _translated(self._url):
                if not self._is_joined:
                    self._create_group()
                    self._is_joined = True
                yield
        except StoreError:
            # A reply may have been lost, and the server may come back empty: look at everything again.
            self._is_joined, self._backlog_after, self._claimed_at = False, 0, -1.0
            raise

    def _create_group(self) -> None:
        try:
            self._client.xgroup_create(self._stream, self._group, id="0", mkstream=True)
            # A fresh group, perhaps of a server that lost its data and counts from 1 again.
            self._delivered.clear()
        except redis.exceptions.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _claim_abandoned(self) -> None:
        """Take over what vanished members left, looking at most once a second."""
        if time.monotonic() - self._claimed_at < 1.0:
            return
        self._claimed_at = time.monotonic()
        waiting = {one["name"].decode() for one in self._client.xpending(self._stream, self._group)["consumers"]}
        if not waiting - {self._member}:
            return
        alive = {one["name"] for one in self._client.client_list()}
        for vanished in sorted(waiting - alive - {self._member}):
            num_taken = self._claim(keys=[self._stream], args=[self._group, self._member, vanished])
            logger.info("group %s: %d uncommitted records of a vanished member taken over", self._group, num_taken)
            self._backlog_after = 0

    def _read_backlog(self, max_records: int) -> list[LogEntry]:
        while self._backlog_after is not None:
            page = self._read(f"{self._backlog_after}-0", max_records, block_s=None)
            self._backlog_after = page[-1][0] if page else None
            trimmed = [offset for offset, record in page if record is None]
            if trimmed:
                self._client.xack(self._stream, self._group, *(f"{offset}-0" for offset in trimmed))
                logger.warning("group %s: %d uncommitted records were trimmed away", self._group, len(trimmed))
            if entries := self._deliver(page):
                return entries
        return []

    def _read_fresh(self, max_records: int, timeout_s: float) -> list[LogEntry]:
        # A block of 0 would wait for ever.
        return self._deliver(self._read(">", max_records, block_s=max(0.001, min(timeout_s, _BLOCK_S))))

    def _read(self, after: str, max_records: int, *, block_s: float | None) -> list[tuple[int, bytes | None]]:
        block_ms = None if block_s is None else max(1, int(block_s * 1000))
        reply = self._client.xreadgroup(
            self._group, self._member, {self._stream: after}, count=max_records, block=block_ms
        )
        page = reply[0][1] if reply else []
        return [(int(entry_id.split(b"-")[0]), fields.get(b"r") if fields else None) for entry_id, fields in page]

    def _deliver(self, page: list[tuple[int, bytes | None]]) -> list[LogEntry]:
        entries = [
            LogEntry(_PARTITION, offset, record)
            for offset, record in page
            if record is not None and offset not in self._delivered
        ]
        self._delivered.update(entry.offset for entry in entries)
        return entries


_Record = TypeVar("_Record")


class RedisPointers:
    """A `PointerStore` on Redis; records are kept as msgpack, since a decision's bound can be infinite."""

    def __init__(
        self,
        url: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        timeout_s: float = 1.0,
        acknowledgement_ttl_s: float = ACKNOWLEDGEMENT_TTL_S,
    ) -> None:
        self._url = url
        self._prefix = _prefix(namespace)
        self._ttl_s = acknowledgement_ttl_s
        self._client = _client(url, timeout_s=timeout_s)
        self._advance = self._client.register_script(redis_scripts.ADVANCE)
        self._acknowledge = self._client.register_script(redis_scripts.ACKNOWLEDGE)
        self._acknowledgements = self._client.register_script(redis_scripts.ACKNOWLEDGEMENTS)
        # By thread: several followers may share this object, and none may take another's announcement.
        self._seen = threading.local()

    def issue_fencing_token(self) -> int:
        """See `PointerStore.issue_fencing_token`."""
        with _translated(self._url):
            return int(self._client.incr(self._key("fence")))

    def read(self, role: Role, domain: str) -> ServingPointer | None:
        """See `PointerStore.read`."""
        with _translated(self._url):
            found = self._client.hget(self._key("pointer", role, domain), "pointer")
        return None if found is None else _decoded(found, ServingPointer)

    def advance(self, pointer: ServingPointer, *, expected_generation: int, is_operator: bool = False) -> None:
        """See `PointerStore.advance`."""
        check_generation(pointer, expected_generation)
        place = (pointer.role, pointer.domain)
        keys = [self._key("pointer", *place), self._key("history", *place)]
        keys += [self._key("fence"), self._key("frozen"), self._key("num_moves"), self._key("places")]
        arguments: list[Any] = [expected_generation, pointer.generation, pointer.fencing_token, int(is_operator)]
        arguments += [msgspec.msgpack.encode(pointer), pointer.reason, self._key("moves"), HISTORY_LIMIT]
        arguments.append(msgspec.msgpack.encode(place))
        with _translated(self._url):
            outcome, value = self._advance(keys=keys, args=arguments)
        if outcome == b"fence":
            raise stale_fence(pointer, int(value))
        if outcome == b"stale":
            raise stale_pointer(pointer, int(value))
        if outcome == b"frozen":
            raise promotion_frozen(value.decode())

    def history(self, role: Role, domain: str, *, limit: int) -> list[ServingPointer]:
        """See `PointerStore.history`."""
        return self._latest(self._key("history", role, domain), limit, ServingPointer)

    def places(self) -> list[Place]:
        """See `PointerStore.places`."""
        with _translated(self._url):
            found = self._client.smembers(self._key("places"))
        return sorted(_decoded(one, Place) for one in found)

    def freeze(self, reason: str) -> None:
        """See `PointerStore.freeze`."""
        with _translated(self._url):
            self._client.set(self._key("frozen"), reason)

    def unfreeze(self) -> None:
        """See `PointerStore.unfreeze`."""
        with _translated(self._url):
            self._client.delete(self._key("frozen"))

    def frozen(self) -> str | None:
        """See `PointerStore.frozen`."""
        with _translated(self._url):
            reason = self._client.get(self._key("frozen"))
        return None if reason is None else str(reason.decode())

    def wait_for_move(self, *, timeout_s: float) -> bool:
        """See `PointerStore.wait_for_move`."""
        deadline = time.monotonic() + timeout_s
        try:
            with _translated(self._url):
                return self._heard_move(deadline)
        except StoreError:
            time.sleep(max(0.0, deadline - time.monotonic()))
            return False

    def acknowledge(self, acknowledgement: Acknowledgement) -> None:
        """See `PointerStore.acknowledge`."""
        place = (acknowledgement.role, acknowledgement.domain)
        keys = [*self._acknowledgement_keys(*place), self._key("places")]
        word, place_bytes = msgspec.msgpack.encode(acknowledgement), msgspec.msgpack.encode(place)
        with _translated(self._url):
            self._acknowledge(keys=keys, args=[acknowledgement.replica_id, word, place_bytes])

    def acknowledgements(self, role: Role, domain: str) -> list[Acknowledgement]:
        """See `PointerStore.acknowledgements`."""
        keys = self._acknowledgement_keys(role, domain)
        with _translated(self._url):
            found = self._acknowledgements(keys=keys, args=[int(self._ttl_s * 1000)])
        return sorted((_decoded(one, Acknowledgement) for one in found), key=lambda one: one.replica_id)

    def record_decision(self, decision: PromotionDecision) -> None:
        """See `PointerStore.record_decision`."""
        with _translated(self._url), self._client.pipeline(transaction=True) as step:
            step.lpush(self._key("decisions"), msgspec.msgpack.encode(decision))
            step.ltrim(self._key("decisions"), 0, HISTORY_LIMIT - 1)
            step.execute()

    def decisions(self, *, limit: int) -> list[PromotionDecision]:
        """See `PointerStore.decisions`."""
        return self._latest(self._key("decisions"), limit, PromotionDecision)

    def report_worker(self, status: WorkerStatus) -> None:
        """See `PointerStore.report_worker`."""
        with _translated(self._url):
            self._client.hset(self._key("workers"), status.worker, msgspec.msgpack.encode(status))

    def workers(self) -> list[WorkerStatus]:
        """See `PointerStore.workers`."""
        with _translated(self._url):
            found = self._client.hvals(self._key("workers"))
        return sorted((_decoded(one, WorkerStatus) for one in found), key=lambda one: one.worker)

    def close(self) -> None:
        """See `PointerStore.close`."""
        self._client.close()

    def _heard_move(self, deadline: float) -> bool:
        with self._client.pubsub() as announcements:
            announcements.subscribe(self._key("moves"))
            # The server must have subscribed us before we compare, else a move in between stays unheard.
            announcements.get_message(timeout=_BLOCK_S)
            num_moves, seen = int(self._client.get(self._key("num_moves")) or 0), getattr(self._seen, "num_moves", 0)
            self._seen.num_moves = num_moves
            if num_moves != seen:
                return True
            while (remaining_s := deadline - time.monotonic()) > 0:
                message = announcements.get_message(timeout=remaining_s)
                if message is not None and message["type"] == "message":
                    self._seen.num_moves = int(message["data"])
                    return True
        return False

    def _latest(self, key: str, limit: int, kind: type[_Record]) -> list[_Record]:
        if limit <= 0:
            return []
        with _translated(self._url):
            found = self._client.lrange(key, 0, limit - 1)
        return [_decoded(one, kind) for one in found]

    def _acknowledgement_keys(self, role: Role, domain: str) -> list[str]:
        return [self._key("acknowledgements", role, domain), self._key("heard", role, domain)]

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))


def _prefix(namespace: str) -> str:
    return "{" + checked_name("namespace", namespace) + "}"


def _client(url: str, *, timeout_s: float, **options: Any) -> Any:
    try:
        return redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=None, protocol=2, **options
        )
    except ValueError as error:
        raise ConfigError(f"redis URL {redacted(url)}: {error}; expected redis://, rediss:// or unix://") from None


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Errors of the client as errors of ours, with the address and without its password."""
    try:
        yield
    except (
        redis.exceptions.AuthenticationError,
        redis.exceptions.AuthorizationError,
        redis.exceptions.NoPermissionError,
    ) as error:
        raise ConfigError(f"redis at {redacted(url)} refuses us: {error}; correct the user or password") from error
    except redis.exceptions.ResponseError as error:
        if any(word in str(error) for word in (*_TRANSIENT, "NOGROUP")):
            raise StoreUnavailable(f"redis at {redacted(url)} cannot serve now: {error}") from error
        raise StoreError(f"redis at {redacted(url)}: {error}") from error
    except (redis.exceptions.RedisError, OSError) as error:
        raise StoreUnavailable(f"redis at {redacted(url)} does not answer: {error}") from error


def _batches(records: Sequence[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """The records in order, in pieces small enough that no script holds the server for long."""
    batch: list[tuple[str, bytes]] = []
    num_bytes = 0
    for key, record in records:
        batch.append((key, record))
        num_bytes += len(record)
        if num_bytes >= _APPEND_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _decoded(data: bytes, kind: type[_Record]) -> _Record:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreError(f"redis holds no {kind.__name__}: {error}; another program wrote to our keys") from error
