"""One kind of error for a user's mistake: commands print it as one sentence, never as a traceback."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """A mistake the user can mend: the message says what, where and what to do, in one sentence."""


def unwritten(path: Path, error: OSError) -> UserError:
    """What to say where a run's file cannot be written."""
    return UserError(f"cannot write {path} ({error.strerror or error}): free the disk or choose another --out")


def nearest(name: str, options: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the closest of ``options``, else the whole list."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(options)
