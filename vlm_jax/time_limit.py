"""A bound on the time of code that others wrote, such as a model's chat template."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError in code that runs for longer than ``seconds``. Limits may be nested.

    It works in the main thread of systems that have Unix's timer signals; elsewhere there is no limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} s")

    handler, begun = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # of a timer that ran before
    if left:
        signal.setitimer(signal.ITIMER_REAL, min(seconds, left))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - begun)))
