"""How a command begins and ends: it joins other processes, checks its options, sets the global settings, and prints a
user's mistake as one line."""

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax

from vlm_jax.configure import configure
from vlm_jax.errors import UserError
from vlm_jax.runs.options import DeviceOptions
from vlm_jax.runs.processes import join
from vlm_jax.runs.ranges import check_ranges
from vlm_jax.runs.running import running


def command(main: Callable[..., None] | None = None, *, configured: bool = True) -> Callable[..., Any]:
    """Wraps a command's ``main(args)``: a :class:`UserError` becomes one line on stderr and exit code 2.

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
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except Exception as error:
            if several is None:
                raise
            _end_process(error)

    return wrapped


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
