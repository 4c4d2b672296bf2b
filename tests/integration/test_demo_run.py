"""`make demo` as a process, with too few queries to learn from: it must serve them, say so, fail, and clean up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deploy.local.supervisor import ROOT


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_a_demo_without_promotion_answers_all_fails_and_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory(prefix="demo-") as directory:
        queries = Path(directory) / "few.jsonl"
        rows = [{"id": str(i), "domain": "math", "prompt": f"What is {i} plus {i}?"} for i in range(9)]
        queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        command = [sys.executable, "-m", "deploy.local.demo", "--queries", str(queries), "--state", f"{directory}/s"]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "NOT MET: 0 drafts were promoted, expected at least 2" in ran.stdout
    assert re.search(r"first token '.+' after \d+\.\d s; no draft yet: the first is born from math", ran.stdout)
    assert re.search(r"^8 queries, 0 failed", ran.stdout, re.MULTILINE)  # one of the nine measured the first token
    assert re.search(r"stopped: 0 processes left, 0 of [1-9]\d* ports still open", ran.stdout)


def test_a_demo_of_a_file_that_is_none_is_refused_before_anything_starts() -> None:
    command = [sys.executable, "-m", "deploy.local.demo", "--queries", "nowhere.jsonl"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("demo: cannot read nowhere.jsonl")
