"""How a command begins and ends: it joins other processes, checks its options, sets the global settings, and says in
one line why it stopped."""

import errno
import functools
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from vlm_jax.configure import configure
from vlm_jax.errors import UserError
from vlm_jax.runs.options import DeviceOptions
from vlm_jax.runs.processes import first, join
from vlm_jax.runs.ranges import check_ranges
from vlm_jax.runs.running import running


def command(main: Callable[..., None] | None = None, *, configured: bool = True) -> Callable[..., Any]:
    """Wraps a command's ``main(args)``, so that it says in one line on stderr why it stopped.

    A :class:`UserError` has exit code 2. Of any other error the line names a file with the traceback (exit code 70).
    Ctrl-C has 130, and a reader that went away, as in ``| head``, 141 without a line.

    Before ``main`` runs, the processes that ``args.processes`` names are joined, options are checked against their
    ranges, and :func:`vlm_jax.configure` sets the precision, the cache and the mesh. No other code in the library
    changes global settings. If there are several processes and one fails, it ends at once, so that the others do not
    wait for it.

    Args:
        configured: whether to call :func:`vlm_jax.configure`. A command that compiles for devices of another machine
            uses ``@command(configured=False)``, because such programs cannot be read back from the cache.
    """
    if main is None:
        return functools.partial(command, configured=configured)

    @functools.wraps(main)
    def wrapped(args) -> None:
        several = getattr(args, "processes", None)
        try:
            if several is not None:
                join(several)
            check_ranges(args)
            if configured:
                configure(mesh=args.mesh_axes() if isinstance(args, DeviceOptions) else None)
            with running(main):
                main(args)
            if getattr(args, "page", False):
                first(lambda: _show_page(args.out))
            sys.stdout.flush()
        except UserError as error:
            _stop(2, f"error: {error}")
        except KeyboardInterrupt:
            _stop(130, "stopped: the same command goes on from what is written")
        except BrokenPipeError:
            _stop(141)
        except Exception as error:
            if several is not None:
                _end_process(error)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                _stop(
                    2, f"error: cannot write{_named(error)} ({error.strerror}): free the disk or choose another --out"
                )
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                _stop(2, f"error: the name {str(error.filename)[:80]}... is too long for a file: shorten it")
            _stop(70, f"error: {_report(error)}")

    return wrapped


def _show_page(folder: Path) -> None:
    """Writes the page of a run folder and prints its name."""
    from vlm_jax.runs.page import write_page  # its libraries take a second to import

    if folder.is_dir():  # not if the command only printed a plan
        print(f"the page: {write_page(folder)}")


def _stop(code: int, line: str = "") -> NoReturn:
    """Ends the command with a line on stderr."""
    try:
        sys.stdout.flush()
    except OSError:  # Python must not try to write it again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        print(line, file=sys.stderr)
    raise SystemExit(code)


def _named(error: OSError) -> str:
    return f" {error.filename}" if error.filename else " its output"


def _report(error: Exception) -> str:
    """The line for an error that nobody foresaw. It writes the traceback to a file."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    with tempfile.NamedTemporaryFile("w", prefix="vlm-jax-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    reason = " ".join(str(error).split())[:200]
    return (
        f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno} ({reason}): this is a fault of "
        f"vlm-jax; please report it with the file {file.name}"
    )


def _end_process(error: Exception) -> None:
    """Prints the error and ends this process. It must not wait for the others, because they may be waiting for it."""
    traceback.print_exception(error)
    reason = " ".join(str(error).split())[:200]
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} broke off ({type(error).__name__}: {reason}): "
        "if another process ended before, read its log for the cause; start all processes again to continue",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(128 + signal.SIGABRT)
