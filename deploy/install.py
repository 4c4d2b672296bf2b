"""Makes the environment: `python3 deploy/install.py --venv .venv --stamp .venv/.installed`. Standard library only.

Which torch is installed, with the environment variable TORCH unset or `auto`:
1. with an NVIDIA GPU here (`nvidia-smi` works), the ordinary build;
2. else what pip would take by itself (plus `WHEELS=DIR`, a directory of wheels), if that build needs no CUDA package;
3. else the CPU build of TORCH_INDEX (default: PyTorch's public CPU index), if it can be reached;
4. else the ordinary build, with a line that says so.
`TORCH=cpu` stops instead of step 4; `TORCH=cuda` takes the ordinary build at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MIN_PYTHON = (3, 11)
CUDA_PACKAGE = re.compile(r"^(nvidia|cuda|triton|cu[0-9])[-_a-z0-9]*", re.IGNORECASE)
ROOT = Path(__file__).resolve().parent.parent


class InstallError(Exception):
    """The environment cannot be made; the message says what to do."""


def main() -> int:
    """Make or complete the environment; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--stamp", type=Path, required=True, help="written when everything is installed")
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        install(arguments.venv.absolute())
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 2
    arguments.stamp.write_text(f"python {sys.version.split()[0]}\n", encoding="utf-8")
    say(f"ready in {time.monotonic() - began:.0f} s: {arguments.venv}")
    return 0


def install(directory: Path) -> None:
    """An environment in `directory` with torch, this project and its tools; raises InstallError."""
    if sys.version_info < MIN_PYTHON:
        raise InstallError(
            f"Python {sys.version.split()[0]} at {sys.executable}, expected 3.11 or newer; "
            "name another: make install PYTHON=/path/to/python3.12"
        )
    python = make_venv(directory)
    wheels = wheel_arguments(os.environ.get("WHEELS", ""))
    say(f"2/4 {TORCH}")
    choice = os.environ.get("TORCH", "") or "auto"
    index = os.environ.get("TORCH_INDEX", "") or CPU_INDEX
    source = torch_source(python, choice=choice, wheels=wheels, cpu_index=index)
    pip(python, "install", TORCH, *source)
    say("3/4 slipstream with its extras and tools")
    pip(python, "install", "--editable", f"{ROOT}[all,dev]", *wheels)
    say("4/4 CPU kernels")
    # Without a compiler it says so and goes on: decoding can do without kernels.
    subprocess.run([str(python), "-m", "slipstream_kernels"], cwd=ROOT, check=False)


def make_venv(directory: Path) -> Path:
    """The interpreter of the virtual environment in `directory`, made if it is not there; raises InstallError."""
    python = directory / "bin" / "python"
    if not python.exists():
        say(f"1/4 virtual environment in {directory} (Python {sys.version.split()[0]})")
        try:
            venv.create(directory, with_pip=True, symlinks=True)
        except (subprocess.CalledProcessError, OSError) as error:
            raise InstallError(
                f"cannot make a virtual environment: {error}; on Debian and Ubuntu: apt install python3-venv"
            ) from error
    return python


def wheel_arguments(directory: str) -> list[str]:
    """Pip's arguments that add a directory of wheels; raises InstallError if it is none."""
    if not directory:
        return []
    if not Path(directory).is_dir():
        raise InstallError(f"WHEELS={directory}: no such directory; expected one that holds wheels")
    return ["--find-links", directory]


def torch_source(python: Path, *, choice: str, wheels: list[str], cpu_index: str) -> list[str]:
    """Pip's arguments for the torch that the module's docstring describes; raises InstallError."""
    if choice not in ("auto", "cpu", "cuda"):
        raise InstallError(f"TORCH={choice}: expected auto, cpu or cuda")
    if choice == "cuda" or (choice == "auto" and has_nvidia_gpu()):
        say("    the ordinary build (an NVIDIA GPU is here, or TORCH=cuda)")
        return wheels
    seen = []
    for name, source in (("pip's own sources", wheels), (cpu_index, ["--index-url", cpu_index])):
        cuda_packages, problem = resolved_cuda_packages(python, source)
        if not problem and not cuda_packages:
            say(f"    a build without CUDA packages, from {name}")
            return source
        seen.append(f"{name}: {problem or 'needs ' + ', '.join(cuda_packages[:2]) + ', ...'}")
    if choice == "cpu":
        raise InstallError(f"TORCH=cpu, but no CPU build of {TORCH}: {'; '.join(seen)}; set WHEELS or TORCH_INDEX")
    say(f"    no CPU build in reach ({'; '.join(seen)}): taking the ordinary one with its CUDA packages")
    return wheels


def has_nvidia_gpu() -> bool:
    """Whether `nvidia-smi` is here and lists a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def resolved_cuda_packages(python: Path, source: list[str]) -> tuple[list[str], str]:
    """CUDA packages that the torch pip would take from `source` asks for, and pip's problem ("" if none).

    Installs nothing; pip reads the metadata only where the index offers it.
    """
    command = [str(python), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    command += ["--retries", "1", "--timeout", "15", "--report", "-", TORCH, *source]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        last = ran.stderr.strip().splitlines() or ["no reason given"]
        return [], f"pip says: {last[-1]}"
    report = json.loads(ran.stdout[ran.stdout.index("{") :])
    metadata = report["install"][0]["metadata"]
    if sys.platform != "linux":  # the same metadata may list them there, behind a marker for Linux
        return [], ""
    required = [*metadata.get("requires_dist", []), metadata["version"].partition("+")[2]]
    return sorted(match[0] for one in required if (match := CUDA_PACKAGE.match(one))), ""


def pip(python: Path, *arguments: str) -> None:
    """Run pip with its progress shown; raises InstallError."""
    command = [str(python), "-m", "pip", *arguments, "--disable-pip-version-check"]
    if not sys.stdout.isatty():
        command += ["--progress-bar", "off", "--quiet"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise InstallError(f"pip failed, its message is above; the command was: {' '.join(command)}")


def say(line: str) -> None:
    """One line of progress, at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
