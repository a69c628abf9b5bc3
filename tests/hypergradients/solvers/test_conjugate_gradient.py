from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64, symmetric
from tests.support.systems import Counted, assert_certified, krylov, spd, times, vector
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.quasi_newton import QuasiNewton
from tune_implicit.hypergradients.solvers.solution import Solution, Status


def iterate(h: Tensor, b: Tensor, k: int) -> Solution:
    return ConjugateGradient(k, tolerance=0.0).solve(times(h), b)


def energy(h: Tensor, b: Tensor, v: Tensor) -> float:
    return (v @ h @ v / 2 - b @ v).item()


# ---- answers


def test_it_ends_after_n_steps() -> None:
    h, b = spd(n=6, condition=5.0), vector(6)
    assert ConjugateGradient(6, tolerance=1e-8).solve(times(h), b).status is Status.CONVERGED


def test_it_ends_after_as_many_steps_as_there_are_eigenvalues() -> None:
    h, b = symmetric(torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, 0.5], dtype=F64)), vector(6)
    got = ConjugateGradient(100).solve(times(h), b)
    assert (got.status, got.steps) == (Status.CONVERGED, 3)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_an_iterate_has_the_least_energy_in_its_krylov_space(k: int) -> None:
    h, b = spd(), vector()
    basis = krylov(h, b, k)
    best = basis @ torch.linalg.solve(basis.T @ h @ basis, basis.T @ b)
    torch.testing.assert_close(iterate(h, b, k).v, best, rtol=0, atol=1e-9)


def test_each_iterate_is_nearer_than_the_one_before() -> None:
    h, b = spd(40, condition=1e4), vector(40)
    energies = [energy(h, b, iterate(h, b, k).v) for k in range(20)]
    assert energies[0] == 0
    assert all(after < before for before, after in pairwise(energies))


def test_a_residual_that_grows_at_first_does_not_bring_zero_back() -> None:
    # CG that returns its iterate of least residual returns 0 here: the implicit term would vanish without a word.
    h, b = torch.tensor([1.0, 100.0], dtype=F64).diag(), torch.tensor([1.0, 0.15], dtype=F64)
    got = iterate(h, b, 1)
    assert got.status is Status.MAX_STEPS
    assert got.residual_norm > b.norm().item()
    torch.testing.assert_close(got.v, b * ((b @ b) / (b @ h @ b)))


# ---- curvature


def test_curvatures_lie_in_the_spectrum_and_find_its_ends() -> None:
    h, b = spd(40), vector(40)
    few, many = iterate(h, b, 3), iterate(h, b, 30)
    values = torch.linalg.eigvalsh(h)
    lowest, highest = values[0].item() * (1 - 1e-9), values[-1].item() * (1 + 1e-9)
    assert lowest <= many.lambda_min <= few.lambda_min < few.lambda_max <= many.lambda_max <= highest


def test_it_ends_before_a_direction_of_negative_curvature() -> None:
    h, b = torch.tensor([2.0, 1.0, -0.5], dtype=F64).diag(), torch.tensor([1.0, 1.0, 0.2], dtype=F64)
    got = ConjugateGradient(100).solve(times(h), b)
    assert got.status is Status.NEGATIVE_CURVATURE
    assert got.lambda_min < 0
    torch.testing.assert_close(got.v, iterate(h, b, got.steps - 1).v)
    assert_certified(got, h, b)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_curvature_of_a_rounding_error_is_a_direction_without_any(dtype: torch.dtype, sign: int) -> None:
    tiny = sign * torch.finfo(dtype).eps
    h, b = torch.tensor([1.0, tiny], dtype=dtype), torch.tensor([1.0, 1.0], dtype=dtype)
    got = ConjugateGradient(100).solve(lambda v: h * v, b)
    assert got.status is Status.STAGNATED
    torch.testing.assert_close(got.v, 2 * b)  # after the one step that it takes


def test_a_matrix_without_curvature_gives_no_answer() -> None:
    got = ConjugateGradient(100).solve(torch.zeros_like, vector())
    assert got.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(got.v, torch.zeros(8, dtype=F64))


# ---- its preconditioner


def test_a_preconditioner_learns_from_a_solve_and_costs_no_product() -> None:
    h, b, learned = spd(), vector(), QuasiNewton(20)
    first, second = (Counted(h) for _ in range(2))
    ConjugateGradient(100, 1e-8, preconditioner=learned).solve(first, b)
    got = ConjugateGradient(100, 1e-8, preconditioner=learned).solve(second, vector(seed=1))
    assert learned.fits(b)
    # One product more measures a residual that is all rounding.
    assert got.steps <= second.count <= got.steps + 1 < first.count


def test_a_preconditioned_solve_converges_as_far_as_it_says() -> None:
    """It hardly looks along the largest eigenvectors, to which most of its rounding is due."""
    h = spd(20, 1e4).float()
    b = vector(20).float()
    solver = ConjugateGradient(2000, 1e-4, preconditioner=QuasiNewton(8))
    for _ in range(4):
        got = solver.solve(times(h), b)
        true = torch.linalg.vector_norm(b.double() - h.double() @ got.v.double()).item()
        assert true <= 2 * got.residual_norm
        assert got.status is not Status.CONVERGED or true < 2e-4


def test_message_of_what_is_no_preconditioner() -> None:
    with pytest.raises(TypeError, match="`preconditioner` must be a QuasiNewton or None, got 20"):
        ConjugateGradient(5, preconditioner=20)
