"""How a command begins and ends: it joins its other processes, checks its options and sets what is global; a user's
mistake is one line."""

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

    Before ``main`` runs: the processes that ``args.processes`` names are joined, numbers outside their ranges are
    refused, and :func:`vlm_jax.configure` sets precision, cache and mesh. Nothing else in the library sets a global.
    Where there are several processes, one that fails ends at once, so that the others do not wait for it.

    Args:
        configured: False for a command that compiles for other devices than those of this machine
            (``@command(configured=False)``): programs for those cannot be read back from the cache.
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
            _let_go(error)

    return wrapped


def _let_go(error: Exception) -> None:
    """Ends this process without waiting for the others, which may be waiting for it."""
    traceback.print_exception(error)
    reason = " ".join(str(error).split())[:200]
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} broke off ({type(error).__name__}: {reason}): "
        "if another one ended before it, that one's log says why; start all of them again to go on",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(128 + signal.SIGABRT)
