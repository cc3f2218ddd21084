"""Which code a run is made with: the library's version and the commit of its source."""

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import TypedDict

_SOURCE = Path(__file__).parents[2]


class Code(TypedDict):
    """The library's code."""

    version: str | None
    """As in pyproject.toml; None if the package is not installed."""
    commit: str | None
    """The git commit of the source; None if it is not known."""
    modified: bool | None
    """Whether tracked files differ from the commit; None if it is not known."""


def code(source: Path = _SOURCE) -> Code:
    """The version and commit of the library's code.

    The commit is that of the checkout at ``source``, if it is one. A library that pip installed from a git address has
    the commit that pip noted (PEP 610).
    """
    try:
        installed = importlib.metadata.distribution("vlm-jax")
        version = installed.version
    except importlib.metadata.PackageNotFoundError:
        installed = version = None
    commit, modified = _checkout(source)
    noted = None if installed is None or commit is not None else installed.read_text("direct_url.json")
    if noted is not None:
        commit = json.loads(noted).get("vcs_info", {}).get("commit_id")
    return {"version": version, "commit": commit, "modified": modified}


def _checkout(source: Path) -> tuple[str | None, bool | None]:
    """The commit of a checkout, and whether its files differ. A folder inside of another project's checkout, such as
    the packages of its virtual environment, is none."""
    if not (source / ".git").exists():
        return None, None
    try:
        commit = _git(source, "rev-parse", "HEAD").strip()
        return commit, bool(_git(source, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):  # no git, no commit, or a folder of another user
        return None, None


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "-C", str(source), "--no-optional-locks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
