"""Runs survive: real processes killed with SIGKILL at random points, and then finished, leave the files of a run that
nobody disturbed, byte for byte."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

COMMANDS = {
    "trace": [
        *("interventions.trace", "--task", "mini-okvqa", "--limit", "24", "--trace-batch", "4"),
        *("--replicates", "2"),
    ],
    "study": [
        *("train.study", "--models", "mini-qwen3-vl", "--trace", "16", "--train", "24", "--eval", "32", "--k", "2"),
        *("--placements", "random", "task_diff", "--seeds", "0", "--random-seeds", "42", "--no-alone"),
        *("--corruptions", "swapped_image", "--epochs", "2", "--r", "4", "--trace-batch", "4"),
        *("--save-every", "2"),
    ],
    "edit": [
        *("train.edit", "--model", "mini-qwen3-vl", "--train", "mini-okvqa", "--limit", "24", "--eval-limit", "12"),
        *("--epochs", "4", "--batch", "4", "--save-every", "2"),
    ],
    "register": [
        *("train.register", "--model", "mini-qwen3-vl", "--registers", "2", "--train", "mini-okvqa", "--limit", "24"),
        *("--eval-limit", "12", "--epochs", "4", "--batch", "4", "--save-every", "2"),
    ],
    "sae": [
        *("train.sae", "--model", "mini-qwen3-vl", "--task", "mini-okvqa", "--limit", "48", "--eval-limit", "8"),
        *("--layers", "2", "5", "--latents", "64", "--k", "4", "--batch", "128", "--activation-batch", "8"),
        *("--epochs", "4", "--save-every", "5"),
    ],
}
KILLS = {"trace": 2, "study": 1, "edit": 2, "register": 1, "sae": 2}


def start(name: str, out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", *COMMANDS[name], *more, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-2000:]
    return output


def contents(out: Path) -> dict[str, bytes]:
    """Every file but the one of times, and of metrics only what they say of the training."""
    found = {}
    for path in out.rglob("*"):
        if path.is_file() and path.name != "seconds.json":
            name = str(path.relative_to(out))
            found[name] = losses(path) if path.name == "metrics.jsonl" else path.read_bytes()
    return found


def losses(path: Path) -> bytes:
    records = map(json.loads, path.read_text().splitlines())
    return json.dumps([[record[name] for name in ("step", "loss", "grad_norm", "lr")] for record in records]).encode()


def written(out: Path) -> int:
    """Bytes in the folder: grows with all that a run does."""
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def kill_after(process: subprocess.Popen, out: Path, size: int, moment: float) -> bool:
    """Kills the process a ``moment`` after the folder holds ``size`` bytes; whether it was still running then."""
    while process.poll() is None:
        try:
            if written(out) >= size:
                break
        except OSError:  # a temporary file went away
            continue
        time.sleep(0.01)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of each command that nobody disturbs."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "whole"
            finish(start(name, made[name]))
        return made[name]

    return get


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.release) if name in ("study", "register") else name for name in COMMANDS],
)
def test_killed_runs_end_as_undisturbed_ones(name, undisturbed, tmp_path):
    whole, size = contents(undisturbed(name)), written(undisturbed(name))
    assert len(whole) > 5
    chance, killed = random.Random(name), 0
    for share in sorted(chance.random() for _ in range(KILLS[name])):
        killed += kill_after(start(name, tmp_path), tmp_path, int(share * size), 0.3 * chance.random())
    assert killed, "no kill came before the end"
    finish(start(name, tmp_path))
    after = contents(tmp_path)
    assert after.keys() == whole.keys()
    assert [name for name in whole if whole[name] != after[name]] == []


def test_other_configurations_differ_and_are_refused(undisturbed, tmp_path):
    """The control: the comparison above sees one changed seed, and no run goes on with another's files."""
    one = contents(undisturbed("trace"))
    finish(start("trace", tmp_path, "--trace-seed", "1"))
    assert contents(tmp_path)["samples.jsonl"] != one["samples.jsonl"]
    refused = start("trace", undisturbed("trace"), "--trace-seed", "1")
    output, _ = refused.communicate(timeout=300)
    assert refused.returncode == 2 and "seed 0 there, 1 here" in output
    assert contents(undisturbed("trace")) == one
