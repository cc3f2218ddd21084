"""Remembers which command is running, so that a run folder can name the command that made it."""

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_command: contextvars.ContextVar[str | None] = contextvars.ContextVar("command", default=None)
_left_out: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("left_out", default=None)


def command_name(main: Callable) -> str:
    """The name of the module of a command's ``main``, as ``python -m`` takes it, such as ``train.lora``. It is the same
    if the module was imported."""
    module = sys.modules[main.__module__]
    spec = getattr(module, "__spec__", None)
    if spec is not None:
        return spec.name.removesuffix(".__main__")
    return Path(getattr(module, "__file__", "python")).stem  # a script, or an interactive session


@contextlib.contextmanager
def running(main: Callable) -> Iterator[None]:
    """A context in which :func:`running_command` returns the command of this ``main``."""
    tokens = _command.set(command_name(main)), _left_out.set({})
    try:
        yield
    finally:
        _command.reset(tokens[0])
        _left_out.reset(tokens[1])


def left_out() -> dict[str, str]:
    """The examples that the running command has left out so far: place or id -> reason. It may be added to."""
    found = _left_out.get()
    return {} if found is None else found


def running_command() -> str | None:
    """The name of the command that is running; None in a program that is not one of our commands."""
    return _command.get()
