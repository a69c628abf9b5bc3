"""Conjugate gradient, the linear-system method (LS) of hypergradients."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.solvers.base import (
    Hvp,
    Solution,
    Status,
    certain_norm,
    check_stopping,
    dot,
    read,
    scale_of,
    scaled,
    steps_between_checks,
    stopping_norm,
)

__all__ = ["ConjugateGradient"]

# A curvature this many roundings of the largest one met is a rounding error itself: a step along it would be 1e16 long
# in float64, and the recursive residual would keep no digit. Up to 10 the answers on definite systems do not change.
_ROUNDINGS = 4


@dataclass(frozen=True)
class ConjugateGradient:
    """Solve ``H v = b`` for symmetric positive-definite ``H``, by conjugate gradient.

    Of its iterates it returns the one with the smallest residual, so that a truncated solve is never worse than
    ``v = 0``. It ends at the first direction ``p`` with ``p' H p <= 0`` to rounding: ``H`` is then singular or
    indefinite, and the status ``NEGATIVE_CURVATURE`` says so. Inner products are accumulated in float64.

    Parameters
    ----------
    k : int
        Most iterations; each costs one hvp, and a warm start costs one more.
    tolerance : float, default 1e-10
        Stop once ``||b - H v|| < tolerance``.
    rtol : float, default 0
        Stop once ``||b - H v|| < rtol * ||b||``.

    Raises
    ------
    InvalidTypeError
        If ``k`` is not an integer, or a tolerance no number.
    InvalidValueError
        If ``k``, ``tolerance`` or ``rtol`` is negative, or a tolerance is NaN.

    References
    ----------
    Nocedal & Wright, Numerical Optimization, 2nd ed. (2006), Algorithm 5.2; for negative curvature, Algorithm 7.1.
    """

    k: int
    tolerance: float = 1e-10
    rtol: float = 0.0

    def __post_init__(self) -> None:
        check_stopping(self.k, self.tolerance, self.rtol)

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        """Return ``v`` of shape (n,) with its status, step count and residual norm.

        Parameters
        ----------
        hvp : callable
            ``v -> H v`` on ``(n,)`` tensors.
        b : Tensor, shape (n,)
            The right-hand side, of a floating dtype.
        v0 : Tensor, shape (n,), optional
            Where to start; zero, at no cost, by default.

        Returns
        -------
        Solution
            With ``steps`` the iterations up to the one that ended the solve.
        """
        scale = scale_of(b)
        if scale == 0:
            return Solution(torch.zeros_like(b), Status.CONVERGED, 0, 0.0)
        if not math.isfinite(scale):
            return Solution(torch.zeros_like(b), Status.NON_FINITE, 0, scale)
        v, r = torch.zeros_like(b), scaled(b, scale)
        rr = dot(r, r)
        stop = stopping_norm(self.tolerance / scale, self.rtol, math.sqrt(rr), b.dtype)
        if v0 is not None:
            v = scaled(v0, scale)
            r = r - hvp(v)
            rr = dot(r, r)
        p, best, best_rr = r, v, rr.item()
        status, steps, largest = self._judge(1.0, best_rr, stop), 0, 0.0
        last_rr = pp = best_rr
        rounding = _ROUNDINGS * torch.finfo(b.dtype).eps
        while status is Status.MAX_STEPS and steps < self.k:
            iterates, scalars = [], []
            for _ in range(min(steps_between_checks(b), self.k - steps)):
                hp = hvp(p)
                curvature = dot(p, hp)
                alpha = rr / curvature
                v = torch.addcmul(v, p, alpha)
                r = torch.addcmul(r, hp, alpha, value=-1)
                rr, rr_previous = dot(r, r), rr
                p = torch.addcmul(r, p, rr / rr_previous)
                iterates.append(v)
                scalars += [curvature, rr]
            seen = iter(read(scalars))
            for iterate, php, seen_rr in zip(iterates, seen, seen, strict=True):
                steps += 1
                seen_curvature = php / pp if pp else math.nan
                # ||p||^2 of the next direction, of which the residual is orthogonal to the one before.
                beta = seen_rr / last_rr if last_rr else math.nan
                pp = seen_rr + beta * beta * pp
                last_rr = seen_rr
                status = self._judge(seen_curvature - rounding * largest, seen_rr, stop)
                if not status.failed:
                    largest = max(largest, seen_curvature)
                    if seen_rr < best_rr:
                        best, best_rr = iterate, seen_rr
                if status is not Status.MAX_STEPS:
                    break
        residual_norm = certain_norm(math.sqrt(best_rr), best, largest) * scale
        return Solution(scaled(best, 1 / scale), status, steps, residual_norm)

    @staticmethod
    def _judge(curvature: float, rr: float, stop: float) -> Status:
        """Return the status after an iteration, ``MAX_STEPS`` meaning that it may go on."""
        if -math.inf < curvature <= 0:
            return Status.NEGATIVE_CURVATURE
        if not (math.isfinite(curvature) and math.isfinite(rr)):
            return Status.NON_FINITE
        return Status.CONVERGED if rr < stop * stop else Status.MAX_STEPS
