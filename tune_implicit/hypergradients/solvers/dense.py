"""The exact solution, through the whole Hessian: for small problems and for tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.arguments import at_least, check_fields, ruled
from tune_implicit.hypergradients.solvers.arithmetic import decided_by, length, norm, scaled
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status

__all__ = ["DenseSolve"]


@dataclass(frozen=True)
class DenseSolve:
    """Solve ``H v = b`` for any symmetric ``H``, by its eigenvalues.

    It takes ``n`` hvps and memory for two ``(n, n)`` matrices. Directions whose eigenvalue is zero to rounding are left
    out, so that a singular system gets its shortest least-squares solution; where ``b`` has a part in such a direction
    the status is ``STAGNATED``, as where rounding leaves a residual above the tolerance.

    Parameters
    ----------
    max_size : int, default 5000
        Largest ``n`` to accept.
    tolerance : float, default 1e-10
        The solve has converged where ``||b - H v|| < tolerance``.
    rtol : float, default 0
        The solve has converged where ``||b - H v|| < rtol * ||b||``.

    Raises
    ------
    InvalidValueError
        If ``max_size`` is not positive, or a tolerance is negative or NaN.
    """

    max_size: int = ruled(at_least(1), 5000)
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
        scale, known = decided_by(b)
        if known is not None:
            return known
        b = scaled(b, scale)
        h = torch.stack([hvp(unit) for unit in torch.eye(n, dtype=b.dtype, device=b.device)])
        if not h.isfinite().all():
            return Solution(torch.zeros_like(b), Status.NON_FINITE, 0, norm(b).item()).times(scale)
        eigenvalues, basis = torch.linalg.eigh((h + h.T) / 2)
        largest, epsilon = eigenvalues.abs().max().item(), torch.finfo(b.dtype).eps
        kept = eigenvalues.abs() > n * epsilon * largest
        v = basis @ torch.where(kept, (basis.T @ b) / eigenvalues, 0)
        residual = norm(b - h @ v).item()
        certain = residual + epsilon * largest * length(v)
        if not kept.any():
            status = Status.NEGATIVE_CURVATURE
        else:
            converged = certain < max(self.tolerance / scale, self.rtol * norm(b).item())
            status = Status.CONVERGED if converged else Status.STAGNATED
        ends = eigenvalues[0].item(), eigenvalues[-1].item()
        return Solution(v, status, 1, certain, *ends).times(scale)
