"""Profiles some steps of a training, for xprof or TensorBoard."""

import contextlib
from pathlib import Path
from typing import Any

import jax

#: The first steps are left out, because they compile.
_SKIPPED = 2


class Profile:
    """Profiles ``count`` steps into a folder, from the third step of a session on; nothing if ``count`` is 0.

    Used as ``with Profile(...) as profile``, with calls before and after every step. ``begun``: steps that are done
    before the session.
    """

    def __init__(self, folder: Path | None, begun: int, count: int):
        self.folder, self.count = folder, count
        self.first, self.last = begun + _SKIPPED + 1, begun + _SKIPPED + count
        self.trace = contextlib.ExitStack()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.trace.close()

    def before(self, step: int) -> None:
        """To be called before the ``step``-th step, counted from 1."""
        if self.count and step == self.first:
            self.trace.enter_context(jax.profiler.trace(str(self.folder)))

    def after(self, step: int, state: Any) -> None:
        """To be called after it, with what it computed."""
        if self.count and step == self.last:
            jax.block_until_ready(state)
            self.trace.close()
