"""The driver of the iterative solvers: a method brings its recursion, and all else happens here, once."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from tune_implicit.hypergradients.arguments import check_fields
from tune_implicit.hypergradients.solvers.arithmetic import (
    decided_by,
    dot,
    length,
    norm,
    read,
    scaled,
    start,
    steps_between_readings,
)
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status

__all__ = ["IterativeSolver", "Recursion", "System"]

# The one product that a warm start takes tells little of the largest eigenvalue, which may be as many times larger.
_UNSEEN = 1e3

# A warm start whose own rounding is larger than this part of ``||b||`` is worth nothing.
_LOST = 0.1

# A measured residual of so many roundings of ``||H|| ||v||`` is all rounding.
_ROUNDINGS = 4

# A run that takes less than this part off the measured residual was the last.
_PROGRESS = 0.5


@dataclass(frozen=True)
class System:
    """``H x = r``, to be solved from ``x = 0``: the correction of a ``v`` whose residual is ``r``.

    Parameters
    ----------
    hvp : callable
        ``x -> H x``.
    r : Tensor, shape (n,)
        The right-hand side.
    stop : float
        The norm below which a residual has converged.
    length : float
        ``||v||``: below its rounding no residual gets.
    drift : float
        The most by which ``r`` is off from the residual of ``v``.
    largest : float
        What earlier products have shown ``||H||`` to be at least.
    """

    hvp: Hvp
    r: Tensor
    stop: float
    length: float
    drift: float
    largest: float


class Recursion(ABC):
    """One run of a method on a system: what it carries from step to step.

    The residual that is carried along goes on shrinking when the true one has long been held up by rounding. So a
    method bounds the distance between the two, its drift, and the run is over where the residual gets below it: van der
    Vorst & Ye, Residual replacement strategies, SIAM J. Sci. Comput. 22 (2000).

    Attributes
    ----------
    x : Tensor, shape (n,)
        What the run returns.
    residual, drift : float
        The norm of the residual carried with ``x``, and the most by which ``r - H x`` is off from it.
    lambda_min, lambda_max : float
        The smallest and the largest curvature met; NaN where there was none.
    largest : float
        What stands for ``||H||`` where a rounding is estimated.
    """

    x: Tensor
    residual: float
    drift: float = 0.0
    lambda_min: float = math.nan
    lambda_max: float = math.nan
    largest: float = 0.0

    @abstractmethod
    def step(self) -> tuple[Any, list[Tensor]]:
        """Take a step, and return what it made, with the scalars to judge it by, still to be read."""

    @abstractmethod
    def judge(self, made: Any, scalars: list[float]) -> Status:
        """Take in what a step made, and return the status after it, ``MAX_STEPS`` meaning that the run may go on."""

    @abstractmethod
    def end(self, status: Status) -> None:
        """Finish a run that ended with ``status``."""

    @final
    def run(self, k: int) -> tuple[Status, int]:
        """Take at most ``k`` steps; return how the run ended, and after how many."""
        status, steps, at_once = Status.MAX_STEPS, 0, steps_between_readings(self.x)
        while status is Status.MAX_STEPS and steps < k:
            taken = [self.step() for _ in range(min(at_once, k - steps))]
            seen = iter(read([scalar for _, scalars in taken for scalar in scalars]))
            while taken and status is Status.MAX_STEPS:
                made, scalars = taken.pop(0)
                status = self.judge(made, [next(seen) for _ in scalars])
                steps += 1
            del taken, made, scalars  # or they would still be there during the next product
        self.end(status)
        return status, steps


class IterativeSolver(ABC):
    """Solve ``H v = b`` in at most ``k`` steps, until its residual is below ``tolerance`` or ``rtol * ||b||``.

    Where the residual that a run carries is no longer to be trusted it is measured, for one hvp, and what is left is
    solved for by the next run, as long as that makes progress.
    """

    k: int
    tolerance: float
    rtol: float

    # Whether the method asks for a positive-definite system.
    definite: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def begin(self, system: System) -> Recursion:
        """Return the method at the start of a run."""

    @final
    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        """Return ``v`` of shape (n,) with its status, step count and residual norm.

        Parameters
        ----------
        hvp : callable
            ``v -> H v`` on ``(n,)`` tensors.
        b : Tensor, shape (n,)
            The right-hand side, of a floating dtype.
        v0 : Tensor, shape (n,), optional
            A direction to start along, for one hvp; zero, at no cost, by default, and where ``k = 0``.

        Returns
        -------
        Solution
            With ``steps`` the iterations up to the one that ended the solve.
        """
        scale, known = decided_by(b)
        if known is not None:
            return known
        b = scaled(b, scale)
        place = zero = _Place(None, b)
        stop, drift, largest = max(self.tolerance / scale, self.rtol * zero.residual), 0.0, 0.0
        if v0 is not None and self.k and (found := start(hvp, b, v0, self.definite)):
            place, largest = _Place(found[0], found[1]), found[2]
            drift = place.rounding(_UNSEEN * largest)
        met = largest or math.nan
        if place.residual + drift < stop:
            solution = Solution(place.vector, Status.CONVERGED, 0, place.residual + drift, lambda_max=met)
        elif place.residual == 0:
            solution = Solution(place.vector, Status.STAGNATED, 0, drift, lambda_max=met)
        else:
            solution = self._solve(hvp, zero, place, stop, drift, largest)
        return solution.times(scale)

    def _solve(
        self, hvp: Hvp, zero: "_Place", place: "_Place", stop: float, drift: float = 0.0, largest: float = 0.0
    ) -> Solution:
        """Run the method from ``place``, and again where a measured residual leaves something to do."""
        steps, ends = 0, None
        while True:
            run = self.begin(System(hvp, place.r, stop, place.length, drift, largest))
            status, taken = run.run(self.k - steps)
            steps, largest = steps + taken, run.largest
            if ends is None and place.rounding(largest) > _LOST * zero.residual:
                return self._solve(hvp, zero, zero, stop)
            ends = ends or (run.lambda_min, run.lambda_max)
            v = run.x if place.v is None else place.v + run.x
            if status is not Status.STAGNATED and not run.drift > run.residual:
                return Solution(v, status, steps, run.residual + run.drift, *ends)
            found = _Place(v, zero.r - hvp(v))
            best = found if self._gained(place, found, run.x, found.rounding(largest)) else place
            drift = best.rounding(largest)
            certain = best.residual + drift
            if status is Status.CONVERGED:
                status = Status.STAGNATED  # unless the measured residual says so as well
            if not math.isfinite(found.residual):
                status = Status.NON_FINITE
            elif certain < stop:
                status = Status.CONVERGED
            elif status is Status.STAGNATED and best.v is None:
                status = Status.NEGATIVE_CURVATURE
            elif (
                status is Status.STAGNATED
                and steps < self.k
                and best is found
                and found.residual < _PROGRESS * place.residual
                and certain > _ROUNDINGS * drift
            ):
                place = found
                continue
            return Solution(best.vector, status, steps, certain, *ends)

    def _gained(self, before: "_Place", after: "_Place", x: Tensor, rounding: float) -> bool:
        """Return whether ``x`` has led nearer to the solution: in energy where that is a norm, else in the residual."""
        if self.definite:  # v'Hv/2 - b'v has fallen by half of x'(r + r') with the residuals before and after
            return dot(x, before.r).item() + dot(x, after.r).item() > rounding * length(x)
        return after.residual < before.residual


class _Place:
    """Where a solve is: ``v``, or ``None`` for zero, and its measured residual."""

    def __init__(self, v: Tensor | None, r: Tensor) -> None:
        self.v, self.r = v, r
        self.residual = norm(r).item()
        self.length = 0.0 if v is None else length(v)

    @property
    def vector(self) -> Tensor:
        return torch.zeros_like(self.r) if self.v is None else self.v

    def rounding(self, largest: float) -> float:
        """Return what rounding does to a measured residual, with ``largest`` for ``||H||``."""
        return torch.finfo(self.r.dtype).eps * largest * self.length
