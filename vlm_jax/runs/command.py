"""How a command begins and ends: it joins the other processes if there are any; a user's mistake is one line."""

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable

import jax

from vlm_jax.errors import UserError
from vlm_jax.runs.processes import join
from vlm_jax.runs.running import running


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's ``main(args)``: a :class:`UserError` becomes one line on stderr and exit code 2. Where
    ``args.processes`` names several, they are joined before anything else, and one that breaks off lets go of the
    others at once."""

    @functools.wraps(main)
    def wrapped(args) -> None:
        several = getattr(args, "processes", None)
        try:
            if several is not None:
                join(several)
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
    """Ends this process without waiting for the others, who could be waiting for it."""
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
