"""MINRES: for a Hessian with negative eigenvalues, which conjugate gradient cannot solve with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.hypergradients.arguments import at_least, ruled
from tune_implicit.hypergradients.solvers.arithmetic import dot, norm, read
from tune_implicit.hypergradients.solvers.iterative import IterativeSolver, Recursion, System
from tune_implicit.hypergradients.solvers.solution import Status

__all__ = ["Minres"]

# Where the residual carried along is in doubt it is measured, and again after so many times as many steps, and some.
_LONGER = 1.25
_SOME = 4

# A residual carried along is still right where the measured one is at most so many times as large.
_AGREES = 2.0

# The Ritz values are those of the first steps, so many: a longer matrix would take time and tell little more.
_RITZ_STEPS = 100


@dataclass(frozen=True)
class Minres(IterativeSolver):
    """Solve ``H v = b`` for symmetric ``H``, definite or not, by the minimal residual method.

    Each iterate has the smallest residual in its Krylov space. The recursion that gives it may lose touch with the true
    residual where ``H`` is ill-conditioned. Where it may have, the residual is measured now and then, for one hvp each,
    and where it has, what is left is solved for anew. A converged ``v`` at an indefinite ``H`` is right for the
    stationary point that the ll weights are at, which is no minimum: ``lambda_min`` of the solution is negative there.

    Parameters
    ----------
    k : int
        Most iterations; each costs one hvp, a warm start one or two more, and a residual measured where rounding leaves
        it in doubt one more.
    tolerance : float, default 1e-10
        The solve has converged once ``||b - H v|| < tolerance``.
    rtol : float, default 0
        The solve has converged once ``||b - H v|| < rtol * ||b||``.

    Raises
    ------
    InvalidTypeError
        If ``k`` is not an integer, or a tolerance no number.
    InvalidValueError
        If ``k``, ``tolerance`` or ``rtol`` is negative, or a tolerance is NaN.

    References
    ----------
    Paige & Saunders, Solution of sparse indefinite systems of linear equations, SIAM J. Numer. Anal. 12 (1975);
    Greenbaum, Iterative Methods for Solving Linear Systems (1997), Algorithm 4 (section 2.5).
    """

    k: int = ruled(at_least(0))
    tolerance: float = ruled(at_least(0), 1e-10)
    rtol: float = ruled(at_least(0), 0.0)

    def begin(self, system: System) -> Recursion:
        """Return the recursion at its start."""
        return _Recursion(system)


class _Recursion(Recursion):
    """The Lanczos vectors, update directions and plane rotations of one run.

    A rounding error in an update direction goes on into those after it, by the recurrence of the directions themselves:
    where small pivots make it grow, no digit of the residual carried along may be true. The bound on it is a sure one
    and may be far too large, so that it tells only from where on to measure.
    """

    def __init__(self, system: System) -> None:
        r = system.r
        self._system, self._epsilon = system, torch.finfo(r.dtype).eps
        residual = norm(r).double()
        # Lanczos vectors q, update directions w, and the last two plane rotations of the tridiagonal matrix.
        zero, none = torch.zeros_like(r), torch.zeros_like(residual)
        self._q_previous, self._q, self._beta = zero, r / residual.to(r.dtype), none
        self._w_previous, self._w, self._x, self._residual = zero, zero, zero, residual
        self._cosine, self._sine, self._above, self._far_above = none - 1, none, none, none
        # On the host: the matrix, and of the last two directions the lengths and the rounding errors.
        self._diagonal: list[float] = []
        self._off: list[float] = []
        self._lengths, self._errors = (0.0, 0.0), (0.0, 0.0)
        self._length, self._drift = system.length, system.drift
        # Below its own rounding the residual of a run has nothing left to take off.
        self._rounding = self._epsilon * residual.item()
        # The first step after which to measure, once the bound is of no more use; what was last made, if not measured.
        self._measure_at: float | None = None
        self._unmeasured: Tensor | None = None
        self.x, self.residual, self.drift, self.largest = zero, residual.item(), system.drift, system.largest

    def step(self) -> tuple[Tensor, list[Tensor]]:
        cosine, sine = self._cosine, self._sine
        y = torch.addcmul(self._system.hvp(self._q), self._q_previous, self._beta, value=-1)
        alpha = dot(y, self._q)
        y = torch.addcmul(y, self._q, alpha, value=-1)
        beta_next = dot(y, y).sqrt()
        delta, gamma = cosine * self._above + sine * alpha, sine * self._above - cosine * alpha
        far, self._far_above, self._above = self._far_above, sine * beta_next, -cosine * beta_next
        pivot = torch.hypot(gamma, beta_next)
        self._cosine, self._sine = gamma / pivot, beta_next / pivot
        w = torch.addcmul(torch.addcmul(self._q, self._w_previous, far, value=-1), self._w, delta, value=-1) / pivot
        self._w_previous, self._w = self._w, w.to(self._q.dtype)
        along, self._residual = self._cosine * self._residual, self._sine * self._residual
        self._x = torch.addcmul(self._x, self._w, along)
        self._q_previous, self._q, self._beta = self._q, (y / beta_next).to(self._q.dtype), beta_next
        return self._x, [alpha, beta_next, far, delta, pivot, along, self._residual]

    def judge(self, made: Tensor, scalars: list[float]) -> Status:
        diagonal, off, far, delta, pivot, along, residual = scalars
        self._diagonal.append(diagonal)
        self._off.append(off)
        if not (math.isfinite(diagonal) and math.isfinite(off)):
            return Status.NON_FINITE
        if pivot == 0:
            return Status.STAGNATED
        if not math.isfinite(residual):
            return Status.NON_FINITE
        self.largest = max(self.largest, abs(diagonal) + off)
        residual = abs(residual)
        if self._measure_at is None and self._is_sure(far, delta, pivot, along, residual):
            if residual + self._drift < self.residual + self.drift:
                self.x, self.residual, self.drift = made, residual, self._drift
            return Status.CONVERGED if residual + self._drift < self._system.stop else Status.MAX_STEPS
        self._unmeasured, steps = made, len(self._diagonal)
        if steps < (self._measure_at or 0) and residual > max(self._rounding, self._system.stop / _AGREES):
            return Status.MAX_STEPS
        self._measure_at = _LONGER * steps + _SOME
        measured = self._measured()
        if self.residual + self.drift < self._system.stop:
            return Status.CONVERGED
        return Status.STAGNATED if measured > _AGREES * residual or residual <= self._rounding else Status.MAX_STEPS

    def _is_sure(self, far: float, delta: float, pivot: float, along: float, residual: float) -> bool:
        """Return whether the residual carried along is larger than the most by which it is off."""
        length = math.hypot(1.0, far * self._lengths[0], delta * self._lengths[1]) / pivot
        error = math.hypot(self._epsilon * length, far / pivot * self._errors[0], delta / pivot * self._errors[1])
        self._lengths, self._errors = (self._lengths[1], length), (self._errors[1], error)
        self._length += abs(along) * length
        rounding = math.hypot(along * error, self._epsilon * self._length)
        self._drift = math.hypot(self._drift, self.largest * rounding)
        return residual > self._drift

    def _measured(self) -> float:
        """Return the measured residual of what was last made, which is taken where it is the smallest."""
        assert self._unmeasured is not None
        made, self._unmeasured = self._unmeasured, None
        measured, size = read([norm(self._system.r - self._system.hvp(made)), norm(made)])
        drift = self._epsilon * self.largest * (self._system.length + size)
        if measured + drift < self.residual + self.drift:
            self.x, self.residual, self.drift = made, measured, drift
        return measured

    def end(self, status: Status) -> None:
        """Measure what was made last, and find the smallest and the largest Ritz value."""
        if self._unmeasured is not None and status is not Status.NON_FINITE:
            self._measured()
        diagonal, off = (
            torch.tensor(entries[:_RITZ_STEPS], dtype=torch.float64) for entries in (self._diagonal, self._off)
        )
        if len(diagonal) and diagonal.isfinite().all() and off.isfinite().all():
            values = torch.linalg.eigvalsh(diagonal.diag() + off[:-1].diag(1) + off[:-1].diag(-1))
            self.lambda_min, self.lambda_max = values[0].item(), values[-1].item()
