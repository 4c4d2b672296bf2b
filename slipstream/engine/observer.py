"""From what a sequence went through to observations in the log, without ever making serving wait."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.engine.batch import RunningSequence
from slipstream.engine.request import FinishReason
from slipstream.errors import ConfigError, StoreError
from slipstream.records import (
    MAX_RECORD_BYTES,
    Observation,
    Round,
    RoutingTrace,
    SamplingRecord,
    encode,
    pack_floats,
    pack_ids,
)
from slipstream.stores.protocols import ObservationLog
from slipstream.telemetry import ReplicaMetrics

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 512
"""Output tokens per observation: at 16 kept log-probabilities a chunk is about 60 KB, far below the log's limit."""

_BATCH_RECORDS = 64
_RETRY_S = (0.25, 0.5, 1.0, 2.0, 5.0)


class ObservationSource(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same in every observation of a replica."""

    target_digest: str
    replica_id: str
    top_n: int
    num_experts: int


def observations_of(
    sequence: RunningSequence, source: ObservationSource, *, finish_reason: FinishReason
) -> list[Observation]:
    """An ended sequence as observations of at most CHUNK_TOKENS output tokens; none where learning is forbidden."""
    request = sequence.request
    if not request.may_train or not sequence.num_output:
        return []
    # A request may have asked for more log-probabilities than are observed; the most likely come first.
    rows = [(step.rows, part) for step, part in sequence.observed]
    emitted_T = np.concatenate([one.logprobs_T[part] for one, part in rows])
    top_ids_TN = np.concatenate([one.top_ids_TN[part, : source.top_n] for one, part in rows])
    top_logprobs_TN = np.concatenate([one.top_logprobs_TN[part, : source.top_n] for one, part in rows])
    experts = [one.expert_ids_TLK[part] for one, part in rows if one.expert_ids_TLK is not None]
    experts_TLK = np.concatenate(experts) if experts else None
    num_prompt = sequence.num_prompt
    observations = []
    for chunk, start in enumerate(range(0, sequence.num_output, CHUNK_TOKENS)):
        part = slice(start, min(start + CHUNK_TOKENS, sequence.num_output))
        first = num_prompt + start
        observations.append(
            Observation(
                request_id=request.request_id,
                chunk=chunk,
                at=time.time(),
                tenant=request.tenant,
                domain=request.domain,
                sampling=_sampling_record(sequence),
                target_digest=source.target_digest,
                prompt_ids=pack_ids(sequence.token_ids[:first]),
                output_ids=pack_ids(sequence.token_ids[first : num_prompt + part.stop]),
                output_logprobs=pack_floats(emitted_T[part], bits=32),
                top_n=source.top_n,
                top_ids=pack_ids(top_ids_TN[part]),
                top_logprobs=pack_floats(top_logprobs_TN[part], bits=16),
                first_position=first,
                rounds=_rounds_within(sequence.rounds, part),
                finish_reason=finish_reason,
                replica_id=source.replica_id,
                routing=None if experts_TLK is None else _routing_trace(experts_TLK[part], source),
            )
        )
    return observations


def _sampling_record(sequence: RunningSequence) -> SamplingRecord:
    sampling = sequence.request.sampling
    return SamplingRecord(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        sample_index=sampling.sample_index,
    )


def _rounds_within(rounds: list[Round], part: slice) -> tuple[Round, ...]:
    """The passes that began in this part, counted from its start."""
    return tuple(
        msgspec.structs.replace(one, start=one.start - part.start)
        for one in rounds
        if part.start <= one.start < part.stop
    )


def _routing_trace(experts_TLK: NDArray[np.integer], source: ObservationSource) -> RoutingTrace:
    return RoutingTrace(
        num_layers=experts_TLK.shape[1],
        num_experts=source.num_experts,
        experts_per_token=experts_TLK.shape[2],
        routing_version=0,
        expert_ids=experts_TLK.astype("<u2").tobytes(),
    )


class Observer:
    """A bounded queue in front of the log, and the thread that empties it.

    `offer` never waits: when the queue is full the oldest observation is dropped and counted. During an outage of the
    log the thread retries with growing pauses and says so once.
    """

    def __init__(self, log: ObservationLog, *, max_queued_records: int, metrics: ReplicaMetrics) -> None:
        self._log = log
        self._metrics = metrics
        self._queue: deque[Observation] = deque()
        self._max_queued_records = max_queued_records
        self._changed = threading.Condition()
        self._is_stopping = False
        self._num_failures = 0
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def offer(self, observation: Observation) -> None:
        """Queue an observation; drops the oldest if there is no room."""
        with self._changed:
            if len(self._queue) >= self._max_queued_records:
                self._queue.popleft()
                self._metrics.observations.labels("dropped").inc()
            self._queue.append(observation)
            self._metrics.observation_queue.set(len(self._queue))
            self._changed.notify()

    def stop(self, timeout_s: float) -> None:
        """Send what is queued for at most `timeout_s`, then stop; the rest is dropped and counted."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            self._metrics.observations.labels("dropped").inc(len(self._queue))
            self._queue.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_stopping)
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH_RECORDS))]
                self._metrics.observation_queue.set(len(self._queue))
            if not batch:
                return
            try:
                self._send(batch)
            except Exception:  # the outermost loop: without this thread nothing would ever be observed again
                logger.exception("%d observations could not be sent and are lost", len(batch))
                self._metrics.unexpected_errors.inc()
                self._metrics.observations.labels("failed").inc(len(batch))

    def _send(self, batch: list[Observation]) -> None:
        encoded = [(one, encode(one)) for one in batch]
        sendable = [(one, record) for one, record in encoded if self._is_sendable(one, record)]
        try:
            self._log.append([(one.request_id, record) for one, record in sendable])
        except (StoreError, ConfigError) as error:
            # A password or permission that was changed under a running replica is an outage like any other.
            self._put_back([one for one, _ in sendable], error)
        else:
            if self._num_failures:
                logger.warning("the observation log answers again")
            self._num_failures = 0
            self._metrics.store_up.labels("log").set(1)
            self._metrics.observations.labels("sent").inc(len(sendable))

    def _is_sendable(self, observation: Observation, record: bytes) -> bool:
        if len(record) > MAX_RECORD_BYTES:
            logger.error(
                "observation of request %s has %d bytes, the log takes %d; it is dropped",
                observation.request_id,
                len(record),
                MAX_RECORD_BYTES,
            )
            self._metrics.observations.labels("failed").inc()
        return len(record) <= MAX_RECORD_BYTES

    def _put_back(self, batch: list[Observation], error: StoreError | ConfigError) -> None:
        if not self._num_failures:
            logger.warning(
                "the observation log does not answer, up to %d records wait: %s", self._max_queued_records, error
            )
        self._metrics.store_up.labels("log").set(0)
        pause = _RETRY_S[min(self._num_failures, len(_RETRY_S) - 1)]
        self._num_failures += 1
        with self._changed:
            room = self._max_queued_records - len(self._queue)
            kept = batch[len(batch) - room :] if room < len(batch) else batch
            self._metrics.observations.labels("dropped").inc(len(batch) - len(kept))
            self._queue.extendleft(reversed(kept))
            if self._is_stopping:
                self._metrics.observations.labels("dropped").inc(len(self._queue))
                self._queue.clear()
            self._changed.wait_for(lambda: self._is_stopping, timeout=pause)
