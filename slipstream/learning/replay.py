"""Observations on disk: append-only, checked, bounded per domain, and what training batches are drawn from.

One file of frames `length, crc32, msgpack`. A frame keeps one observation with its place in the log, or the ids of
observations that were evicted (so that they are still recognised as duplicates). `flush` makes appended frames
durable in their order, so after a crash the file holds a prefix of what was appended; a torn tail is cut on opening.
An observation may be evicted only after `settle` said that its place is dealt with elsewhere (a version covers it, or
its offset is committed).
"""

from __future__ import annotations

import logging
import os
import random
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from slipstream.records import Observation, decode_observation, encode, observation_id
from slipstream.stores.artifacts import write_durably
from slipstream.telemetry import MAX_DOMAINS, OTHER_DOMAIN

_FRAME = struct.Struct("<II")
_MAX_FORGOTTEN = 20_000
_NO_OFFSET = -1
_logger = logging.getLogger(__name__)


class Kept(msgspec.Struct, frozen=True):
    """An observation and its place in the log."""

    partition: int
    offset: int
    observation: Observation


class _KeptFrame(msgspec.Struct, frozen=True, tag="kept", array_like=True):
    partition: int
    offset: int
    record: bytes


class _EvictedFrame(msgspec.Struct, frozen=True, tag="evicted", array_like=True):
    observation_ids: list[str]


_decoder = msgspec.msgpack.Decoder(_KeptFrame | _EvictedFrame)


