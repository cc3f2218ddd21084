"""Profiles some steps of a training, for xprof or TensorBoard."""

import contextlib
from pathlib import Path
from typing import Any

import jax

#: The first steps are left out, because they compile.
_SKIPPED = 2


class Profile:
    """Profiles ``count`` steps, from the third step of a session on, and writes the profile to a folder. It does
    nothing if ``count`` is 0.

    Use it as ``with Profile(...) as profile``, and call :meth:`before` and :meth:`after` at every step. ``begun``: the
    number of steps that earlier sessions did.
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
        """Call it before the ``step``-th step; the first step is 1."""
        if self.count and step == self.first:
            self.trace.enter_context(jax.profiler.trace(str(self.folder)))

    def after(self, step: int, state: Any) -> None:
        """Call it after the ``step``-th step, with the state that the step computed."""
        if self.count and step == self.last:
            jax.block_until_ready(state)
            self.trace.close()
