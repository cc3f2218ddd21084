"""Several real processes, over gloo on this machine: they find what one finds; one that is stopped or killed ends all,
and they go on from their last checkpoint."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from on_processes import HALF, WHOLE, Args, halved, main

from vlm_jax import UserError
from vlm_jax.runs.processes import Team, first, gathered, join

ROOT = Path(__file__).parents[3]
#: How long a process is missed before the others end (a minute is what commands wait).
LOST_SECONDS = 15
#: How the names of what was trained begin.
TRAINED = ("change", "dictionary")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("four", "give auto, or HOST:PORT,COUNT,INDEX"),
        ("10.0.0.1:9000,4", "give auto, or HOST:PORT,COUNT,INDEX"),
        ("10.0.0.1,4,0", "give auto, or HOST:PORT,COUNT,INDEX"),
        ("10.0.0.1:0,4,0", "give auto, or HOST:PORT,COUNT,INDEX"),
        ("10.0.0.1:65536,4,0", "give auto, or HOST:PORT,COUNT,INDEX"),
        ("10.0.0.1:" + "9" * 5000 + ",4,0", "give auto, or HOST:PORT,COUNT,INDEX"),
        ("10.0.0.1:9000,0,0", "a job has at least 1 process, not 0"),
        ("10.0.0.1:9000,4,4", "the index of 4 processes is 0 to 3, not 4"),
    ],
)
def test_refused_processes(text, says):
    with pytest.raises(UserError) as raised:
        join(text)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_teams_share_the_samples():
    shares = [list(Team(index, 3).rows(8)) for index in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_one_process_asks_nobody():
    assert first(lambda: "made") == "made" and gathered([1]) == [[1]]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(count: int, mesh: str, out: Path) -> list[subprocess.Popen]:
    """The processes of a job, with one device each."""
    environment = {
        **os.environ,
        **{"JAX_PLATFORMS": "cpu", "NPROC": "16"},
        "LOST_SECONDS": str(LOST_SECONDS),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
    }
    port = free_port()
    command = [sys.executable, "-m", "tests.helpers.on_processes", "--mesh", mesh, "--out", str(out), "--processes"]
    return [
        subprocess.Popen(
            [*command, f"127.0.0.1:{port},{count},{index}"],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(job: list[subprocess.Popen], timeout: float = 600) -> list[tuple[int, str, str]]:
    """Exit code, standard output and error of each."""
    ends = []
    try:
        for process in job:
            output, errors = process.communicate(timeout=timeout)
            ends.append((process.returncode, output, errors))
    finally:
        for process in job:
            process.kill()
    return ends


def at_checkpoint(job: list[subprocess.Popen], out: Path, step: int) -> None:
    """Waits until the training has kept this step, or a later one."""
    folder = out / "training" / "checkpoints"
    while not (folder.is_dir() and any(p.name.isdecimal() and int(p.name) >= step for p in folder.iterdir())):
        assert all(process.poll() is None for process in job), finish(job)
        time.sleep(0.01)


def found(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "found.npz") as arrays:
        return dict(arrays)


def losses(out: Path) -> list[float]:
    """And the norms of the gradients: of the adapter, the whole decoder, editors and dictionaries."""
    lines = [
        line
        for name in ("training", "tune", "edit/training", "sae/training")
        for line in (out / name / "metrics.jsonl").read_text().splitlines()
    ]
    return [json.loads(line)[name] for line in lines for name in ("loss", "grad_norm")]


def apart(some: dict, others: dict) -> dict[str, float]:
    """The largest difference of the trace's numbers, and the norm of the difference between two trainings' changes to
    an adapter or an editor, or between their dictionaries, relative to the norm of these.

    A norm, because Adam divides by the root of the second moment: where gradients vanish, an entry's step is made of
    rounding errors, and the largest difference would be that of the worst entry.
    """
    assert some.keys() == others.keys()
    return {
        name: float(
            np.linalg.norm(some[name] - others[name]) / np.linalg.norm(others[name])
            if name.startswith(TRAINED)
            else np.abs(some[name] - others[name]).max()
        )
        for name in some
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds, without a mesh; and with another seed."""
    folders = [tmp_path_factory.mktemp("one") / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        main(Args(out=folder, seed=seed))
    return folders


def check(out: Path, one: list[Path]) -> None:
    for name, gap in apart(found(out), found(one[0])).items():
        assert gap < (1e-4 if name.startswith(TRAINED) else 1e-5), (name, gap)
    np.testing.assert_allclose(losses(out), losses(one[0]), rtol=1e-5)
    other = apart(found(one[1]), found(one[0]))  # the control; sigma_E knows of no seed
    assert min(gap for name, gap in other.items() if name != "sigma") > 1e-3
    assert json.loads((out / "answers.json").read_text()) == json.loads((one[0] / "answers.json").read_text())
    records = [json.loads(line) for line in (out / "trace/samples.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records) == 10
    assert not list(out.rglob("*-of-*"))
    shares = [json.loads(file.read_text()) for file in (out / "encoded").iterdir()]
    every = json.loads((one[0] / "encoded/0.json").read_text())
    assert sorted(id for share in shares for id in share) == every and {len(s) for s in shares} == {16 // len(shares)}


@pytest.mark.slow
def test_two_processes_stopped_killed_and_finished(one, tmp_path):
    """The parameters lie apart over the two, who therefore work on the same samples."""
    out = tmp_path / "run"
    job = start(2, "fsdp=2", out)
    at_checkpoint(job, out, 2)
    job[1].send_signal(signal.SIGTERM)
    ends = finish(job, 120)
    assert [code for code, *_ in ends] == [128 + signal.SIGTERM] * 2, ends
    stopped = {
        line.split("after step ")[1] for *_, errors in ends for line in errors.splitlines() if "after step" in line
    }
    assert len(stopped) == 1  # the same for both
    steps = sorted(int(path.name) for path in (out / "training/checkpoints").iterdir())
    assert steps[-1] == int(stopped.pop().split()[0])

    job = start(2, "fsdp=2", out)
    at_checkpoint(job, out, steps[-1] + 4)
    job[1].kill()
    begun = time.monotonic()
    (code, _, errors), _ = finish(job, 300)
    assert time.monotonic() - begun < LOST_SECONDS + 60
    assert code not in (0, 2) and ("process 0 of 2 broke off" in errors or "another task died" in errors), errors

    ends = finish(start(2, "fsdp=2", out))
    assert [code for code, *_ in ends] == [0, 0], ends
    said = [[line for line in output.splitlines() if "[Gloo]" not in line] for _, output, _ in ends]
    assert said[0][-1] == "only the first process says this" and said[1] == []
    assert said[0][0].startswith("activations: ") and len(said[0]) == 2
    check(out, one)
    shutil.copytree(out / "half", tmp_path / "half")
    resumed, whole = halved(tmp_path / "half", WHOLE)["w"], halved(tmp_path / "whole", WHOLE)["w"]
    np.testing.assert_allclose(resumed, whole, rtol=1e-6)  # saved by two, restored by one
    assert np.abs(halved(out / "half", HALF)["w"] - whole).max() > 0.1


@pytest.mark.release
def test_four_processes_in_two_teams(one, tmp_path):
    ends = finish(start(4, "data=2,fsdp=2", tmp_path / "run"))
    assert [code for code, *_ in ends] == [0] * 4, ends
    check(tmp_path / "run", one)
