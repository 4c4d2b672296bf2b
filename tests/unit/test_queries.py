"""The demo's query streams."""

from __future__ import annotations

import gzip
import inspect
import itertools
import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local import queries
from slipstream.errors import ConfigError

Stream = Callable[..., Iterator[queries.Query]]


@pytest.mark.parametrize("stream", [queries.math_queries, queries.sql_queries, queries.code_queries])
def test_a_stream_is_the_same_for_the_same_seed_and_another_for_another(stream: Stream) -> None:
    taken = [list(itertools.islice(stream(seed=seed), 20)) for seed in (1, 1, 2)]
    assert taken[0] == taken[1]
    assert {query.prompt for query in taken[0]}.isdisjoint({query.prompt for query in taken[2]})


@pytest.mark.parametrize("stream", [queries.math_queries, queries.sql_queries, queries.code_queries])
def test_no_prompt_comes_twice_in_five_hundred(stream: Stream) -> None:
    taken = list(itertools.islice(stream(seed=0), 500))
    assert len({query.prompt for query in taken}) == len(taken) == 500
    assert len({query.id for query in taken}) >= 450  # functions of one name in one file share an id


def test_streams_come_in_the_order_of_the_demo_with_the_trained_instruction_lines() -> None:
    streams = queries.builtin_streams(seed=0)
    first = [next(stream) for _, stream in streams]
    assert [domain for domain, _ in streams] == ["math", "sql", "code", "math"]
    assert [query.domain for query in first] == ["math", "sql", "code", "math"]
    assert first[1].prompt.startswith("Write SQL. ")
    assert first[2].prompt.startswith("Write Python. ")
    assert first[0].prompt != first[3].prompt


def test_code_prompts_are_docstrings_of_the_installed_standard_library() -> None:
    prompts = {query.prompt for query in queries.code_queries(seed=0)}
    assert len(prompts) > 2000
    assert f"Write Python. {inspect.getdoc(textwrap.indent)}" in prompts


def test_a_file_gives_one_stream_a_domain_in_order_of_appearance(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl.gz"
    rows = [("a", "sql", "x"), ("b", "math", "y"), ("c", "sql", "z")]
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        for name, domain, prompt in rows:
            lines.write(json.dumps({"id": name, "domain": domain, "prompt": prompt, "response": None}) + "\n")
    streams = [(domain, [query.id for query in stream]) for domain, stream in queries.file_streams(path)]
    assert streams == [("sql", ["a", "c"]), ("math", ["b"])]


def test_long_instruction_lines_become_the_trained_ones() -> None:
    long_sql, long_python = queries.TRAINED_WORDING
    assert queries.trained_wording(long_sql + "Who?") == "Write SQL. Who?"
    assert queries.trained_wording(long_python + "Add.") == "Write Python. Add."
    assert queries.trained_wording("Say: " + long_sql) == "Say: " + long_sql


@pytest.mark.parametrize("line", ["{", '{"id": "a", "domain": "b"}', '{"id": 1, "domain": "b", "prompt": "c"}'])
def test_a_line_that_is_no_query_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"id": "a", "domain": "b", "prompt": "c"}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        queries.file_streams(path)


def test_a_missing_or_empty_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        queries.file_streams(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match="no queries"):
        queries.file_streams(tmp_path / "empty.jsonl")
