"""The Neumann series (NS) of Lorraine, Vicol & Duvenaud."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.errors import InvalidValueError
from tune_implicit.solvers.base import (
    Hvp,
    Solution,
    Status,
    certain_norm,
    check_number,
    check_stopping,
    dot,
    read,
    scale_of,
    scaled,
    steps_between_checks,
    stopping_norm,
)

__all__ = ["NeumannSeries"]

# For a symmetric H whose eigenvalues lie in [0, 2 / step_size] the residual never grows. What is above rounding is
# therefore an eigenvalue outside, in whose direction the series has no limit.
_GROWTH = 1.001


@dataclass(frozen=True)
class NeumannSeries:
    """Solve ``H v = b`` for symmetric positive-definite ``H``, by the truncated Neumann series.

    With ``a`` the step size, it sums ``v_j = a * sum_{i<=j} (I - a H)^i b`` from ``v_0 = a b`` to ``v_k``, which is
    gradient descent on the quadratic with that gradient. It converges where every eigenvalue of ``H`` lies in
    ``(0, 2 / a)``. The next term of the series is the residual of the present sum,
    ``b - H v_j = (I - a H)^(j+1) b``: convergence and divergence are read from it at no cost. The residual of the last
    sum is the one term that is computed for its own sake, so that a solve of ``k`` steps takes ``k + 1`` hvps.

    Parameters
    ----------
    step_size : float
        ``a`` above; ``ll_learning_rate`` in Lorraine et al.
    k : int
        Most terms to add to ``v_0 = a b``. With ``k = 0`` the inverse Hessian is ``a`` times the identity ("T1-T2").
    tolerance : float, default 1e-10
        Stop once ``||b - H v|| < tolerance``.
    rtol : float, default 0
        Stop once ``||b - H v|| < rtol * ||b||``.

    Raises
    ------
    InvalidTypeError
        If ``k`` is not an integer, or ``step_size`` or a tolerance no number.
    InvalidValueError
        If ``step_size`` is not positive and finite, ``k`` or a tolerance is negative, or a tolerance is NaN.

    References
    ----------
    Lorraine, Vicol & Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, AISTATS 2020
    (proceedings), Algorithm 3; the arXiv version's Algorithms 2 and 3 had typos. "T1-T2": Luketina et al., ICML 2016.
    """

    step_size: float
    k: int
    tolerance: float = 1e-10
    rtol: float = 0.0

    def __post_init__(self) -> None:
        check_number("step_size", self.step_size)
        if not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise InvalidValueError(f"`step_size` must be positive and finite, got {self.step_size}.")
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
            Where to start, in place of ``v_0 = a b``.

        Returns
        -------
        Solution
            With ``steps`` the terms added to the start. Where the residual grows, ``v`` is the sum before it did, and
            the status tells a step size that is too large, ``DIVERGED``, from an ``H`` with a negative eigenvalue.
        """
        scale = scale_of(b)
        if scale == 0:
            return Solution(torch.zeros_like(b), Status.CONVERGED, 0, 0.0)
        if not math.isfinite(scale):
            return Solution(torch.zeros_like(b), Status.NON_FINITE, 0, scale)
        v, r = torch.zeros_like(b), scaled(b, scale)
        norm = torch.linalg.vector_norm(r).item()
        stop = stopping_norm(self.tolerance / scale, self.rtol, norm, b.dtype)
        if norm < stop:
            return Solution(v, Status.CONVERGED, 0, norm * scale)
        if v0 is None:
            steps, smallest, pending = -1, norm, self._residuals(r, hvp, 1)
        else:
            start = v0 / scale
            steps, r_start = 0, r - hvp(start)
            norm_start = torch.linalg.vector_norm(r_start).item()
            if not math.isfinite(norm_start):
                return Solution(v, Status.NON_FINITE, 0, norm * scale)
            v, r, norm, smallest = start, r_start, norm_start, norm_start
            if norm < stop:
                return self._answer(Status.CONVERGED, v, norm, 0, scale)
            pending = self._residuals(r, hvp, min(steps_between_checks(b), self.k))
        while pending:
            norms = read([torch.linalg.vector_norm(r_next) for r_next in pending])
            for r_next, norm_next in zip(pending, norms, strict=True):
                steps += 1
                if not norm_next <= _GROWTH * smallest:
                    return Solution(scaled(v, 1 / scale), self._failure(r, r_next, hvp), steps, norm * scale)
                v.add_(r, alpha=self.step_size)  # only now, so that the sum before a growth is still there
                r, norm, smallest = r_next, norm_next, min(smallest, norm_next)
                if norm < stop:
                    return self._answer(Status.CONVERGED, v, norm, steps, scale)
            pending = self._residuals(r, hvp, min(steps_between_checks(b), self.k - steps))
        return self._answer(Status.MAX_STEPS, v, norm, steps, scale)

    def _answer(self, status: Status, v: Tensor, norm: float, steps: int, scale: float) -> Solution:
        """Return the solution in the units of ``b``; that the residual never grew says that ``||H||`` is some 1 / a."""
        return Solution(scaled(v, 1 / scale), status, steps, certain_norm(norm, v, 1 / self.step_size) * scale)

    def _residuals(self, r: Tensor, hvp: Hvp, count: int) -> list[Tensor]:
        """Return the next ``count`` terms of the series after ``r``: the residuals of the sums up to each before."""
        residuals = []
        for _ in range(count):
            r = torch.add(r, hvp(r), alpha=-self.step_size)
            residuals.append(r)
        return residuals

    def _failure(self, r: Tensor, r_next: Tensor, hvp: Hvp) -> Status:
        """Return why the residual grew from ``r`` to ``r_next = M r``, with ``M = I - a H``, for one hvp more.

        ``r' (M^3 - M) r`` has the sign of the eigenvalues of ``M`` that grow, above 1 or below -1: ``r' (M^2 - I) r``
        is positive, so they outweigh the others, which count for less still in the first form. The
        sign of ``r' H r`` would not do: to it the largest eigenvalues of ``H`` contribute, although they contract.
        """
        first, third = dot(r, r_next).item(), dot(r_next, r_next - self.step_size * hvp(r_next)).item()
        if not (math.isfinite(first) and math.isfinite(third)):
            return Status.NON_FINITE
        return Status.NEGATIVE_CURVATURE if third > first else Status.DIVERGED
