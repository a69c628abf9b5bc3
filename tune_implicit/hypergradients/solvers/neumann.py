"""The Neumann series (NS) of Lorraine, Vicol & Duvenaud."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tune_implicit.hypergradients.arguments import POSITIVE, at_least, check_fields, ruled
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

__all__ = ["NeumannSeries"]

# For a symmetric H whose eigenvalues lie in [0, 2 / step_size] neither the residual nor H times it ever grows. What is
# above rounding is therefore an eigenvalue outside, in whose direction the series has no limit.
_GROWTH = 1.001

# Below as many roundings of the residual, H times it is itself a rounding error, which grows and shrinks as it likes.
_ROUNDINGS = 1000


@dataclass(frozen=True)
class NeumannSeries:
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
            A direction to start along; the series then starts with its residual in place of ``b``. Not used where
            ``k = 0``, which takes no product.

        Returns
        -------
        Solution
            With ``steps`` the terms added to the first. Where a term grows, ``v`` is the sum before it did, and
            the status tells a step size that is too large, ``DIVERGED``, from an ``H`` with a negative eigenvalue;
            ``lambda_max`` is then what the growth shows the largest eigenvalue to be at least.
        """
        scale, known = unsolvable(b)
        if known is not None:
            return known
        b = scaled(b, scale)
        b_norm = norm(b).item()
        stop = stopping_norm(self.tolerance / scale, self.rtol, b_norm, b.dtype)
        v, r = start(hvp, b, v0 if self.k else None, definite=True)
        last = norm(r).item()
        if last < stop:
            return self._answer(Status.CONVERGED, v, last, 0, scale)
        if not math.isfinite(last):
            return self._answer(Status.NON_FINITE, torch.zeros_like(v), b_norm, 0, scale)
        steps, smallest, image_smallest = 0, last, math.inf
        at_once, rounding = steps_between_checks(b), _ROUNDINGS * torch.finfo(b.dtype).eps / self.step_size
        while steps < self.k:
            terms, norms = [r], []
            for _ in range(min(at_once, self.k - steps)):
                image = hvp(terms[-1])
                terms.append(torch.add(terms[-1], image, alpha=-self.step_size))
                norms += [norm(terms[-1]), norm(image)]
                del image  # or it would still be there during the next product
            seen = iter(read(norms))
            for r_next, last_next, image_norm in zip(terms[1:], seen, seen, strict=True):
                steps += 1
                if not last_next <= _GROWTH * smallest:
                    return self._failure(r, r_next, hvp, v, last, steps, scale)
                if image_norm > max(rounding * last, _GROWTH * image_smallest):
                    # Once its norm has grown it grows for ever, so that the next two images show it as well.
                    return self._failure(hvp(r), hvp(r_next), hvp, v, last, steps, scale)
                v.add_(r, alpha=self.step_size)  # only now, so that the sum before a growth is still there
                r, last = r_next, last_next
                smallest, image_smallest = min(smallest, last), min(image_smallest, image_norm)
                if last < stop:
                    return self._answer(Status.CONVERGED, v, last, steps, scale)
        if self.k and last >= b_norm * (1 - torch.finfo(b.dtype).eps):
            return self._answer(Status.NEGATIVE_CURVATURE, v, last, steps, scale)
        residual = last if self.k else math.nan
        return self._answer(Status.MAX_STEPS, v.add_(r, alpha=self.step_size), residual, steps, scale)

    def _answer(self, status: Status, v: Tensor, residual: float, steps: int, scale: float) -> Solution:
        """Return the solution in the units of ``b``; that the residual never grew says that ``||H||`` is some 1 / a."""
        return Solution(scaled(v, 1 / scale), status, steps, certain_norm(residual, v, 1 / self.step_size) * scale)

    def _failure(
        self, x: Tensor, x_next: Tensor, hvp: Hvp, v: Tensor, residual: float, steps: int, scale: float
    ) -> Solution:
        """Return why ``x`` grew to ``x_next = M x``, with ``M = I - a H``, for one hvp more.

        ``x' (M^3 - M) x`` has the sign of the eigenvalues of ``M`` that grow, above 1 or below -1: ``x' (M^2 - I) x``
        is positive, so they outweigh the others, which count for less still in the first form. The
        sign of ``x' H x`` would not do: to it the largest eigenvalues of ``H`` contribute, although they contract.
        """
        image = hvp(x_next)
        once, thrice = dot(x, x_next).item(), dot(x_next, x_next - self.step_size * image).item()
        solution = Solution(scaled(v, 1 / scale), Status.NON_FINITE, steps, residual * scale)
        if not (math.isfinite(once) and math.isfinite(thrice)):
            return solution
        if thrice > once:
            return replace(solution, status=Status.NEGATIVE_CURVATURE)
        # Where none is negative, ||H x|| / ||x|| is no more than the largest eigenvalue; that growth proves the other.
        largest = max(norm(image).item() / norm(x_next).item(), 2 / self.step_size)
        return replace(solution, status=Status.DIVERGED, lambda_max=largest)
