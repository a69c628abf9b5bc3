"""Conjugate gradient, the linear-system method (LS) of hypergradients."""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.hypergradients.arguments import at_least, ruled
from tune_implicit.hypergradients.solvers.arithmetic import dot
from tune_implicit.hypergradients.solvers.iterative import IterativeSolver, Recursion, System
from tune_implicit.hypergradients.solvers.quasi_newton import QuasiNewton
from tune_implicit.hypergradients.solvers.solution import Status

__all__ = ["ConjugateGradient"]

# A curvature of so many roundings of ``||H||``, of either sign, may be a rounding error itself.
_ROUNDINGS = 8

# The part of what earlier solves have shown ``||H||`` to be that is believed of the next one's.
_BELIEVED = 0.9


@dataclass(frozen=True)
class ConjugateGradient(IterativeSolver):
    """Solve ``H v = b`` for symmetric positive-definite ``H``, by conjugate gradient.

    It returns its last iterate: in the energy norm each is nearer to the solution than the one before, and all are
    nearer than ``v = 0``, while the residual may grow at first. It ends before the first direction ``p`` whose
    curvature ``p' H p`` is negative, with a status that says so, or zero to rounding. Inner products are accumulated in
    float64.

    Parameters
    ----------
    k : int
        Most iterations; each costs one hvp, a warm start one or two more, and a residual measured where rounding leaves
        it in doubt one more.
    tolerance : float, default 1e-10
        The solve has converged once ``||b - H v|| < tolerance``.
    rtol : float, default 0
        The solve has converged once ``||b - H v|| < rtol * ||b||``.
    preconditioner : QuasiNewton, optional
        What earlier solves with it have learned of ``H``; this one adds its own products.

    Raises
    ------
    InvalidTypeError
        If an argument is of the wrong type.
    InvalidValueError
        If one is negative, or a tolerance is NaN.

    References
    ----------
    Nocedal & Wright, Numerical Optimization, 2nd ed. (2006), Algorithms 5.2 and 5.3; for negative curvature,
    Algorithm 7.1.
    """

    k: int = ruled(at_least(0))
    tolerance: float = ruled(at_least(0), 1e-10)
    rtol: float = ruled(at_least(0), 0.0)
    preconditioner: QuasiNewton | None = None

    definite = True

    def begin(self, system: System) -> Recursion:
        """Return the recursion at its start."""
        return _Recursion(system, self.preconditioner)


class _Recursion(Recursion):
    """The conjugate directions of one run."""

    def __init__(self, system: System, preconditioner: QuasiNewton | None) -> None:
        self._system, self._preconditioner = system, preconditioner
        self._learned = preconditioner if preconditioner is not None and preconditioner.fits(system.r) else None
        self._pairs: deque[list[Tensor]] = deque(maxlen=preconditioner.memory if preconditioner else 0)
        self._r, self._x = system.r, torch.zeros_like(system.r)
        self._p = self._r if self._learned is None else self._learned.apply(self._r)
        rr = dot(self._r, self._r)
        self._rz = rr if self._learned is None else dot(self._r, self._p)
        # On the host, of the last step judged: ||r||^2, ||p||^2 of the direction after it, and what rounding has done.
        self._rr = self._pp = rr.item()
        self._length, self._epsilon = system.length, torch.finfo(system.r.dtype).eps
        self.x, self.residual, self.drift, self.largest = self._x, math.sqrt(self._rr), system.drift, system.largest
        if self._learned is not None:
            self.largest = max(self.largest, _BELIEVED * self._learned.largest)
        self._start = self.residual

    def step(self) -> tuple[list[Tensor], list[Tensor]]:
        p, learned = self._p, self._learned
        hp = self._system.hvp(p)
        curvature = dot(p, hp)
        alpha = self._rz / curvature
        self._x = torch.addcmul(self._x, p, alpha)
        self._r = r = torch.addcmul(self._r, hp, alpha, value=-1)
        z, rr = r, dot(r, r)
        rz, scalars = rr, [curvature, rr]
        if learned is not None:
            scalars += [self._rz, dot(p, p), dot(hp, hp)]
            z = learned.apply(r)
            rz = dot(r, z)
        self._p, self._rz = torch.addcmul(z, p, rz / self._rz), rz
        return ([self._x] if self._preconditioner is None else [self._x, p, hp]), scalars

    def judge(self, made: list[Tensor], scalars: list[float]) -> Status:
        php, rr, *preconditioned = scalars
        rz, pp, square = preconditioned or (self._rr, self._pp, math.nan)
        quotient = php / pp if pp else math.nan
        if not (math.isfinite(quotient) and math.isfinite(rz)):
            return Status.NON_FINITE
        self.lambda_min, self.lambda_max = min(quotient, self.lambda_min), max(quotient, self.lambda_max)
        rounding = _ROUNDINGS * self._epsilon * self.largest
        if quotient <= rounding:
            return Status.NEGATIVE_CURVATURE if quotient < -rounding else Status.STAGNATED
        if not math.isfinite(rr):
            return Status.NON_FINITE
        alpha, length = rz / php, math.sqrt(pp)
        # ||H p|| / ||p||, and the Rayleigh quotient of the next residual, less what the curvature along the next
        # direction adds to it; with a preconditioner successive residuals are not orthogonal, and do not tell either.
        image = max(math.sqrt(self._rr + rr) / length, rr / self._rr) / alpha
        image = math.sqrt(square) / length if preconditioned else image
        self.largest = max(self.largest, quotient, image)
        self._length += alpha * length
        drift = math.hypot(self.drift, self._epsilon * self.largest * self._length)
        if drift > self._start:
            return Status.STAGNATED  # so long a step along so little curvature would be all rounding
        # ||p||^2 of the next direction, to which the residual is orthogonal.
        self._pp, self._rr = rr + (rr / self._rr) ** 2 * pp if self._rr else rr, rr
        self._pairs.append(made[1:])
        self.x, self.residual, self.drift = made[0], math.sqrt(rr), drift
        if self.residual + self.drift < self._system.stop:
            return Status.CONVERGED
        return Status.STAGNATED if self.residual <= self.drift else Status.MAX_STEPS

    def end(self, status: Status) -> None:
        if self._preconditioner is not None and self._pairs:
            directions, products = map(list, zip(*self._pairs, strict=True))
            self._preconditioner.add(directions, products, self.largest)
