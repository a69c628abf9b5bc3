"""Systems ``H v = b``, and what is checked of any solution of one."""

import io
import math

import torch
from torch import Tensor

from tests.support.problems import F64, generator, symmetric
from tune_implicit.hypergradients.settings import SolverSettings
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Solver, Status

# The solvers that go step by step, by the names that a setting has for them.
ITERATIVE = ("cg", "minres", "neumann")


def times(h: Tensor) -> Hvp:
    return lambda v: h @ v


def vector(n: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=generator(seed), dtype=F64)


def spd(n: int = 8, condition: float = 20.0, seed: int = 0) -> Tensor:
    """Eigenvalues from ``1.9 / condition`` to 1.9, so that the Neumann series converges with step size 1."""
    return symmetric(1.9 * torch.logspace(0, -math.log10(condition), n, dtype=F64), seed)


def krylov(h: Tensor, b: Tensor, k: int) -> Tensor:
    """An orthonormal basis of ``b, H b, ...``, of shape (n, k)."""
    powers = [b]
    for _ in range(k - 1):
        powers.append(h @ powers[-1] / powers[-1].norm())
    return torch.linalg.qr(torch.stack(powers, dim=1))[0]


def named_solver(
    name: str, k: int = 500, tolerance: float = 1e-10, step_size: float = 1.0, rtol: float = 0.0
) -> Solver:
    return SolverSettings(solver=name, step_size=step_size, k=k, tolerance=tolerance, rtol=rtol).make_solver()


def assert_certified(solution: Solution, h: Tensor, b: Tensor, bound: bool = False) -> None:
    """Check the reported residual against one computed anew in float64: it is no less, and at most twice as much.

    Rounding is on top of that, which adds up like a random walk. A truncated series reports a ``bound``.
    """
    assert solution.v.dtype == b.dtype
    h64, b64, v64 = h.to(F64), b.to(F64), solution.v.to(F64)
    recomputed = (b64 - h64 @ v64).norm().item()
    unit = torch.finfo(b.dtype).eps * (torch.linalg.matrix_norm(h64, 2) * v64.norm() + b64.norm()).item()
    assert recomputed <= solution.residual_norm * (1 + 1e-6) + unit
    if not (bound and solution.status is Status.MAX_STEPS):
        assert solution.residual_norm <= 2 * recomputed + 30 * (1 + solution.steps) ** 0.5 * unit


def assert_no_worse_than_zero(solution: Solution, h: Tensor, b: Tensor) -> None:
    """Check that ``v`` is no worse than 0 in its residual, or in the energy that CG and the series make small."""
    h64, b64, v64 = h.to(F64), b.to(F64), solution.v.to(F64)
    smaller = (b64 - h64 @ v64).norm() <= b64.norm() * (1 + 1e-6)
    assert smaller or v64 @ h64 @ v64 / 2 <= b64 @ v64


class Counted:
    """``v -> H v``, which counts its calls."""

    def __init__(self, h: Tensor) -> None:
        self.h = h
        self.count = 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.h @ v


class Says:
    """A solver that returns its right-hand side with the residual norm it is told."""

    def __init__(self, residual_norm: float, status: Status = Status.CONVERGED, factor: float = 1.0) -> None:
        self.residual_norm, self.status, self.factor = residual_norm, status, factor

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        return Solution(self.factor * b, self.status, 1, self.residual_norm)


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
