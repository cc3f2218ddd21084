"""Virtual environments of their own for what cannot be, or should not be, in the tests' environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("vlm_jax", "interventions", "eval", "train")


def run(*command: str | Path, timeout: int = 1800, **options) -> str:
    """The command's standard output; fails with the end of its errors."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
    return done.stdout


def environment(folder: Path, *pip_arguments: str | Path, python: str = sys.executable) -> Path:
    """The Python of a new virtual environment with what ``pip install`` makes of the arguments."""
    run(python, "-m", "venv", folder)
    new = folder / "bin" / "python"
    run(new, "-m", "pip", "install", "--quiet", *pip_arguments)
    return new


def install_library(python: Path, folder: Path) -> None:
    """Installs this source tree as users do, without its dependencies and without writing to the tree."""
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", folder)


def interpreter(version: str) -> str | None:
    """A Python of this version: the one that the variable PYTHON3_12 (of 3.12) names, or ``python3.12`` on the PATH."""
    name = os.environ.get(f"PYTHON{version.replace('.', '_')}") or shutil.which(f"python{version}")
    if name is None:
        return None
    answer = subprocess.run([name, "--version"], capture_output=True, text=True)
    return name if answer.stdout.startswith(f"Python {version}.") else None
