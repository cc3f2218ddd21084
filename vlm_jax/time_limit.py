"""A bound on the time of code that others wrote, such as a model's chat template."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

#: The limits that hold now: the thread's time at which each ends, and its seconds.
_LIMITS: list[tuple[float, float]] = []


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError in code that computes for longer than ``seconds``. Only the time in which this thread runs
    counts, so a busy machine does not shorten it. Limits may be nested.

    It works in the main thread of systems that have Unix's timer signals; elsewhere there is no limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    limit = time.thread_time() + seconds, seconds
    _LIMITS.append(limit)
    handler, begun = signal.signal(signal.SIGALRM, _stop), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, _left())  # of a timer that ran before
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _LIMITS.remove(limit)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - begun)))


def _left() -> float:
    """Seconds until the first limit ends."""
    return max(1e-3, min(_LIMITS)[0] - time.thread_time())


def _stop(*_) -> None:
    """Ends the code if a limit has ended. Otherwise other threads or programs had the processor, and it goes on."""
    if not _LIMITS:  # the alarm came while the last limit was taken away
        return
    end, seconds = min(_LIMITS)
    if time.thread_time() >= end:
        raise TimeoutError(f"it did not end within {seconds:g} s")
    signal.setitimer(signal.ITIMER_REAL, _left())
