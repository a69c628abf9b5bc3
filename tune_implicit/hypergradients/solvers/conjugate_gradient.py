"""Conjugate gradient, the linear-system method (LS) of hypergradients."""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.hypergradients.arguments import at_least, check_fields, ruled
from tune_implicit.hypergradients.solvers.arithmetic import (
    certain_norm,
    dot,
    read,
    scaled,
    start,
    steps_between_checks,
    stopping_norm,
    unsolvable,
)
from tune_implicit.hypergradients.solvers.quasi_newton import QuasiNewton
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status

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
    preconditioner : QuasiNewton, optional
        What earlier solves with it have learned of ``H``; this one adds its own products.

    Raises
    ------
    InvalidTypeError
        If ``k`` is not an integer, or a tolerance no number.
    InvalidValueError
        If ``k``, ``tolerance`` or ``rtol`` is negative, or a tolerance is NaN.

    References
    ----------
    Nocedal & Wright, Numerical Optimization, 2nd ed. (2006), Algorithms 5.2 and 5.3; for negative curvature,
    Algorithm 7.1.
    """

    k: int = ruled(at_least(0))
    tolerance: float = ruled(at_least(0), 1e-10)
    rtol: float = ruled(at_least(0), 0.0)
    preconditioner: QuasiNewton | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        """Return ``v`` of shape (n,) with its status, step count and residual norm.

        Parameters
        ----------
        hvp : callable
            ``v -> H v`` on ``(n,)`` tensors.
        b : Tensor, shape (n,)
            The right-hand side, of a floating dtype.
        v0 : Tensor, shape (n,), optional
            A direction to start along; zero, at no cost, by default, and where ``k = 0``.

        Returns
        -------
        Solution
            With ``steps`` the iterations up to the one that ended the solve.
        """
        scale, known = unsolvable(b)
        if known is not None:
            return known
        b = scaled(b, scale)
        stop = stopping_norm(self.tolerance / scale, self.rtol, math.sqrt(dot(b, b)), b.dtype)
        v, r = start(hvp, b, v0 if self.k else None, definite=True)
        learned = self.preconditioner if self.preconditioner and self.preconditioner.fits(b) else None
        rr = dot(r, r)
        p = r if learned is None else learned.apply(r)
        rz = rr if learned is None else dot(r, p)
        best, best_rr = v, rr.item()
        pp = last_rr = best_rr
        status, steps = self._judge(1.0, best_rr, stop), 0
        smallest, largest, rounding = math.inf, 0.0, _ROUNDINGS * torch.finfo(b.dtype).eps
        pairs: deque[list[Tensor]] = deque(maxlen=self.preconditioner.memory if self.preconditioner else 0)
        while status is Status.MAX_STEPS and steps < self.k:
            iterates, scalars = [], []
            for _ in range(min(steps_between_checks(b), self.k - steps)):
                hp = hvp(p)
                curvature = dot(p, hp)
                alpha = rz / curvature
                v = torch.addcmul(v, p, alpha)
                r = torch.addcmul(r, hp, alpha, value=-1)
                rr = dot(r, r)
                iterates.append((v,) if self.preconditioner is None else (v, p, hp))
                del hp  # or it would still be there during the next product
                scalars += [curvature, rr] if learned is None else [curvature, rr, dot(p, p)]
                z = r if learned is None else learned.apply(r)
                rz, rz_previous = (rr if learned is None else dot(r, z)), rz
                p = torch.addcmul(z, p, rz / rz_previous)
            seen = iter(read(scalars))
            for iterate, *pair in iterates:
                steps += 1
                php, rr_seen = next(seen), next(seen)
                if learned is not None:
                    pp = next(seen)
                quotient = php / pp if pp else math.nan
                # ||p||^2 of the next direction, of which the residual is orthogonal to the one before.
                beta = rr_seen / last_rr if last_rr else math.nan
                pp, last_rr = rr_seen + beta * beta * pp, rr_seen
                status = self._judge(quotient - rounding * largest, rr_seen, stop)
                smallest = min(smallest, quotient)
                if not status.failed:
                    largest = max(largest, quotient)
                    pairs.append(pair)
                    if rr_seen < best_rr:
                        best, best_rr = iterate, rr_seen
                if status is not Status.MAX_STEPS:
                    break
        if self.preconditioner is not None and pairs:
            self.preconditioner.add(*map(list, zip(*pairs, strict=True)))
        return Solution(
            scaled(best, 1 / scale),
            status,
            steps,
            certain_norm(math.sqrt(best_rr), best, largest) * scale,
            lambda_min=smallest if steps else math.nan,
            lambda_max=max(largest, smallest) if steps else math.nan,
        )

    @staticmethod
    def _judge(curvature: float, rr: float, stop: float) -> Status:
        """Return the status after an iteration, ``MAX_STEPS`` meaning that it may go on."""
        if -math.inf < curvature <= 0:
            return Status.NEGATIVE_CURVATURE
        if not (math.isfinite(curvature) and math.isfinite(rr)):
            return Status.NON_FINITE
        return Status.CONVERGED if rr < stop * stop else Status.MAX_STEPS
