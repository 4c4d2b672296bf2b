"""The requests that drafting is measured on, and those that drafts are adapted to; no request is among both.

Held-out prompts of the four sets that the reference targets were trained on, in the wording of that training, and
Spec-Bench's, as far as prompt and answer fit the context of that training. Drafts are adapted to training prompts.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from benchmarks.reference.corpus import (
    ASSISTANT,
    CONTEXT_TOKENS,
    QUERY_SETS,
    Record,
    read_held_out_ids,
    read_records,
    split,
)

MAX_TOKENS = 96
"""Of an answer."""

MAX_PROMPT_TOKENS = CONTEXT_TOKENS - MAX_TOKENS
SPEC_BENCH = "spec_bench"


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One request: the set it comes from, and its tokens up to where the answer begins."""

    id: str
    domain: str
    token_ids: tuple[int, ...]


class _Question(msgspec.Struct):
    id: str
    prompt: str


def training_prompts(directory: Path, tokenizer: Tokenizer, *, per_domain: int, seed: int) -> list[Prompt]:
    """`per_domain` prompts of every set that nothing held out repeats, mixed; a function of `seed`."""
    held_out_ids = read_held_out_ids()
    chance = random.Random(seed)
    prompts: list[Prompt] = []
    for one in QUERY_SETS:
        kept, _ = split(read_records(directory, one.name), held_out_ids, has_groups=one.has_groups)
        # A third more than asked for: some are too long.
        drawn = chance.sample(kept, min(len(kept), per_domain * 4 // 3))
        prompts += _encoded(drawn, one.name, tokenizer)[:per_domain]
    chance.shuffle(prompts)
    return prompts


def held_out_prompts(directory: Path, tokenizer: Tokenizer, *, seed: int) -> list[Prompt]:
    """All held-out prompts of every set and those of Spec-Bench, mixed; a function of `seed`."""
    held_out_ids = read_held_out_ids()
    prompts: list[Prompt] = []
    known: set[str] = set()
    for one in QUERY_SETS:
        records = read_records(directory, one.name)
        known |= {record.prompt for record in records}
        prompts += _encoded(split(records, held_out_ids, has_groups=one.has_groups)[1], one.name, tokenizer)
    # Its word problems are of one of the sets above, where they may have been trained on.
    unknown = [question for question in _spec_bench(directory) if question.prompt not in known]
    prompts += _encoded(unknown, SPEC_BENCH, tokenizer)
    random.Random(seed).shuffle(prompts)
    return prompts


def _spec_bench(directory: Path) -> list[_Question]:
    path = directory / f"{SPEC_BENCH}.jsonl.gz"
    if not path.exists():
        return []
    decoder = msgspec.json.Decoder(_Question)
    with gzip.open(path, "rb") as lines:
        return [decoder.decode(line) for line in lines]


def _encoded(records: Sequence[Record | _Question], domain: str, tokenizer: Tokenizer) -> list[Prompt]:
    """Those that leave room for an answer."""
    encoded = (
        Prompt(id=one.id, domain=domain, token_ids=tuple(tokenizer.encode(f"<|user|>{one.prompt}<|assistant|>").ids))
        for one in records
    )
    return [one for one in encoded if len(one.token_ids) <= MAX_PROMPT_TOKENS and one.token_ids[-1] == ASSISTANT]
