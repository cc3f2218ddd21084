"""Ends a training after its current step when SIGTERM comes. A scheduler sends SIGTERM some seconds before it takes the
machine away."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields a function: number of a step -> whether the training must end after this step, because SIGTERM has come.

    Inside the block the signal has no other effect. All processes of a job get the same answer. Only the main thread
    can handle signals, so in another thread the answer is always False.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    arrived = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    handler = signal.signal(signal.SIGTERM, lambda *_: arrived.set())
    try:
        yield lambda step: arrived.is_set()
    finally:
        signal.signal(signal.SIGTERM, handler)


def end(name: str, done: int, steps: int, saved: bool) -> None:
    """Ends the process with the exit code that SIGTERM would have caused.

    Raises:
        SystemExit: always, with code 143.
    """
    advice = "; run it again to go on" if saved else ""
    print(f"{name}: ended by SIGTERM after step {done} of {steps}{advice}", file=sys.stderr)
    raise SystemExit(128 + signal.SIGTERM)
