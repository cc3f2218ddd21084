"""Which command is running, so that a run folder can say which command made it."""

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_command: contextvars.ContextVar[str | None] = contextvars.ContextVar("command", default=None)


def command_name(main: Callable) -> str:
    """The name under which ``python -m`` knows the module of a command's ``main``, such as ``train.lora``. It is the
    same whether the module was imported or started."""
    module = sys.modules[main.__module__]
    spec = getattr(module, "__spec__", None)
    if spec is not None:
        return spec.name.removesuffix(".__main__")
    return Path(getattr(module, "__file__", "python")).stem  # a script, or an interactive session


@contextlib.contextmanager
def running(main: Callable) -> Iterator[None]:
    """Within it, :func:`running_command` is the command of this ``main``."""
    token = _command.set(command_name(main))
    try:
        yield
    finally:
        _command.reset(token)


def running_command() -> str | None:
    """The command that is running; None in a program that opens a run folder by itself."""
    return _command.get()