class ReplayBuffer:
    """Observations by id, in the order they were appended; one process and one thread owns a directory."""

    def __init__(self, directory: Path, *, max_per_domain: int) -> None:
        """Open or create the buffer in `directory`; keeps about `max_per_domain` settled observations of a domain."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "observations.frames"
        self._max_per_domain = max_per_domain
        self._kept: dict[str, Kept] = {}
        self._evicted: dict[str, None] = {}
        # By domain, the one least recently seen first; those without a place of their own share OTHER_DOMAIN.
        self._domains: dict[str, dict[str, None]] = {}
        self._unwritten = bytearray()
        self._num_dead_frames = 0
        self._open()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, name: str) -> bool:
        """Whether an observation of this id is kept, or was until recently (the last 20,000 evicted)."""
        return name in self._kept or name in self._evicted

    def append(self, kept: Kept) -> bool:
        """Keep an observation; False, changing nothing, if its id is known. Durable after `flush`."""
        name = observation_id(kept.observation)
        if name in self:
            return False
        self._unwritten += _framed(_KeptFrame(kept.partition, kept.offset, encode(kept.observation)))
        self._remember(name, kept)
        return True

    def flush(self) -> None:
        """Make everything appended durable; after an OSError (a full disk) the call may be repeated."""
        if not self._unwritten:
            return
        try:
            _write_all(self._file, self._unwritten)
            os.fsync(self._file)
        except OSError:
            # A torn frame would hide what follows it.
            os.ftruncate(self._file, self._num_bytes)
            raise
        self._num_bytes += len(self._unwritten)
        self._unwritten.clear()

    def settle(self, ends: Mapping[int, int]) -> None:
        """Places below `ends[partition]` are dealt with: the oldest of them may go where a domain is too large."""
        gone = [name for domain in self._domains for name in self._surplus(domain, ends)]
        for name in gone:
            self._forget(name)
        self._num_dead_frames += len(gone)
        if self._num_dead_frames > max(self._max_per_domain, len(self._kept)):
            self._compact()
        elif gone:
            self._unwritten += _framed(_EvictedFrame(gone))
            self.flush()

    def adopt(self, log: str) -> None:
        """Say which log (`ObservationLog.identity`) places belong to from now on.

        What was kept from another one stays for training, but its place there means nothing here: it counts as dealt
        with.
        """
        marker = self._path.with_name("log")
        if marker.exists() and marker.read_text() == log:
            return
        self._kept = {name: Kept(0, _NO_OFFSET, one.observation) for name, one in self._kept.items()}
        self._compact()
        write_durably(marker, log.encode())

    def kept(self) -> Iterator[Kept]:
        """Everything kept, oldest first."""
        return iter(self._kept.values())

    def newest(self, num_observations: int, *, domain: str | None = None) -> list[Observation]:
        """The latest observations of a domain (None: of all, in their own mix), oldest first."""
        names = list(self._kept if domain is None else self._domains.get(domain, ()))[-num_observations:]
        return [self._kept[name].observation for name in names]

    def domains(self) -> list[str]:
        """The domains that have observations, sorted: 15 seen last, and `other` for all before them."""
        return sorted(domain for domain, names in self._domains.items() if names)

    def domain_of(self, observation: Observation) -> str:
        """The observation's domain among `domains()`: its own name, or `other`."""
        return observation.domain if observation.domain in self._domains else OTHER_DOMAIN

    def sample(
        self, num_observations: int, *, num_fresh: int, replay_ratio: float, chance: random.Random
    ) -> list[Observation]:
        """Observations for one training batch, drawn without repeats among the fresh ones.

        The share `1 - replay_ratio` comes from the latest `num_fresh`; the rest from everything older, each domain
        being as likely as any other. Without older ones all are fresh. Empty only if the buffer is.
        """
        names = list(self._kept)
        fresh, older = names[-num_fresh:], set(names[:-num_fresh])
        by_domain = [known for group in self._domains.values() if (known := [name for name in group if name in older])]
        num_replayed = round(num_observations * replay_ratio) if by_domain else 0
        drawn = chance.sample(fresh, min(len(fresh), num_observations - num_replayed))
        drawn += [chance.choice(chance.choice(by_domain)) for _ in range(num_replayed)]
        return [self._kept[name].observation for name in drawn]

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        os.close(self._file)

    def _open(self) -> None:
        data = self._path.read_bytes() if self._path.exists() else b""
        self._num_bytes = self._read(data)
        if self._num_bytes < len(data):
            _logger.warning("%s: cut %d bytes of a torn tail", self._path, len(data) - self._num_bytes)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, self._num_bytes)
        _sync_directory(self._path.parent)

    def _read(self, data: bytes) -> int:
        """Take in every whole frame; the number of bytes they fill."""
        num_bytes = 0
        for frame, end in _frames(data):
            num_bytes = end
            if isinstance(frame, _KeptFrame):
                kept = Kept(frame.partition, frame.offset, decode_observation(frame.record))
                self._remember(observation_id(kept.observation), kept)
            else:
                self._num_dead_frames += len(frame.observation_ids)
                for name in frame.observation_ids:
                    self._forget(name)
        return num_bytes

    def _remember(self, name: str, kept: Kept) -> None:
        self._kept[name] = kept
        self._see(kept.observation.domain)[name] = None

    def _forget(self, name: str) -> None:
        kept = self._kept.pop(name, None)
        if kept is not None:
            self._domains[self.domain_of(kept.observation)].pop(name)
        self._evicted[name] = None
        while len(self._evicted) > _MAX_FORGOTTEN:
            del self._evicted[next(iter(self._evicted))]

    def _see(self, domain: str) -> dict[str, None]:
        """The names of a domain, which is now the one last seen.

        Callers name domains, so their number is bounded, and no name can keep a place that others need.
        """
        names = self._domains.pop(domain, None)
        others = self._domains.setdefault(OTHER_DOMAIN, {})
        if names is None:
            names = {name: None for name in others if self._kept[name].observation.domain == domain}
            for name in names:
                del others[name]
            if len(self._domains) >= MAX_DOMAINS:
                self._give_up_place()
        self._domains[domain] = names
        return names

    def _give_up_place(self) -> None:
        """Let the domain least recently seen go to the others, which stay in their order of arrival."""
        least_recent = next(domain for domain in self._domains if domain != OTHER_DOMAIN)
        together = self._domains.pop(least_recent).keys() | self._domains[OTHER_DOMAIN].keys()
        self._domains[OTHER_DOMAIN] = {name: None for name in self._kept if name in together}

    def _surplus(self, domain: str, ends: Mapping[int, int]) -> list[str]:
        names = self._domains[domain]
        num_surplus = max(0, len(names) - self._max_per_domain)
        settled = (name for name in names if self._kept[name].offset < ends.get(self._kept[name].partition, 0))
        return [name for name, _ in zip(settled, range(num_surplus), strict=False)]

    def _compact(self) -> None:
        """Write what is kept to a new file and put it in the old one's place."""
        frames = [_framed(_EvictedFrame(list(self._evicted)))]
        frames += [_framed(_KeptFrame(one.partition, one.offset, encode(one.observation))) for one in self.kept()]
        content = b"".join(frames)
        incoming = self._path.with_suffix(".incoming")
        file = os.open(incoming, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        _write_all(file, content)
        os.fsync(file)
        os.replace(incoming, self._path)
        _sync_directory(self._path.parent)
        os.close(self._file)
        self._file, self._num_bytes, self._num_dead_frames = file, len(content), 0
        self._unwritten.clear()


def _framed(frame: _KeptFrame | _EvictedFrame) -> bytes:
    payload = msgspec.msgpack.encode(frame)
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _frames(data: bytes) -> Iterator[tuple[_KeptFrame | _EvictedFrame, int]]:
    """Every frame and the position of its end, up to the first one that is not whole."""
    start = 0
    while start + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, start)
        payload = data[start + _FRAME.size : start + _FRAME.size + length]
        if len(payload) < length or zlib.crc32(payload) != checksum:
            return
        start += _FRAME.size + length
        yield _decoder.decode(payload), start


def _write_all(file: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
