"""Ends a training after its current step when SIGTERM arrives. A scheduler sends SIGTERM some seconds before it takes
the machine away."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields a function: number of a step -> whether the training must end after this step because SIGTERM has arrived.

    Inside the block, SIGTERM does not end the process by itself. In a job of several processes JAX handles the signal,
    and all processes get the same answer for a step. A job of one process can handle signals only in its main thread,
    so in another thread the answer is always False.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    arrived = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: arrived.set())
    try:
        yield lambda step: arrived.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def end(name: str, done: int, steps: int, saved: bool) -> None:
    """Prints how far the training came and ends the process, with the exit code of a process that SIGTERM has ended.

    Args:
        name: the name of the training.
        done: how many steps are finished.
        steps: the number of steps of the whole training.
        saved: whether the state after the last finished step is in a checkpoint.

    Raises:
        SystemExit: always, with code 143.
    """
    advice = "; run it again to go on" if saved else ""
    print(f"{name}: ended by SIGTERM after step {done} of {steps}{advice}", file=sys.stderr)
    raise SystemExit(128 + signal.SIGTERM)
