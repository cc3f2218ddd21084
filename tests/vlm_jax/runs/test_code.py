"""The version and the commit in a run folder's manifest."""

import importlib.metadata
import json
import subprocess
from pathlib import Path

import pytest

from vlm_jax.runs.code import code
from vlm_jax.runs.folder import Run


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "source"
    (folder / "inside").mkdir(parents=True)
    git(folder, "init", "--quiet")
    (folder / "a.py").write_text("a = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "One")
    return folder


def test_a_checkout(checkout):
    """Its commit, and whether a tracked file was changed since."""
    found, head = code(checkout), git(checkout, "rev-parse", "HEAD").strip()
    assert (found["commit"], found["modified"]) == (head, False) and len(head) == 40
    (checkout / "new.py").write_text("")
    assert code(checkout)["modified"] is False
    (checkout / "a.py").write_text("a = 2\n")
    assert code(checkout) == {**found, "modified": True}


def test_packages_inside_of_a_checkout_are_not_of_its_commit(checkout):
    assert code(checkout / "inside")["commit"] is None and code(checkout / "inside")["modified"] is None


def test_a_checkout_without_a_commit(tmp_path):
    git(tmp_path, "init", "--quiet")
    assert code(tmp_path)["commit"] is None


def test_a_package_that_pip_installed_from_git(tmp_path, monkeypatch):
    class Installed:
        version = "0.9"

        def read_text(self, name):
            assert name == "direct_url.json"
            return json.dumps({"url": "https://a.b/c.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}})

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    assert code(tmp_path) == {"version": "0.9", "commit": "abc", "modified": None}


def test_the_manifest_has_it(tmp_path):
    run = Run.open(tmp_path / "run", {})
    run.begin()
    assert json.loads((run.folder / "manifest.json").read_text())["code"] == code()
    assert code()["version"] == importlib.metadata.version("vlm-jax")
