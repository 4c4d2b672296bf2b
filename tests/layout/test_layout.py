"""The shape of the repository: what is where, how long files are, and that the pages speak of things that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

import slipstream
from slipstream.config import Config
from slipstream.telemetry import ReplicaMetrics, WorkerMetrics

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400
MAX_FUNCTION_LINES = 50
LONGER_FOR_A_REASON = {
    "slipstream/stores/redis.py",  # the client may be imported in one file only
}
LONG_FUNCTIONS_FOR_A_REASON = {"slipstream/loop.py: turn"}  # one whole turn, straight-line on purpose
PAGES = ("README.md", "docs/runbook.md", "docs/loop.md", "docs/glossary.md", "docs/api.md")


def tracked() -> list[str]:
    """Files of the repository: what git tracks, or, without git (an sdist), what lies there."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    return [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts]


def python_files() -> list[str]:
    return [name for name in tracked() if name.endswith(".py")]


def test_the_public_face_is_sorted_and_complete() -> None:
    assert slipstream.__all__ == sorted(slipstream.__all__)
    tree = ast.parse((ROOT / "slipstream" / "__init__.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(slipstream.__all__) == imported
    assert all(getattr(slipstream, name) is not None for name in slipstream.__all__)


def test_importing_the_library_imports_neither_torch_nor_ray() -> None:
    program = "import sys, slipstream; print(sorted({'torch', 'ray', 'mlflow', 'kafka', 'redis'} & set(sys.modules)))"
    python = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert python.stdout.strip() == "[]"


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert (ROOT / "kernels" / "slipstream_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_is_longer_than_400_lines_without_a_stated_reason() -> None:
    code = [name for name in python_files() if not name.startswith("tests/")]
    too_long = {name for name in code if len((ROOT / name).read_text().splitlines()) > MAX_LINES}
    assert too_long <= LONGER_FOR_A_REASON


def test_no_function_is_longer_than_50_lines() -> None:
    too_long = []
    for name in python_files():
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _num_lines(node) > MAX_FUNCTION_LINES:
                too_long.append(f"{name}: {node.name}")
    assert set(too_long) <= LONG_FUNCTIONS_FOR_A_REASON


def _num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_function_takes_more_than_seven_parameters_outside_constructors_and_tests() -> None:
    too_many = []
    for name in python_files():
        if name.startswith("tests/"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__":
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([one for one in parameters if one.arg not in ("self", "cls")]) > 7:
                    too_many.append(f"{name}: {node.name}")
    assert too_many == []


def test_no_file_is_named_after_nothing() -> None:
    vague = re.compile(r"(^|_)(utils?|helpers?|common|misc|manager|base|v2|new|tmp)(_|\.|$)")
    assert [name for name in python_files() if vague.search(Path(name).name)] == []


def test_no_machine_path_is_in_the_tree() -> None:
    # Written in two parts, so that this file does not find itself.
    paths = re.compile("|".join(("/" + "work/", "/" + "opt/wheels", "/" + "opt/pypi", "/" + "root/", "/" + "home/")))
    found = []
    for name in tracked():
        if Path(name).suffix in (".safetensors", ".png", ".msgpack", ".gz", ".json", ".jsonl") or name == "LICENSE":
            continue
        if paths.search((ROOT / name).read_text(errors="replace")):
            found.append(name)
    assert found == []


def test_no_pickle_is_imported_anywhere() -> None:
    imports = re.compile(r"^\s*(import|from) (pickle|cloudpickle|dill|shelve|joblib)\b", re.MULTILINE)
    assert [name for name in python_files() if imports.search((ROOT / name).read_text())] == []


def _metric_names() -> set[str]:
    registries: list[CollectorRegistry] = [ReplicaMetrics().registry, WorkerMetrics().registry]
    names = set()
    for registry in registries:
        for family in registry.collect():
            names |= {family.name, f"{family.name}_total"} if family.type == "counter" else {family.name}
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_metric_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"\bslipstream_[a-z_]+[a-z]\b", (ROOT / page).read_text())) - {"slipstream_kernels"}
    assert named <= _metric_names()


def test_the_runbook_names_metrics_at_all() -> None:
    assert len(re.findall(r"slipstream_[a-z_]+", (ROOT / "docs" / "runbook.md").read_text())) > 10


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    roots = r"(?:slipstream|services|workers|kernels|deploy|benchmarks|tests|docs)"
    named = re.findall(rf"`({roots}/[A-Za-z0-9_./-]+)`", text)
    missing = [
        name for name in named if not any((ROOT / f"{name}{end}").exists() for end in ("", ".py", "/__init__.py"))
    ]
    assert [name for name in missing if not (ROOT / Path(name).parent / f"{Path(name).stem}.py").exists()] == []


def test_every_setting_that_the_runbook_names_exists() -> None:
    groups = {name: set(type(getattr(Config(), name)).__struct_fields__) for name in Config.__struct_fields__}
    named = re.findall(r"`(serving|observing|learning|gate)\.([a-z_]+)`", (ROOT / "docs" / "runbook.md").read_text())
    assert named
    assert [(group, key) for group, key in named if key not in groups[group]] == []


def test_the_wheel_holds_the_library_and_the_kernels_only() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages == ["slipstream", "kernels/slipstream_kernels"]
