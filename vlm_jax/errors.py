"""The error for a user's mistake. Commands print it as one sentence, without a traceback."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can correct. The message is one sentence: what is wrong, where, and what to do."""


def unwritten(path: Path, error: Exception) -> UserError:
    """The error for a file of a run that cannot be written."""
    return UserError(
        f"cannot write {path} ({getattr(error, 'strerror', None) or error}): free the disk or choose another --out"
    )


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error message about an unknown name: ``"; did you mean 'a' or 'b'?"`` with the closest of
    ``options``, or the list of all if none is close."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(options)
