"""When a trial that runs is saved, by the time that it has taken and that saving it takes."""

import time
from collections.abc import Callable

from tune_implicit.errors import InvalidValueError

__all__ = ["SaveClock"]

# Of a trial's time, at most so much goes into saving it.
SHARE = 0.02


class SaveClock:
    """Tell when a trial that runs is to be saved next, so that little is lost with it and saving it costs little.

    A save is due ``save_every_s`` seconds after the last one, or after this clock was made; and after one that took
    ``t`` seconds, not before ``50 t`` have passed. The first save alone may take more than 2 % of the time so far: how
    long it takes is not known before.

    Parameters
    ----------
    save_every_s : float
        Seconds between two saves, at least; infinity for no save.
    clock : callable() -> float
        Seconds from any start, which never go back.

    Raises
    ------
    InvalidValueError
        If ``save_every_s`` is negative or NaN.
    """

    def __init__(self, save_every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not save_every_s >= 0:
            raise InvalidValueError(
                f"`save_every_s` must be 0 or more, got {save_every_s}. Pass math.inf to save no trial while it runs."
            )
        self._every_s, self._clock = save_every_s, clock
        self._wait_s, self._last = save_every_s, clock()

    def due(self) -> bool:
        """Return whether it is time for a save."""
        return self._clock() - self._last >= self._wait_s

    def saved(self, took_s: float) -> None:
        """Take in that the trial has just been saved, by whomever, in ``took_s`` seconds."""
        self._wait_s, self._last = max(self._every_s, took_s / SHARE), self._clock()
