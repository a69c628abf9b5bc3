"""The Neumann series (NS) of Lorraine, Vicol & Duvenaud."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.hypergradients.arguments import POSITIVE, at_least, ruled
from tune_implicit.hypergradients.solvers.arithmetic import dot, norm
from tune_implicit.hypergradients.solvers.iterative import IterativeSolver, Recursion, System
from tune_implicit.hypergradients.solvers.solution import Status

__all__ = ["NeumannSeries"]

# For a symmetric H whose eigenvalues lie in [0, 2 / step_size] neither the residual nor H times it ever grows. What is
# above rounding is therefore an eigenvalue outside, in whose direction the series has no limit.
_GROWTH = 1.001

# By as many roundings of the residual H times it may grow, and while it is below ten times that it is one itself.
_ROUNDINGS = 100

# An image of so few roundings no longer changes the residual: what is left has no curvature that can be seen.
_FLAT = 2


@dataclass(frozen=True)
class NeumannSeries(IterativeSolver):
    """Solve ``H v = b`` for symmetric positive-definite ``H``, by the truncated Neumann series.

    With ``a`` the step size, it sums ``v_j = a * sum_{i<=j} (I - a H)^i b`` from ``v_0 = a b`` to ``v_k``, which is
    gradient descent on the quadratic with that gradient. It converges where every eigenvalue of ``H`` lies in
    ``(0, 2 / a)``. The next term of the series is the residual of the present sum,
    ``b - H v_j = (I - a H)^(j+1) b``: convergence and divergence are read from it at no cost. After ``k`` hvps the
    terms 0 to ``k`` are known, and the residual norm reported is that of the sum without the last of them. Where ``a``
    is below ``2 / lambda_max`` it bounds the sum's own, and is no more than the last contraction away from it. With
    ``k = 0`` nothing is known of it, and NaN is reported.

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

    step_size: float = ruled(POSITIVE)
    k: int = ruled(at_least(0))
    tolerance: float = ruled(at_least(0), 1e-10)
    rtol: float = ruled(at_least(0), 0.0)

    definite = True

    def begin(self, system: System) -> Recursion:
        """Return the series at its first term."""
        return _Series(system, self.step_size)


class _Series(Recursion):
    """The terms of one run, each the residual of the sum before it, and their sum up to where nothing has grown."""

    def __init__(self, system: System, step_size: float) -> None:
        self._system, self._step_size = system, step_size
        self._latest = self._r = system.r
        self.x, self.residual, self.drift = torch.zeros_like(system.r), norm(system.r).item(), system.drift
        self._smallest, self._smallest_image = self.residual, math.inf
        self._length, self._epsilon = system.length, torch.finfo(system.r.dtype).eps
        self._steps, self._image = 0, 0.0  # the largest ||H r|| / ||r||
        # That no term grows says that ||H|| is below 2 / a.
        self.largest = 1 / step_size

    def step(self) -> tuple[Tensor, list[Tensor]]:
        image = self._system.hvp(self._latest)
        self._latest = torch.add(self._latest, image, alpha=-self._step_size)
        return self._latest, [norm(self._latest), norm(image)]

    def judge(self, made: Tensor, scalars: list[float]) -> Status:
        residual, image = scalars
        rounding = self._epsilon * self.largest * self.residual
        if not residual <= _GROWTH * self._smallest:
            return self._growth(self._r, made)
        if image > _ROUNDINGS * rounding + max(9 * _ROUNDINGS * rounding, _GROWTH * self._smallest_image):
            # Once its norm has grown it grows for ever, so that the next two images show it as well.
            return self._growth(self._system.hvp(self._r), self._system.hvp(made))
        if image <= _FLAT * rounding and self._is_flat(made):
            return Status.STAGNATED
        self.x.add_(self._r, alpha=self._step_size)  # only now, so that the sum before a growth is still there
        self._length += self._step_size * self.residual
        self.drift = math.hypot(self.drift, self._epsilon * self.largest * self._length)
        self._image = max(self._image, image / self.residual)
        self._r, self.residual = made, residual
        self._smallest, self._smallest_image = min(self._smallest, residual), min(self._smallest_image, image)
        self._steps += 1
        if residual + self.drift < self._system.stop:
            return Status.CONVERGED
        return Status.STAGNATED if residual <= self.drift else Status.MAX_STEPS

    def end(self, status: Status) -> None:
        if not status.failed and self._steps:
            self.lambda_max = self._image
        if status is Status.MAX_STEPS:
            self.x.add_(self._r, alpha=self._step_size)
            self.residual = self.residual if self._steps else math.nan

    def _is_flat(self, made: Tensor) -> bool:
        """Return whether a step changed the residual by no more than rounding does; a norm of 1e-30 is 0 as read."""
        change = made - self._r
        return dot(change, change).sqrt().item() <= _FLAT * self._epsilon * self.residual

    def _growth(self, x: Tensor, x_next: Tensor) -> Status:
        """Return why ``x`` grew to ``x_next = M x``, with ``M = I - a H``, for one hvp more.

        ``x' (M^3 - M) x`` has the sign of the eigenvalues of ``M`` that grow, above 1 or below -1: ``x' (M^2 - I) x``
        is positive, so they outweigh the others, which count for less still in the first form. The
        sign of ``x' H x`` would not do: to it the largest eigenvalues of ``H`` contribute, although they contract.
        """
        image = self._system.hvp(x_next)
        once, thrice = dot(x, x_next).item(), dot(x_next, x_next - self._step_size * image).item()
        if not (math.isfinite(once) and math.isfinite(thrice)):
            return Status.NON_FINITE
        if thrice > once:
            return Status.NEGATIVE_CURVATURE
        # Where none is negative, ||H x|| / ||x|| is no more than the largest eigenvalue; that growth proves the other.
        self.lambda_max = max(norm(image).item() / norm(x_next).item(), 2 / self._step_size)
        return Status.DIVERGED
