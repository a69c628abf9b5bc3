"""SIGTERM, which Slurm and Kubernetes send first, as an end in order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Ended", "ending_in_order"]


@dataclass
class Ended:
    """Whether a signal came.

    Parameters
    ----------
    by_signal : int, optional
        Its number.
    """

    by_signal: int | None = None


@contextmanager
def ending_in_order() -> Iterator[Ended]:
    """Let SIGTERM do what Ctrl-C does, and note that it came; what it did before is put back."""
    ended = Ended()
    # Where someone else takes care of it, or outside the main thread, it stays as it is.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield ended
        return

    def interrupt(number: int, frame: object) -> None:
        ended.by_signal = number
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
