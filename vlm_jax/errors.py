"""One kind of error for a user's mistake, printed as one sentence and never as a traceback."""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake the user can mend: the message says what, where and what to do, in one sentence."""


def nearest(name: str, options: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the closest of ``options``, else the whole list."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(options)


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's ``main``: a :class:`UserError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped
