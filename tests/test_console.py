"""The console script runs every command as python -m does."""

import importlib
import json
import re
from pathlib import Path

import pytest

import eval.accuracy
from train import cli

ROOT = Path(__file__).parents[1]


def test_every_command_is_listed(capsys):
    """Those of the README's table, and no other; each with what it does."""
    cli.main([])
    text = capsys.readouterr().out
    assert text.startswith("usage: vlm-jax COMMAND")
    table = (ROOT / "README.md").read_text()
    documented = set(re.findall(r"`python -m ((?:interventions|eval|train|vlm_jax)[\w.]+)", table))
    assert set(cli.COMMANDS.values()) == documented
    for name, module in cli.COMMANDS.items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert f"({module})" in line and len(line) > len(name) + len(module) + 20
        assert callable(importlib.import_module(cli._module(name)).main)


@pytest.mark.parametrize("name", ["trace", "study", "info"])
def test_help_is_the_commands_own(capsys, name):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: vlm-jax {name}" in text


def test_version(capsys):
    cli.main(["--version"])
    assert re.fullmatch(r"vlm-jax \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tracee"])
    assert stop.value.code == 2
    assert "no command 'tracee'; did you mean 'trace'" in capsys.readouterr().err


def test_a_run_is_the_same_run(tmp_path, monkeypatch, capsys):
    """The folder that the script began is finished by the module, so both have one configuration."""
    words = [
        "accuracy",
        "--task",
        "mini-docvqa",
        "--limit",
        "2",
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    monkeypatch.setattr("sys.argv", ["vlm-jax", *words])
    cli.main()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["command"] == "eval.accuracy"
    eval.accuracy.main(eval.accuracy.Args(task="mini-docvqa", limit=2, max_new_tokens=2, out=tmp_path / "run"))
    assert "written to" in capsys.readouterr().out
