"""Query streams that exist on every machine, and the reader of query files.

`math` and `sql` are seeded generators of word problems and questions; `code` takes docstrings from the installed
Python's standard library. Prompts carry the instruction lines that the reference target was trained with
(`deploy/models/mix-moe-11m/README.md`); the service's chat template puts its special tokens around them.
"""

from __future__ import annotations

import ast
import gzip
import itertools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import msgspec

from deploy.local import wording
from slipstream.errors import ConfigError

WRITE_SQL = "Write SQL. "
WRITE_PYTHON = "Write Python. "
TRAINED_WORDING = {
    "Could you translate the following question into SQL. Please only generate SQL, don't include explanation in the "
    "answer. ": WRITE_SQL,
    "Please generate code based on the following doc:\n": WRITE_PYTHON,
}
"""Long instruction lines of published query sets, and the short ones that the target knows instead."""

DOCSTRING_CHARS = (24, 400)
"""Shortest and longest docstring taken; longer ones leave the target's context of training."""

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "turtledemo",
}

_FILES_MIXED = 24
"""Files read together, so that neighbouring prompts come from different ones."""


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """One question: `prompt` is the user's turn, without special tokens; unknown fields of a file are ignored."""

    id: str
    domain: str
    prompt: str


def math_queries(*, seed: int) -> Iterator[Query]:
    """Grade-school word problems without end, the same for the same seed."""
    rng = random.Random(f"math {seed}")
    for number in itertools.count():
        first, second = rng.sample(wording.FIRST_NAMES, 2)
        goods, others = rng.sample(wording.GOODS, 2)
        prompt = rng.choice(wording.MATH_TEMPLATES).format(
            A=first,
            B=second,
            x=goods,
            y=others,
            k=rng.randint(2, 9),
            n=rng.randint(3, 24),
            m=rng.randint(12, 96),
            b=20 * rng.randint(6, 60),
            p=rng.randint(2, 40),
            q=rng.randint(15, 120),
            pct=5 * rng.randint(1, 15),
            place=rng.choice(wording.PLACES),
            kin=rng.choice(wording.RELATIVES),
            time=rng.choice(wording.TIMES),
            city=rng.choice(wording.CITIES),
        )
        yield Query(id=f"math-{seed}-{number}", domain="math", prompt=prompt)


def sql_queries(*, seed: int) -> Iterator[Query]:
    """Questions about one table without end, the same for the same seed."""
    rng = random.Random(f"sql {seed}")
    for number in itertools.count():
        table = rng.choice(wording.SQL_TABLES)
        asked, given, also = rng.sample(table, 3)
        counted = rng.choice([name for name, kind in table if kind in (wording.SMALL, wording.LARGE)] or [also[0]])
        templates = wording.SQL_LOOKUPS if rng.random() < 0.65 else wording.SQL_AGGREGATES
        prompt = rng.choice(templates).format(
            a=asked[0],
            b=given[0],
            v=_value(given[1], rng),
            c=also[0],
            w=_value(also[1], rng),
            n=counted,
            k=rng.randint(1, 60),
        )
        yield Query(id=f"sql-{seed}-{number}", domain="sql", prompt=WRITE_SQL + prompt)


def code_queries(*, seed: int) -> Iterator[Query]:
    """Docstrings of the installed standard library, each once, files in an order drawn from the seed; they run out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path.relative_to(library) for path in library.rglob("*.py"))
    files = [path for path in paths if not _SKIPPED_FOLDERS & set(path.parts)]
    rng = random.Random(f"code {seed}")
    rng.shuffle(files)
    seen: set[str] = set()
    for first in range(0, len(files), _FILES_MIXED):
        found = [
            Query(id=f"code-{path.with_suffix('').as_posix()}-{name}", domain="code", prompt=WRITE_PYTHON + text)
            for path in files[first : first + _FILES_MIXED]
            for name, text in _docstrings(library / path)
        ]
        rng.shuffle(found)
        fresh = {query.prompt: query for query in found if query.prompt not in seen}
        seen.update(fresh)
        yield from fresh.values()


def builtin_streams(*, seed: int) -> list[tuple[str, Iterator[Query]]]:
    """The demo's streams in order: math, an abrupt shift to sql, code, and a return to (other) math."""
    return [
        ("math", math_queries(seed=seed)),
        ("sql", sql_queries(seed=seed)),
        ("code", code_queries(seed=seed)),
        ("math", math_queries(seed=seed + 1)),
    ]


def file_streams(path: Path) -> list[tuple[str, Iterator[Query]]]:
    """One stream per domain of a query file, domains in their order of appearance.

    The file holds one JSON object a line with `id`, `domain` and `prompt`, gzip-packed if it ends in `.gz`.
    Raises ConfigError naming the line that is none.
    """
    streams: dict[str, list[Query]] = {}
    for query in read_queries(path):
        streams.setdefault(query.domain, []).append(query)
    if not streams:
        raise ConfigError(f"{path}: no queries, expected one JSON object a line with id, domain and prompt")
    return [(domain, iter(queries)) for domain, queries in streams.items()]


def read_queries(path: Path) -> Iterator[Query]:
    """The queries of a file, in its order, in the wording that the target was trained with; raises ConfigError."""
    decoder = msgspec.json.Decoder(Query)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    query = decoder.decode(line)
                except msgspec.MsgspecError as error:
                    raise ConfigError(f"{path}, line {number}: {error}; expected id, domain and prompt") from error
                yield msgspec.structs.replace(query, prompt=trained_wording(query.prompt))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}; expected a .jsonl or .jsonl.gz file") from error


def trained_wording(prompt: str) -> str:
    """The prompt with a long instruction line replaced by the short one of the target's training."""
    for long, short in TRAINED_WORDING.items():
        if prompt.startswith(long):
            return short + prompt.removeprefix(long)
    return prompt


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Names and docstrings of the functions of one source file; nothing if it cannot be read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    shortest, longest = DOCSTRING_CHARS
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if shortest <= len(text) <= longest:
                yield node.name, text


def _value(kind: int, rng: random.Random) -> str:
    """A value for a column of that kind."""
    if kind == wording.PERSON:
        return f"{rng.choice(wording.FIRST_NAMES)} {rng.choice(wording.LAST_NAMES)}"
    if kind == wording.TEAM:
        return f"{rng.choice(wording.CITIES)} {rng.choice(wording.MASCOTS)}"
    if kind == wording.CITY:
        return rng.choice(wording.CITIES)
    if kind == wording.DATE:
        return f"{rng.choice(wording.MONTHS)} {rng.randint(1, 28)}, {rng.randint(1948, 2012)}"
    if kind == wording.YEAR:
        return str(rng.randint(1948, 2012))
    if kind == wording.SCORE:
        return f"{rng.randint(0, 40)}-{rng.randint(0, 40)}"
    if kind == wording.TITLE:
        return " ".join(rng.sample(wording.TITLE_WORDS, 2))
    return str(rng.randint(1, 40) if kind == wording.SMALL else rng.randint(60, 60_000))
