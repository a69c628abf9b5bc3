"""The time that the looks of a check share."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """Time until a deadline.

    Parameters
    ----------
    ends : float, default infinity
        The deadline on ``clock``, in seconds.
    clock : callable() -> float
        What tells the time.
    """

    ends: float = math.inf
    clock: Callable[[], float] = time.perf_counter

    @classmethod
    def of(cls, seconds: float, clock: Callable[[], float] = time.perf_counter) -> "Budget":
        """Return a budget of so many seconds from now."""
        return cls(clock() + seconds, clock)

    @property
    def left_s(self) -> float:
        """The seconds that are left, 0 where there are none."""
        return max(0.0, self.ends - self.clock())

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self.left_s <= 0

    def part(self, share: float) -> "Budget":
        """Return a budget that has that part of what is left."""
        return replace(self, ends=self.clock() + share * self.left_s)

    def affords(self, each_s: float, most: int) -> int:
        """Return how many things that take ``each_s`` seconds there is time for, at most ``most``."""
        return most if self.left_s >= most * each_s else int(self.left_s / each_s)
