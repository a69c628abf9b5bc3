"""Systems ``H v = b``, and what is checked of any solution of one."""

import io
import math

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64, generator, symmetric
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status


def times(h: Tensor) -> Hvp:
    return lambda v: h @ v


def vector(n: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=generator(seed), dtype=F64)


def spd(n: int = 8, condition: float = 20.0, seed: int = 0) -> Tensor:
    """Eigenvalues from ``1.9 / condition`` to 1.9, so that the Neumann series converges with step size 1."""
    return symmetric(1.9 * torch.logspace(0, -math.log10(condition), n, dtype=F64), seed)


def assert_certified(solution: Solution, h: Tensor, b: Tensor, bound: bool = False) -> None:
    """Check the reported residual against one computed anew in float64, up to the rounding of ``b - H v``.

    The roundings of the terms of a long series add up like a random walk. A truncated series reports a bound.
    """
    assert solution.v.dtype == b.dtype
    h64, b64, v64 = h.to(F64), b.to(F64), solution.v.to(F64)
    recomputed = (b64 - h64 @ v64).norm().item()
    unit = torch.finfo(b.dtype).eps * (torch.linalg.matrix_norm(h64, 2) * v64.norm() + b64.norm()).item()
    rounding = max(10, 2 * solution.steps**0.5) * unit
    if bound and solution.status is Status.MAX_STEPS:
        assert recomputed <= solution.residual_norm * (1 + 1e-6) + rounding
        return
    assert solution.residual_norm == pytest.approx(recomputed, rel=1e-6, abs=rounding)


class Counted:
    """``v -> H v``, which counts its calls."""

    def __init__(self, h: Tensor) -> None:
        self.h = h
        self.count = 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.h @ v


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
