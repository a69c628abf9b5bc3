from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64, symmetric
from tests.support.systems import Counted, assert_certified, krylov, spd, times, vector
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.solution import Solution, Status

INDEFINITE = symmetric(torch.tensor([1.9, 1.3, 0.8, 0.4, 0.2, -0.3, -0.9, -1.6], dtype=F64))


def iterate(h: Tensor, b: Tensor, k: int) -> Solution:
    return Minres(k, tolerance=0.0).solve(times(h), b)


@pytest.mark.parametrize("h", [spd(), INDEFINITE], ids=["definite", "indefinite"])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_an_iterate_has_the_smallest_residual_in_its_krylov_space(k: int, h: Tensor) -> None:
    b = vector()
    basis = krylov(h, b, k)
    best = basis @ torch.linalg.lstsq(h @ basis, b[:, None]).solution[:, 0]
    torch.testing.assert_close(iterate(h, b, k).v, best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("h", [spd(40, 1e4), symmetric(torch.linspace(-1, 2, 40, dtype=F64))], ids=["spd", "saddle"])
def test_no_step_makes_the_residual_larger(h: Tensor) -> None:
    b = vector(40)
    residuals = [iterate(h, b, k).residual_norm for k in range(20)]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(residuals))


def test_ritz_values_lie_in_the_spectrum_and_find_its_ends() -> None:
    h, b = symmetric(torch.linspace(-1, 2, 40, dtype=F64)), vector(40)
    few, many = iterate(h, b, 5), iterate(h, b, 30)
    assert -1 - 1e-9 <= many.lambda_min <= few.lambda_min < 0
    assert 1 < few.lambda_max <= many.lambda_max <= 2 + 1e-9


def test_a_singular_and_indefinite_system_that_has_a_solution_is_solved() -> None:
    h = symmetric(torch.tensor([1.5, 0.5, 0.0, -0.4], dtype=F64))
    b = h @ vector(4)
    got = Minres(100).solve(times(h), b)
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, torch.linalg.pinv(h, rtol=1e-10) @ b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("k", [5, 40, 500])
def test_it_never_reports_less_than_the_true_residual(dtype: torch.dtype, k: int) -> None:
    # Its textbook recursion reports 1e-1 here while the true residual is 1e13: `b` has a part in the kernel.
    for seed in range(10):
        h, b = (
            symmetric(torch.tensor([1.0, 0.5, 0.3, 0.1, 1e-9, 0.0], dtype=F64), seed).to(dtype),
            vector(6, seed).to(dtype),
        )
        got = Minres(k).solve(times(h), b)
        assert got.residual_norm <= 1.001 * b.norm().item()
        assert_certified(got, h, b)


def test_what_the_recursion_loses_is_solved_for_anew() -> None:
    # At a condition of 1e6 the recursion of float32 is off long before the residual is as small as it can be.
    h, b = spd(20, 1e6).float(), vector(20).float()
    hvp = Counted(h)
    got = Minres(2000, tolerance=0.0).solve(hvp, b)
    assert got.status is Status.STAGNATED
    assert hvp.count > got.steps + 1
    assert_certified(got, h, b)


def test_a_matrix_without_curvature_gives_no_answer() -> None:
    got = Minres(100).solve(torch.zeros_like, vector())
    assert got.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(got.v, torch.zeros(8, dtype=F64))
