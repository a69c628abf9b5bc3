"""What every solver of ``H v = b`` takes and returns.

A solver knows ``H`` only through ``hvp``, the function ``v -> H v``: no model and no autograd in this room. Vectors
are flat ``(n,)`` tensors of one floating dtype on one device; norms are Euclidean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = [
    "Attempt",
    "Hvp",
    "Solution",
    "Solver",
    "Status",
]

Hvp = Callable[[Tensor], Tensor]


class Status(Enum):
    """How a solve ended.

    ``CONVERGED`` and ``MAX_STEPS`` are answers, the second a truncated one whose residual says how good it is. The
    others are failures; ``v`` is then the best iterate before the failure, and no answer. ``NEGATIVE_CURVATURE`` is an
    ``H`` with a direction of negative curvature, or of none at all in which ``b`` has a part. ``UNVERIFIED`` is a
    residual that, computed anew, is not the one the solver reported.
    """

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    DIVERGED = "diverged"
    NEGATIVE_CURVATURE = "negative_curvature"
    NON_FINITE = "non_finite"
    UNVERIFIED = "unverified"

    @property
    def failed(self) -> bool:
        """Whether the solve gave no answer."""
        return self not in (Status.CONVERGED, Status.MAX_STEPS)


@dataclass(frozen=True)
class Attempt:
    """One solve among several of the same system.

    Parameters
    ----------
    solver : str
        Its name.
    status : Status
        How it ended.
    steps : int
        Iterations taken.
    """

    solver: str
    status: Status
    steps: int


@dataclass(frozen=True)
class Solution:
    """The result of a solve.

    Parameters
    ----------
    v : Tensor, shape (n,)
        The (approximate) solution of ``H v = b``, in the dtype and on the device of ``b``.
    status : Status
        How the solve ended.
    steps : int
        Iterations taken.
    residual_norm : float
        ``||b - H v||`` of the ``v`` returned, or a bound on it where the solver's class says so.
    lambda_min, lambda_max : float
        The smallest and the largest curvature ``p' H p / p' p`` that the solve met, which lie between the extreme
        eigenvalues of ``H``; NaN where it met none.
    damping : float
        What a solver chose to add to the diagonal of ``H``: ``v`` then solves that system.
    attempts : tuple of Attempt
        Where several solvers were tried, each in turn; the last is the one that returned ``v``.
    """

    v: Tensor
    status: Status
    steps: int
    residual_norm: float
    lambda_min: float = math.nan
    lambda_max: float = math.nan
    damping: float = 0.0
    attempts: tuple[Attempt, ...] = ()


@runtime_checkable
class Solver(Protocol):
    """Anything that solves ``H v = b`` given only products with ``H``."""

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        """Return ``v`` of shape (n,) with its status; ``v0`` is a warm start."""
        ...
