"""A trial that takes too long, e.g. one that hangs, ended."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["EXIT_CODE", "GRACE_S", "TrialTimeoutError", "ended_after", "reason_of"]

# Between an exception in the main thread and the end of the process, where that did not help.
GRACE_S = 10.0

# As `timeout` of the coreutils has it.
EXIT_CODE = 124


class TrialTimeoutError(BaseException):
    """A trial took too long; like Ctrl-C it is nothing that a trial's own ``except Exception`` may keep."""


def reason_of(timeout_s: float) -> str:
    """Return why a trial failed that was ended so."""
    return f"The trial took longer than `trial_timeout_s`, {timeout_s:g} s, and was ended."


@contextmanager
def ended_after(timeout_s: float | None, before_exit: Callable[[], object]) -> Iterator[None]:
    """Raise :class:`TrialTimeoutError` in what still runs after ``timeout_s``; where it does not end, end the process.

    The exception can be raised in the main thread alone, between two instructions of Python.

    Parameters
    ----------
    timeout_s : float, optional
        Without it, nothing is ended.
    before_exit : callable()
        Called before the process is ended.

    Raises
    ------
    TrialTimeoutError
        In the main thread.
    """
    if timeout_s is None:
        yield
        return
    done = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()

    def raise_it(number: int, frame: object) -> None:
        raise TrialTimeoutError(reason_of(timeout_s))

    def watch() -> None:
        if done.wait(timeout_s):
            return
        if in_main:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)  # it interrupts a sleep as well
        if not done.wait(GRACE_S if in_main else 0):
            before_exit()
            os._exit(EXIT_CODE)

    before = signal.signal(signal.SIGALRM, raise_it) if in_main else None
    threading.Thread(target=watch, name="timeout", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        if in_main:
            signal.signal(signal.SIGALRM, before)
