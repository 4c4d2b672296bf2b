"""What must not be learned from leaves no byte in the log: searched in the store's own files, not by its client."""

from __future__ import annotations

import struct
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import zstandard

from services.target.prompt_text import PromptText
from slipstream.stores.kafka import TOPIC
from tests.integration.conftest import KEY, PRIVATE_KEY, Serving, write_keys
from tests.integration.serving_process import MODEL, ROOT, ServiceProcess
from tests.servers import KafkaBroker, eventually

pytestmark = pytest.mark.processes

PROMPT_TEXT = PromptText(ROOT / "deploy" / "models" / MODEL)
NO_TRAIN = {"X-Slipstream-No-Train": "1"}
PRIVATE_TENANT = b"private"
ZSTD = 4
"""Kafka's number for the compression of a batch, in the low three bits of its attributes."""


class Marked:
    """Prompts with a text that occurs nowhere else: one to learn from, and one for each way of saying no."""

    def __init__(self) -> None:
        self.trained, self.by_header, self.by_tenant = (f"<|user|>{uuid.uuid4().hex}<|assistant|>" for _ in range(3))

    def send(self, url: str) -> None:
        """Send all three, the one to learn from last: when it is in the log, nothing of the others is on its way."""
        _complete(url, PRIVATE_KEY, self.by_tenant, {})
        _complete(url, KEY, self.by_header, NO_TRAIN)
        _complete(url, KEY, self.trained, {})


def _complete(url: str, key: str, prompt: str, headers: dict[str, str]) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)
    client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, extra_headers=headers)


def traces(prompt: str) -> tuple[bytes, bytes]:
    """How a prompt would show in a record: its token ids as little-endian int32, or its text."""
    ids = PROMPT_TEXT.encode_raw(prompt)
    return struct.pack(f"<{len(ids)}i", *ids), prompt.split("|>")[1].removesuffix("<|assistant").encode()


def assert_only_the_trained_prompt_is_in(log: bytes, marked: Marked) -> None:
    for prompt in (marked.by_header, marked.by_tenant):
        assert [log.count(trace) for trace in traces(prompt)] == [0, 0]
    assert log.count(PRIVATE_TENANT) == 0
    assert log.count(b"acme") > 0
    assert log.count(traces(marked.trained)[0]) == 1


def test_no_train_requests_leave_no_byte_in_valkeys_append_only_file(serving: Serving) -> None:
    def log() -> bytes:
        return b"".join(path.read_bytes() for path in sorted((serving.valkey_dir / "data").rglob("*.aof")))

    marked = Marked()
    marked.send(serving.service.url)
    eventually(lambda: traces(marked.trained)[0] in log())
    assert_only_the_trained_prompt_is_in(log(), marked)


@pytest.mark.kafka
def test_no_train_requests_leave_no_byte_in_kafkas_segments(kafka_broker: KafkaBroker) -> None:
    if not kafka_broker.is_ours:
        pytest.skip("the segment files of the broker that SLIPSTREAM_KAFKA names are not on this machine for certain")
    with tempfile.TemporaryDirectory(prefix="no-train-") as folder:
        state_dir = Path(folder)
        keys = write_keys(state_dir)
        service = ServiceProcess(state_dir, serving={}, kafka=kafka_broker.bootstrap, api_keys=str(keys))
        try:
            marked = Marked()
            marked.send(service.url)
            eventually(lambda: traces(marked.trained)[0] in segments(kafka_broker.log_dir))
        finally:
            service.stop()
    assert_only_the_trained_prompt_is_in(segments(kafka_broker.log_dir), marked)


def segments(log_dir: Path) -> bytes:
    """The observation topic's segment files, their batches decompressed."""
    files = sorted(log_dir.glob(f"{TOPIC}-*/*.log"))
    return b"".join(part for path in files for part in batches(path.read_bytes()))


def batches(segment: bytes) -> Iterator[bytes]:
    """The header and the decompressed records of each batch (format 2); an unfinished or empty rest is left out."""
    start = 0
    while start + 61 <= len(segment):
        (length,) = struct.unpack_from(">i", segment, start + 8)
        end = start + 12 + length
        if length <= 0 or end > len(segment):
            return
        compression = segment[start + 22] & 7
        assert compression in (0, ZSTD), f"batch compression {compression}, expected none or zstd"
        records = segment[start + 61 : end]
        yield segment[start : start + 61]
        yield zstandard.ZstdDecompressor().decompressobj().decompress(records) if compression else records
        start = end
