"""How a command ends: with one line that says why, whatever happened."""

import dataclasses
import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax.errors import UserError
from vlm_jax.runs.command import command

PROGRAM = """
import dataclasses, sys
from vlm_jax.runs.command import command

@dataclasses.dataclass(frozen=True)
class Args:
    pass

@command(configured=False)
def main(args):
    for number in range(100000):
        print("line", number)

main(Args())
"""


@dataclasses.dataclass(frozen=True)
class Args:
    number: int = 0


def end(error, capsys):
    """The exit code and the lines on stderr of a command in which an error is raised."""

    @command(configured=False)
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        main(Args())
    return stop.value.code, capsys.readouterr().err.splitlines()


def test_a_mistake_is_one_line(capsys):
    assert end(UserError("--x is 1: give 2"), capsys) == (2, ["error: --x is 1: give 2"])


def test_an_unforeseen_error_asks_for_a_report_with_its_traceback(capsys):
    code, (line,) = end(KeyError("a\nb"), capsys)
    assert code == 70
    match = re.fullmatch(
        r"error: KeyError in test_command\.py, line \d+ \(.*\): this is a fault of .* file (\S+)", line
    )
    assert match, line
    report = Path(match[1]).read_text()
    assert "Traceback" in report and "in main" in report and "KeyError" in report


def test_deep_recursion_is_an_error_like_others(capsys):
    code, (line,) = end(RecursionError("maximum recursion depth exceeded"), capsys)
    assert code == 70 and "RecursionError" in line


def test_ctrl_c_tells_that_the_work_goes_on(capsys):
    assert end(KeyboardInterrupt(), capsys) == (130, ["stopped: the same command goes on from what is written"])


def test_a_full_disk_names_the_file(capsys):
    code, (line,) = end(OSError(errno.ENOSPC, "No space left on device", "/x/results.json"), capsys)
    assert code == 2 and line.startswith("error: cannot write /x/results.json (No space left on device): free the disk")


def test_a_name_that_is_too_long(capsys):
    code, lines = end(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), capsys)
    assert code == 2 and lines == [f"error: the name {'x' * 80}... is too long for a file: shorten it"]


def test_an_error_without_a_mistake_passes_nothing_on(capsys):
    """The control: a command that succeeds prints no line and does not exit."""
    main = command(lambda args: None, configured=False)
    assert main(Args()) is None and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "pipe, code, says", [("| head -1", 141, ""), ("> /dev/full", 2, "error: cannot write its output")]
)
def test_output_that_nobody_takes(tmp_path, pipe, code, says):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {tmp_path / 'program.py'} {pipe}"],
        capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if re.search("error|Error|Traceback|ignored", line)]
    assert done.returncode == code
    assert len(errors) == bool(says) and all(line.startswith(says) for line in errors), done.stderr
