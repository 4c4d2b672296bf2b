"""The sizes that the engine is measured at: widened copies of small trained models, and real text in their tokens."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer

from benchmarks.peers.protocol import is_installed
from benchmarks.reference.widen import num_weights, widened
from deploy.local.queries import builtin_streams
from slipstream.models.checkpoint import load_checkpoint, save_checkpoint
from slipstream.models.config import ModelConfig, read_config

if is_installed("gguf"):
    from benchmarks.peers.gguf_file import write_gguf

ROOT = Path(__file__).resolve().parents[1]
PLACES = (ROOT / "deploy" / "models", ROOT.parent / "shared" / "models")
QUERIES = ROOT.parent / "shared" / "data" / "queries"

WIDENED = "sizes are widened copies of one function each (benchmarks.reference.widen); the draft is not widened"
"""What every table of speeds has to say."""


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """A trained model, and how many times as wide its copy is."""

    source: str
    times: int

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.source} x{self.times}"


MOE_SIZES = (Size(source="mix-moe-11m", times=1), Size(source="mix-moe-11m", times=4))
SIZES = (
    *MOE_SIZES,
    Size(source="mix-moe-11m", times=8),
    Size(source="mix-dense-6m", times=1),
    Size(source="mix-dense-6m", times=8),
    Size(source="tinystories-656k", times=1),
    Size(source="tinystories-656k", times=16),
)


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A size on disk: its bf16 checkpoint directory, its GGUF file (None if it cannot be written), and text for it."""

    size: Size
    config: ModelConfig
    directory: Path
    gguf: Path | None
    num_parameters: int
    text_ids: tuple[int, ...]


def source_directory(size: Size) -> Path | None:
    """Where the trained model lies; None if it is not on this machine."""
    return next((place / size.source for place in PLACES if (place / size.source / "config.json").is_file()), None)


def prepare(size: Size, source: Path, cache: Path) -> Prepared:
    """Widen and convert into `cache` (what lies there already is taken), and encode the text."""
    directory = cache / f"{size.source}-x{size.times}"
    if not directory.exists():
        wide = widened(load_checkpoint(source), size.times)
        scratch = cache / f"{directory.name}.part"
        save_checkpoint(scratch, wide.config, wide.weights, dtype=torch.bfloat16)
        scratch.rename(directory)
    gguf = directory / "model.gguf"
    if not gguf.exists() and is_installed("gguf"):
        write_gguf(directory, gguf.with_suffix(".part"))
        gguf.with_suffix(".part").rename(gguf)
    config = read_config(directory / "config.json")
    return Prepared(
        size=size,
        config=config,
        directory=directory,
        gguf=gguf if gguf.exists() else None,
        num_parameters=num_weights(config),
        text_ids=text_ids(source, num_tokens=config.max_position_embeddings),
    )


def text_ids(source: Path, *, num_tokens: int) -> tuple[int, ...]:
    """`num_tokens` tokens of text that the model was trained for: dialogues of word problems, or little stories."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    pieces = (tokenizer.encode(text).ids for text in _texts(source.name))
    return tuple(itertools.islice(itertools.chain.from_iterable(pieces), num_tokens))


class _Record(msgspec.Struct):
    prompt: str
    response: str | None


def _texts(source: str) -> Iterator[str]:
    is_stories = source.startswith("tinystories")
    path = QUERIES / ("tinystories.jsonl.gz" if is_stories else "gsm8k.jsonl.gz")
    if not path.exists():
        # The generated word problems of the demo have no answers: their prompts, one after the other.
        yield from (f"<|user|>{query.prompt}<|assistant|>" for query in builtin_streams(seed=0)[0][1])
        return
    for record in _records(path):
        story = f"{record.prompt} {record.response}\n"
        yield story if is_stories else f"<|user|>{record.prompt}<|assistant|>{record.response}<|endoftext|>"


def _records(path: Path) -> Iterator[_Record]:
    decoder = msgspec.json.Decoder(_Record)
    with gzip.open(path, "rb") as lines:
        yield from map(decoder.decode, lines)
