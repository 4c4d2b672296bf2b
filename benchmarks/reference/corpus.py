"""The text of the reference target: query sets, what is held out, token ids, and batches in a reproducible order."""

from __future__ import annotations

import gzip
import hashlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from deploy.local.queries import trained_wording
from slipstream.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "deploy" / "models" / "mix-moe-11m"
"""The shipped target: its architecture, tokenizer and held-out ids are the recipe's."""

QUERIES = Path(__file__).parents[3] / "shared" / "data" / "queries"
"""Where the query sets lie unless `--data` says otherwise."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>")
"""With ids 0, 1 and 2, in this order."""

END, USER, ASSISTANT = range(3)
MAX_RECORD_CHARS = 900
"""A record whose prompt and answer are this long together is left out."""

CONTEXT_TOKENS = 256
"""Longer sequences lose their end."""

_POOL_BATCHES = 16
"""Batches cut from one pool of records sorted by length: little padding, yet a different mix every epoch."""


class QuerySet(msgspec.Struct, frozen=True, kw_only=True):
    """One set of the mix. `share` of the batches come from it.

    `has_groups`: ids end in `-NUMBER` within a dialogue or a question's paraphrases; if one of them is held out, none
    of its group is trained on, because the others repeat its text.
    """

    name: str
    share: float
    licence: str
    has_groups: bool = False


QUERY_SETS = (
    QuerySet(name="gsm8k", share=0.30, licence="MIT"),
    QuerySet(name="wikisql", share=0.22, licence="BSD-3-Clause", has_groups=True),
    QuerySet(name="python_docstring", share=0.28, licence="PSF-2.0, BSD-3-Clause, MIT, Apache-2.0"),
    QuerySet(name="sgd_dialog", share=0.20, licence="CC BY-SA 4.0", has_groups=True),
)
"""Every set of the mix; none has a non-commercial licence."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One query with its answer, in the wording of training."""

    id: str
    prompt: str
    response: str | None

    @property
    def text(self) -> str:
        """The record as the model sees it."""
        return f"<|user|>{self.prompt}<|assistant|>{self.response}<|endoftext|>"


class TokenSequence(msgspec.Struct, frozen=True):
    """Token ids of one record, and the index of the first token of its answer."""

    ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    answer_start: int


class Batch(msgspec.Struct, frozen=True):
    """Sequences padded on the right with 0; `ids_BT` int64, `lengths_B` and `answer_starts_B` int64."""

    ids_BT: Tensor
    lengths_B: Tensor
    answer_starts_B: Tensor


class Corpus(msgspec.Struct, frozen=True):
    """Sequences per set name, to train on and held out."""

    training: dict[str, list[TokenSequence]]
    held_out: dict[str, list[TokenSequence]]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of every training token in its order: two runs with one digest read the same text."""
        digest = hashlib.sha256()
        for name, sequences in self.training.items():
            digest.update(name.encode())
            for sequence in sequences:
                digest.update(sequence.ids.tobytes())
        return digest.hexdigest()


def read_held_out_ids() -> frozenset[str]:
    """Ids of the records that no reference target is trained on."""
    path = REFERENCE / "heldout_ids.txt"
    try:
        return frozenset(path.read_text(encoding="utf-8").split())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; it names the records that are held out") from error


def read_records(directory: Path, name: str) -> list[Record]:
    """The answered records of one set under MAX_RECORD_CHARS, in the file's order; raises ConfigError."""
    path = directory / f"{name}.jsonl.gz"
    decoder = msgspec.json.Decoder(Record)
    records = []
    try:
        with gzip.open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = decoder.decode(line)
                except msgspec.MsgspecError as error:
                    raise ConfigError(f"{path}, line {number}: {error}; expected id, prompt and response") from error
                records.append(msgspec.structs.replace(record, prompt=trained_wording(record.prompt)))
    except OSError as error:
        names = ", ".join(f"{one.name}.jsonl.gz" for one in QUERY_SETS)
        raise ConfigError(
            f"cannot read {path}: {error.strerror or error}; expected {names} in one directory, "
            "name it with --data DIRECTORY"
        ) from error
    return [one for one in records if one.response and len(one.prompt) + len(one.response) < MAX_RECORD_CHARS]


def split(
    records: Sequence[Record], held_out_ids: Collection[str], *, has_groups: bool
) -> tuple[list[Record], list[Record]]:
    """Records to train on, and those held out; nothing of the first repeats a group or a text of the second."""
    held_out = [one for one in records if one.id in held_out_ids]
    groups = {_group(one.id) for one in held_out} if has_groups else set()
    texts = {one.text for one in held_out}
    kept = [
        one for one in records if one.id not in held_out_ids and _group(one.id) not in groups and one.text not in texts
    ]
    return kept, held_out


