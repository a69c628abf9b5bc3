"""A preconditioner for conjugate gradient, made of the products that earlier solves have paid for."""

from typing import Any

import torch
from torch import Tensor

from tune_implicit.hypergradients.arguments import at_least, check_argument

__all__ = ["QuasiNewton"]

# A pair whose cosine is smaller holds rounding errors rather than curvature.
_LEAST_COSINE = 1e-6


class QuasiNewton:
    """The limited-memory BFGS approximation of the inverse Hessian, from the latest pairs ``(p, H p)`` of CG.

    Along a trajectory of ul steps ``H`` changes slowly, so that the directions of the last solves, whose products are
    known, precondition the next: no hvp is spent on it. It is symmetric and positive definite whatever the pairs.
    Applying it costs some ``8 memory n`` operations, which is little beside an hvp where a batch is large.

    Parameters
    ----------
    memory : int
        Most pairs to keep, each of two ``(n,)`` vectors.

    Raises
    ------
    InvalidTypeError
        If ``memory`` is not an integer.
    InvalidValueError
        If it is not positive.

    Attributes
    ----------
    largest : float
        What its products have shown ``||H||`` to be, nearly: a preconditioned solve hardly looks along the eigenvectors
        of the largest eigenvalues, to which most of its rounding is due.

    References
    ----------
    Morales & Nocedal, Automatic preconditioning by limited memory quasi-Newton updating, SIAM J. Optim. 10 (2000).
    Nocedal & Wright, Numerical Optimization, 2nd ed. (2006), equation 7.24.
    """

    def __init__(self, memory: int) -> None:
        self.memory: int = check_argument("memory", memory, int, at_least(1))
        self.largest = 0.0
        self._pairs: tuple[Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        return f"QuasiNewton(memory={self.memory})"

    def fits(self, b: Tensor) -> bool:
        """Return whether there are pairs in the shape, in the dtype and on the device of ``b``."""
        if self._pairs is None:
            return False
        s, _ = self._pairs
        return s.shape[1:] == b.shape and s.dtype == b.dtype and s.device == b.device

    def apply(self, r: Tensor) -> Tensor:
        """Return the approximation of ``H^-1 r``, of shape (n,); ``r`` itself where there are no pairs."""
        if self._pairs is None:
            return r
        # With R the upper triangle of S Y' and D its diagonal, (7.24) in a form that is positive to the last bit.
        s, y = self._pairs
        t = self._solve(s @ r)
        q = r - y.T @ t
        inner = self._solve(self._diagonal * t - self._gamma * (y @ q), transposed=True)
        return self._gamma * q + s.T @ inner

    def add(self, directions: list[Tensor], products: list[Tensor], largest: float = 0.0) -> None:
        """Take in the pairs ``(p, H p)`` of one solve, the oldest first, and what all of it has shown ``||H||`` to be.

        The oldest of all are dropped.
        """
        s, y = torch.stack(directions), torch.stack(products)
        lengths = torch.linalg.vector_norm(s, dim=1)
        cosines = (s * y).sum(1) / (lengths * torch.linalg.vector_norm(y, dim=1))
        good = cosines > _LEAST_COSINE  # NaN is not
        s, y = s[good] / lengths[good, None], y[good] / lengths[good, None]
        if not len(s):
            return
        self.largest = largest
        if self._pairs is not None and self.fits(s[0]):
            s, y = torch.cat([self._pairs[0], s]), torch.cat([self._pairs[1], y])
        self._set(s[-self.memory :].clone(), y[-self.memory :].clone())

    def clear(self) -> None:
        """Forget all pairs."""
        self._pairs, self.largest = None, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs, as ``(m, n)`` tensors, and what they have shown."""
        return {} if self._pairs is None else {"s": self._pairs[0], "y": self._pairs[1], "largest": self.largest}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with the pairs of ``state``, of which the latest ``memory`` are kept, on ``device``."""
        self.clear()
        if state:
            self.largest = state["largest"]
            self._set(*(state[name][-self.memory :].to(device, copy=True) for name in ("s", "y")))

    def _set(self, s: Tensor, y: Tensor) -> None:
        """Keep ``s`` and ``y`` of shape (m, n), the oldest pair first, and what :meth:`apply` needs of them."""
        self._pairs = s, y
        products = (s @ y.T).double()
        self._r = products.triu()
        self._diagonal = products.diagonal().to(s.dtype)
        self._gamma = self._diagonal[-1] / (y[-1] @ y[-1])

    def _solve(self, right: Tensor, transposed: bool = False) -> Tensor:
        """Return ``R^-1 right``, or with the transpose of ``R``, of shape (m,)."""
        r = self._r.T if transposed else self._r
        solved: Tensor = torch.linalg.solve_triangular(r, right.double()[:, None], upper=not transposed)
        return solved[:, 0].to(right.dtype)
