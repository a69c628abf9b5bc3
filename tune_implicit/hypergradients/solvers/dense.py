"""The exact solution, through the whole Hessian: for small problems and for tests."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.arguments import at_least, check_fields, ruled
from tune_implicit.hypergradients.solvers.arithmetic import norm, scaled, unsolvable
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status

__all__ = ["DenseSolve"]


@dataclass(frozen=True)
class DenseSolve:
    """Solve ``H v = b`` for any symmetric ``H``, by its eigenvalues.

    It takes ``n`` hvps and memory for two ``(n, n)`` matrices. Directions whose eigenvalue is zero to rounding are left
    out, so that a singular system gets its shortest least-squares solution; where ``b`` has a part in such a direction
    there is no solution, and the status is ``NEGATIVE_CURVATURE``.

    Parameters
    ----------
    max_size : int, default 5000
        Largest ``n`` to accept.

    Raises
    ------
    InvalidValueError
        If ``max_size`` is not positive.
    """

    max_size: int = ruled(at_least(1), 5000)

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
            Not used: there is nothing to start from.

        Returns
        -------
        Solution
            With ``steps = 1``, or 0 where ``b = 0``.

        Raises
        ------
        InvalidValueError
            If ``b`` is longer than ``max_size``.
        """
        n = b.numel()
        if n > self.max_size:
            raise InvalidValueError(
                f"`DenseSolve` forms an {n} x {n} matrix, more than `max_size` = {self.max_size} allows. "
                "Use ConjugateGradient, or raise `max_size`."
            )
        scale, known = unsolvable(b)
        if known is not None:
            return known
        b = scaled(b, scale)
        h = torch.stack([hvp(unit) for unit in torch.eye(n, dtype=b.dtype, device=b.device)])
        if not h.isfinite().all():
            return Solution(torch.zeros_like(b), Status.NON_FINITE, 0, norm(b).item() * scale)
        eigenvalues, basis = torch.linalg.eigh((h + h.T) / 2)
        rounding = n * torch.finfo(b.dtype).eps
        kept = eigenvalues.abs() > rounding * eigenvalues.abs().max()
        coefficients = basis.T @ b
        v = basis @ torch.where(kept, coefficients / eigenvalues, 0)
        residual = norm(b - h @ v).item()
        # An ill-conditioned solve leaves a residual too, of rounding times ||H|| ||v||.
        allowed = 10 * rounding * (eigenvalues.abs().max() * norm(v) + math.sqrt(n)).item()
        return Solution(
            scaled(v, 1 / scale),
            Status.CONVERGED if residual <= allowed else Status.NEGATIVE_CURVATURE,
            1,
            residual * scale,
            lambda_min=eigenvalues[0].item(),
            lambda_max=eigenvalues[-1].item(),
        )
