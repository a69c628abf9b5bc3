"""MINRES: for a Hessian with negative eigenvalues, which conjugate gradient cannot solve with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.hypergradients.arguments import at_least, check_fields, ruled
from tune_implicit.hypergradients.solvers.arithmetic import (
    certain_norm,
    dot,
    norm,
    read,
    scaled,
    start,
    steps_between_checks,
    stopping_norm,
    unsolvable,
)
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status

__all__ = ["Minres"]

# A pivot of so many roundings of the largest entries is what is left of zero.
_ROUNDINGS = 4

# Of so many steps the Ritz values are computed; a longer matrix would take time and tell little more.
_RITZ_STEPS = 100


@dataclass(frozen=True)
class Minres:
    """Solve ``H v = b`` for symmetric ``H``, definite or not, by the minimal residual method.

    Each iterate has the smallest residual in its Krylov space. The recursion that gives it loses touch with the true
    residual where ``H`` is ill-conditioned; so it is run for half the digits of the dtype at a time, the residual is
    then measured, for one hvp, and what is left is solved for anew. Where ``H`` is singular and ``b`` has
    a part in its kernel there is no solution; the status is then ``NEGATIVE_CURVATURE``. A converged ``v`` at an
    indefinite ``H`` is right for the stationary point that the ll weights are at, which is no minimum: ``lambda_min``
    of the solution is negative there.

    Parameters
    ----------
    k : int
        Most iterations; each costs one hvp, and so do the measured residuals, of which most solves need one, and a
        warm start.
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
    Paige & Saunders, Solution of sparse indefinite systems of linear equations, SIAM J. Numer. Anal. 12 (1975);
    Greenbaum, Iterative Methods for Solving Linear Systems (1997), Algorithm 4 (section 2.5).
    """

    k: int = ruled(at_least(0))
    tolerance: float = ruled(at_least(0), 1e-10)
    rtol: float = ruled(at_least(0), 0.0)

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
        stop = stopping_norm(self.tolerance / scale, self.rtol, norm(b).item(), b.dtype)
        v, r = start(hvp, b, v0 if self.k else None)
        residual, steps, ends = norm(r).item(), 0, (math.nan, math.nan)
        if not math.isfinite(residual):
            return Solution(torch.zeros_like(b), Status.NON_FINITE, 0, norm(b).item() * scale)
        status = Status.CONVERGED if residual < stop else Status.MAX_STEPS
        while status is Status.MAX_STEPS and steps < self.k:
            cycle = self._cycle(hvp, r, stop, self.k - steps)
            steps += len(cycle.diagonal)
            ends = ends if steps > len(cycle.diagonal) else cycle.ends()
            v_next = v + cycle.v
            r_next = b - hvp(v_next)
            residual_next = norm(r_next).item()
            if residual_next < residual:
                v, r, residual, status = v_next, r_next, residual_next, cycle.status
            else:  # the recursion has followed a kernel, unless all digits were right before
                status = cycle.status if cycle.status.failed else Status.NEGATIVE_CURVATURE
            if residual < max(stop, _ROUNDINGS * certain_norm(0.0, v, max(map(abs, cycle.diagonal)))):
                status = Status.CONVERGED
        return Solution(
            scaled(v, 1 / scale),
            status,
            steps,
            residual * scale,
            lambda_min=ends[0],
            lambda_max=ends[1],
        )

    def _cycle(self, hvp: Hvp, b: Tensor, stop: float, k: int) -> "_Cycle":
        """Return the correction ``v`` of shape (n,) that takes ``b`` down by half the digits of its dtype, or fewer."""
        residual = norm(b).double()
        epsilon = torch.finfo(b.dtype).eps
        stop = max(stop, math.sqrt(epsilon) * residual.item())
        # Lanczos vectors q, update directions w, and the last two plane rotations of the tridiagonal matrix.
        zero = torch.zeros_like(b)
        q_previous, q, beta = zero, b / residual.to(b.dtype), torch.zeros_like(residual)
        w_previous, w, v = zero, zero, zero
        cosine, sine, above, far_above = -torch.ones_like(beta), beta, beta, beta
        best, status, largest = v, Status.MAX_STEPS, 0.0
        diagonals: list[float] = []
        offs: list[float] = []
        while status is Status.MAX_STEPS and len(diagonals) < k:
            iterates, scalars = [], []
            for _ in range(min(steps_between_checks(b), k - len(diagonals))):
                y = torch.addcmul(hvp(q), q_previous, beta, value=-1)
                alpha = dot(y, q)
                y = torch.addcmul(y, q, alpha, value=-1)
                beta_next = dot(y, y).sqrt()
                delta, gamma = cosine * above + sine * alpha, sine * above - cosine * alpha
                far, far_above, above = far_above, sine * beta_next, -cosine * beta_next
                kernel = torch.hypot(gamma, above)  # ||H r|| / ||r|| of the residual before
                pivot = torch.hypot(gamma, beta_next)
                cosine, sine = gamma / pivot, beta_next / pivot
                direction = torch.addcmul(torch.addcmul(q, w_previous, far, value=-1), w, delta, value=-1) / pivot
                w_previous, w = w, direction.to(b.dtype)
                v = torch.addcmul(v, w, cosine * residual)
                residual = sine * residual
                q_previous, q, beta = q, (y / beta_next).to(b.dtype), beta_next
                iterates.append(v)
                scalars += [alpha, beta_next, torch.minimum(pivot, kernel), residual]
            seen = iter(read(scalars))
            for iterate, diagonal, off, least, norm_seen in zip(iterates, seen, seen, seen, seen, strict=True):
                diagonals.append(diagonal)
                offs.append(off)
                largest = max(largest, abs(diagonal) + off)
                status = self._judge(diagonal, off, least, norm_seen, _ROUNDINGS * epsilon * largest, stop)
                if not status.failed:
                    best = iterate
                if status is not Status.MAX_STEPS:
                    break
        # Half the digits are not all of them: the next cycle goes on.
        return _Cycle(best, Status.MAX_STEPS if status is Status.CONVERGED else status, diagonals, offs)

    @staticmethod
    def _judge(diagonal: float, off: float, pivot: float, residual: float, rounding: float, stop: float) -> Status:
        """Return the status after an iteration, ``MAX_STEPS`` meaning that it may go on."""
        if not (math.isfinite(diagonal) and math.isfinite(off)):
            return Status.NON_FINITE
        if pivot <= rounding:
            return Status.NEGATIVE_CURVATURE
        if not math.isfinite(residual):
            return Status.NON_FINITE
        return Status.CONVERGED if residual < stop else Status.MAX_STEPS


@dataclass(frozen=True)
class _Cycle:
    """What a run of the recursion gives: a correction, how it ended, and the tridiagonal matrix of its basis."""

    v: Tensor
    status: Status
    diagonal: list[float]
    off: list[float]

    def ends(self) -> tuple[float, float]:
        """Return the smallest and the largest Ritz value; the first steps tell the ends of the spectrum."""
        diagonal, off = (
            torch.tensor(entries[:_RITZ_STEPS], dtype=torch.float64) for entries in (self.diagonal, self.off)
        )
        if not (diagonal.isfinite().all() and off.isfinite().all()):
            return math.nan, math.nan
        values = torch.linalg.eigvalsh(diagonal.diag() + off[:-1].diag(1) + off[:-1].diag(-1))
        return values[0].item(), values[-1].item()
