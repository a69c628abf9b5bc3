"""What every solver of ``H v = b`` takes and returns.

A solver knows ``H`` only through ``hvp``, the function ``v -> H v``: no model and no autograd in this room. Vectors
are flat ``(n,)`` tensors of one floating dtype on one device; norms are Euclidean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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

    The first three are answers. ``CONVERGED`` is one whose residual is below the tolerance, whatever rounding has done
    to it, and ``MAX_STEPS`` a truncated one. ``STAGNATED`` is one that rounding stopped above its tolerance, as it also
    does where ``b`` has a part in a direction whose curvature is zero to rounding. The residual says how good they are.

    The others are failures; ``v`` is then the last iterate before the failure, and no answer. ``NEGATIVE_CURVATURE`` is
    an ``H`` with a direction of negative curvature, or one that has none at all in the direction of ``b``.
    ``UNVERIFIED`` is a residual that, computed anew, is not the one the solver reported.
    """

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    STAGNATED = "stagnated"
    DIVERGED = "diverged"
    NEGATIVE_CURVATURE = "negative_curvature"
    NON_FINITE = "non_finite"
    UNVERIFIED = "unverified"

    @property
    def failed(self) -> bool:
        """Whether the solve gave no answer."""
        return self not in (Status.CONVERGED, Status.MAX_STEPS, Status.STAGNATED)

    @property
    def explanation(self) -> str:
        """What it means and what to do about it, in a sentence or two."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Status.CONVERGED: "The residual is below the tolerance.",
    Status.MAX_STEPS: "All steps were taken. A larger `k` makes the residual smaller.",
    Status.STAGNATED: (
        "Rounding, or a direction without curvature, keeps the residual above the tolerance. Accept it, add `damping`, "
        "or compute in float64."
    ),
    Status.DIVERGED: (
        'The solution is worse than none. Take a smaller step size, `step_size="auto"`, or another solver.'
    ),
    Status.NEGATIVE_CURVATURE: (
        "The Hessian has a direction of negative curvature, or of none where some is needed: the ll model is not at a "
        'minimum, or has a flat direction. Train it longer, add `damping`, or take `solver="minres"`.'
    ),
    Status.NON_FINITE: "A loss or a derivative is not finite.",
    Status.UNVERIFIED: "The residual computed anew is larger than the one that the solver reported.",
}


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
        eigenvalues of ``H``; of the series, and of a warm start that was the answer, the largest ``||H p|| / ||p||``
        alone. NaN where it met none.
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

    @property
    def answers(self) -> bool:
        """Whether ``v`` can be used: no failure, and not the zero that a truncated solve has not got away from."""
        if self.status is Status.CONVERGED:
            return True
        return not self.status.failed and bool(self.v.any())

    def times(self, factor: float) -> "Solution":
        """Return the solution for ``factor`` times ``b``."""
        if factor == 1:
            return self
        return replace(self, v=self.v * factor, residual_norm=self.residual_norm * factor)


@runtime_checkable
class Solver(Protocol):
    """Anything that solves ``H v = b`` given only products with ``H``."""

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        """Return ``v`` of shape (n,) with its status; ``v0`` is a warm start."""
        ...