def read_corpus(directory: Path, tokenizer: Tokenizer, *, most_records: int | None = None) -> Corpus:
    """Every set of the mix, split and encoded; `most_records` bounds the training records a set (None: all)."""
    held_out_ids = read_held_out_ids()
    training, held_out = {}, {}
    for query_set in QUERY_SETS:
        records = read_records(directory, query_set.name)
        kept, held = split(records, held_out_ids, has_groups=query_set.has_groups)
        training[query_set.name] = encode(kept[:most_records], tokenizer)
        held_out[query_set.name] = encode(held, tokenizer)
        if not kept or not held:
            raise ConfigError(
                f"{directory}/{query_set.name}.jsonl.gz: {len(kept)} records to train on and {len(held)} held out, "
                "expected some of both; is it the published set?"
            )
    return Corpus(training, held_out)


def encode(records: Sequence[Record], tokenizer: Tokenizer) -> list[TokenSequence]:
    """Token ids of each record, cut to CONTEXT_TOKENS; a record whose prompt fills the context is left out."""
    encoded = (tokenizer.encode(one.text).ids[:CONTEXT_TOKENS] for one in records)
    return [
        TokenSequence(np.array(ids, dtype=np.int32), ids.index(ASSISTANT) + 1)
        for ids in encoded
        if ASSISTANT in ids[: CONTEXT_TOKENS - 1]
    ]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of this file; raises ConfigError if it cannot be read or lacks the special tokens."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower for a file it cannot read
        raise ConfigError(f"cannot read {path}: {error}; expected a tokenizer.json") from error
    ids = tuple(tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    if ids != tuple(range(len(SPECIAL_TOKENS))):
        raise ConfigError(f"{path}: special tokens {SPECIAL_TOKENS} have ids {ids}, expected (0, 1, 2)")
    return tokenizer


def train_tokenizer(directory: Path, *, vocab_size: int) -> Tokenizer:
    """A new byte-level BPE on the training records of every set, in the settings of the shipped one."""
    held_out_ids = read_held_out_ids()

    def texts() -> Iterator[str]:
        for query_set in QUERY_SETS:
            records = read_records(directory, query_set.name)
            for one in split(records, held_out_ids, has_groups=query_set.has_groups)[0]:
                yield from (one.prompt, one.response or "")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def make_batch(sequences: Sequence[TokenSequence]) -> Batch:
    """The padded batch of these sequences."""
    ids_BT = torch.zeros(len(sequences), max(len(one.ids) for one in sequences), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence.ids)] = torch.from_numpy(sequence.ids)
    lengths = [len(one.ids) for one in sequences]
    return Batch(ids_BT, torch.tensor(lengths), torch.tensor([one.answer_start for one in sequences]))


class BatchOrder:
    """Batches without end, a function of (seed, what was taken): the same after a restart.

    Every batch is of one set, drawn by its share; within a set every sequence comes once an epoch. `taken` counts the
    batches drawn from each set so far, and is all that must be kept to go on.
    """

    def __init__(
        self,
        training: Mapping[str, Sequence[TokenSequence]],
        *,
        seed: int,
        batch_tokens: int,
        taken: Mapping[str, int] | None = None,
    ) -> None:
        self._training = training
        self._seed = seed
        self._batch_tokens = batch_tokens
        self._epochs: dict[str, tuple[int, int, list[list[int]]]] = {}
        self.taken = {query_set.name: 0 for query_set in QUERY_SETS} | dict(taken or {})

    def next(self) -> Batch:
        """The next batch, of at most `batch_tokens` tokens padding included (one sequence at least)."""
        draw = random.Random(f"{self._seed} {sum(self.taken.values())}")
        name = draw.choices([one.name for one in QUERY_SETS], [one.share for one in QUERY_SETS])[0]
        position = self.taken[name]
        self.taken[name] += 1
        first, number, batches = self._epochs.get(name, (0, 0, []))
        if not batches:
            batches = self._cut(name, number)
        while position >= first + len(batches):
            first, number = first + len(batches), number + 1
            batches = self._cut(name, number)
        self._epochs[name] = (first, number, batches)
        return make_batch([self._training[name][index] for index in batches[position - first]])

    def _cut(self, name: str, epoch: int) -> list[list[int]]:
        """Indices of every sequence of a set, in batches of similar lengths, both in an order of this epoch."""
        rng = random.Random(f"{self._seed} {name} {epoch}")
        sequences = self._training[name]
        order = list(range(len(sequences)))
        rng.shuffle(order)
        mean_tokens = max(1, sum(len(one.ids) for one in sequences) // len(sequences))
        pool = _POOL_BATCHES * max(1, self._batch_tokens // mean_tokens)
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            sorted_pool = sorted(order[start : start + pool], key=lambda index: len(sequences[index].ids))
            batches += _batches_within(sorted_pool, sequences, self._batch_tokens)
        rng.shuffle(batches)
        return batches


def _batches_within(
    sorted_pool: Sequence[int], sequences: Sequence[TokenSequence], batch_tokens: int
) -> list[list[int]]:
    """Neighbours by length, each batch as large as `batch_tokens` allows when padded to its longest."""
    batches: list[list[int]] = [[]]
    for index in sorted_pool:
        if batches[-1] and (len(batches[-1]) + 1) * len(sequences[index].ids) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _group(record_id: str) -> str:
    return record_id.rpartition("-")[0]
