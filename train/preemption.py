"""SIGTERM, which a scheduler sends some seconds before it takes the machine away: a training ends after its step."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: whether SIGTERM has come, so that the training ends after this step. Inside the
    block the signal has no other effect. Several processes agree on the step. In a thread other than the main one,
    which cannot handle signals, the answer is always no."""
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
    """Ends the process as the signal itself would have.

    Raises:
        SystemExit: always, with code 143.
    """
    advice = "; run it again to go on" if saved else ""
    print(f"{name}: ended by SIGTERM after step {done} of {steps}{advice}", file=sys.stderr)
    raise SystemExit(128 + signal.SIGTERM)
