"""One contract, over every solver that a setting can name."""

import math

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64, orthogonal, symmetric
from tests.support.systems import assert_certified, assert_no_worse_than_zero, named_solver, spd, times, vector
from tune_implicit.hypergradients.settings import SOLVERS
from tune_implicit.hypergradients.solvers.solution import Solver, Status

each_solver = pytest.mark.parametrize("name", SOLVERS)


@each_solver
def test_it_is_a_solver(name: str) -> None:
    assert isinstance(named_solver(name), Solver)


# ---- answers


@each_solver
@pytest.mark.parametrize("seed", range(5))
def test_inverse_hvp_matches_dense_solve(name: str, seed: int) -> None:
    h, b = spd(seed=seed), vector(seed=seed)
    got = named_solver(name).solve(times(h), b)
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, torch.linalg.solve(h, b), rtol=0, atol=1e-8)
    assert_certified(got, h, b)


@each_solver
def test_zero_right_hand_side_costs_nothing(name: str) -> None:
    def hvp(v: Tensor) -> Tensor:
        raise AssertionError("b = 0 needs no product.")

    got = named_solver(name).solve(hvp, torch.zeros(3, dtype=F64))
    assert (got.status, got.steps, got.residual_norm) == (Status.CONVERGED, 0, 0.0)
    assert torch.equal(got.v, torch.zeros(3, dtype=F64))


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_multiple_of_the_identity_is_exact_after_one_step(name: str, factor: float, dtype: torch.dtype) -> None:
    # Two libraries return zero here: they leave the loop before they store the step that converged.
    b = vector().to(dtype)
    got = named_solver(name, k=1, step_size=1 / factor, tolerance=1e-5).solve(lambda v: factor * v, b)
    assert got.status is Status.CONVERGED
    assert got.steps <= 1
    torch.testing.assert_close(got.v, b / factor, rtol=1e-15 if dtype == F64 else 1e-6, atol=0)


@each_solver
def test_exact_warm_start_returns_at_once(name: str) -> None:
    h = torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=F64))
    solution = torch.tensor([1.0, -2.0, 4.0], dtype=F64)
    got = named_solver(name).solve(times(h), h @ solution, solution)
    assert got.status is Status.CONVERGED
    assert got.steps == (1 if name == "dense" else 0)
    torch.testing.assert_close(got.v, solution, rtol=1e-14, atol=0)


@each_solver
def test_warm_start_that_is_worse_than_zero(name: str) -> None:
    h, b = spd(), vector()
    got = named_solver(name).solve(times(h), b, 1e3 * vector(seed=1))
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, torch.linalg.solve(h, b), rtol=0, atol=1e-8)


# ---- the certificate


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("k", [1, 3, 8, 20, 1000])
@pytest.mark.parametrize("condition", [5.0, 1e3, 1e5])
def test_residual_is_what_it_says(name: str, dtype: torch.dtype, k: int, condition: float) -> None:
    for seed in range(8):
        h, b = spd(12, condition, seed).to(dtype), vector(12, seed).to(dtype)
        got = named_solver(name, k=k).solve(times(h), b)
        assert not got.status.failed
        assert_certified(got, h, b, bound=name == "neumann")
        # Truncated is never worse than leaving the implicit term out.
        assert_no_worse_than_zero(got, h, b)


@each_solver
@pytest.mark.parametrize("exponent", [-100, 100])
def test_the_unit_of_the_loss_does_not_matter(name: str, exponent: int) -> None:
    # 2**100 is about 1e30, whose square is no float32; a power of two, so that even the roundings agree.
    h, b = spd().float(), vector().float()
    solver = named_solver(name, k=15, tolerance=0.0)
    plain, scaled = (solver.solve(times(h), factor * b) for factor in (1.0, 2.0**exponent))
    assert torch.equal(scaled.v, 2.0**exponent * plain.v)
    assert (scaled.status, scaled.steps) == (plain.status, plain.steps)
    assert scaled.residual_norm == pytest.approx(2.0**exponent * plain.residual_norm, rel=1e-6)


@each_solver
@pytest.mark.parametrize("magnitude", [1e-300, 1e-180, 1e300])
def test_right_hand_side_at_the_ends_of_float64(name: str, magnitude: float) -> None:
    # A tolerance of 1e-10, divided by such a scale and squared, was an OverflowError.
    b = magnitude * torch.tensor([1.0, -0.5], dtype=F64)
    got = named_solver(name, step_size=0.5).solve(lambda v: v, b)
    assert got.status in (Status.CONVERGED, Status.STAGNATED)
    torch.testing.assert_close(got.v, b, rtol=1e-10, atol=1e-10)


# ---- failures, told apart


@each_solver
def test_singular_but_consistent(name: str) -> None:
    h = symmetric(torch.tensor([1.0, 0.8, 0.5, 0.3, 0.0, 0.0], dtype=F64))
    b = h @ vector(6)
    got = named_solver(name).solve(times(h), b)
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, torch.linalg.pinv(h, rtol=1e-10) @ b, rtol=0, atol=1e-8)


@each_solver
def test_singular_and_inconsistent(name: str) -> None:
    h = torch.diag(torch.tensor([1.0, 0.5, 0.0], dtype=F64))
    b = torch.tensor([1.0, 1.0, 0.3], dtype=F64)
    got = named_solver(name).solve(times(h), b)
    # No more than the part of `b` that has no solution is left, and the residual tells how much that is.
    assert got.status is Status.STAGNATED
    assert got.residual_norm >= 0.3 * (1 - 1e-12)
    assert_certified(got, h, b)


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_singular_to_rounding_and_inconsistent(name: str, dtype: torch.dtype) -> None:
    # A network with a redundant weight: the zero eigenvalue is a rounding error of either sign.
    for seed in range(20):
        eigenvalues = torch.logspace(0, -1, 12, dtype=F64)
        eigenvalues[-1] = 0
        h, b = symmetric(eigenvalues, seed).to(dtype), vector(12, seed).to(dtype)
        hopeless = abs(orthogonal(12, 12, seed)[:, -1] @ b.to(F64)).item()
        got = named_solver(name).solve(times(h), b)
        assert got.status is not Status.CONVERGED
        assert got.residual_norm >= 0.99 * hopeless
        assert_certified(got, h, b, bound=name == "neumann")


@pytest.mark.parametrize("name", ["cg", "neumann"])
@pytest.mark.parametrize("seed", range(10))
def test_negative_curvature_is_no_answer(name: str, seed: int) -> None:
    h, b = symmetric(torch.tensor([1.5, 1.0, 0.5, 0.3, -0.2], dtype=F64), seed), vector(5, seed)
    got = named_solver(name).solve(times(h), b)
    assert got.status is Status.NEGATIVE_CURVATURE
    assert_no_worse_than_zero(got, h, b)
    assert_certified(got, h, b)


@pytest.mark.parametrize("name", ["minres", "dense"])
@pytest.mark.parametrize("seed", range(10))
def test_an_indefinite_matrix_is_solved_and_told(name: str, seed: int) -> None:
    h, b = symmetric(torch.tensor([1.5, 1.0, 0.5, 0.3, -0.2], dtype=F64), seed), vector(5, seed)
    got = named_solver(name).solve(times(h), b)
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(h @ got.v, b, rtol=0, atol=1e-12)
    assert got.lambda_min == pytest.approx(-0.2)
    assert got.lambda_max == pytest.approx(1.5)


@each_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("good_products", [0, 2])
def test_non_finite_product(name: str, bad: float, good_products: int) -> None:
    h, b, calls = spd(), vector(), []

    def hvp(v: Tensor) -> Tensor:
        calls.append(v)
        # Entry by entry, so that the infinite entry is not multiplied into NaN first.
        return h @ v if len(calls) <= good_products else torch.where(torch.arange(8) == 3, bad, h @ v)

    got = named_solver(name).solve(hvp, b)
    assert got.status is Status.NON_FINITE
    assert_certified(got, h, b)


@each_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_right_hand_side(name: str, bad: float) -> None:
    got = named_solver(name).solve(times(spd()), torch.where(torch.arange(8) == 3, bad, vector()))
    assert got.status is Status.NON_FINITE
    assert torch.equal(got.v, torch.zeros(8, dtype=F64))
    assert not math.isfinite(got.residual_norm)


@each_solver
def test_nonfinite_product_of_a_huge_right_hand_side_reports_its_norm(name: str) -> None:
    got = named_solver(name).solve(lambda v: math.nan * v, torch.full((4,), 1e30))
    assert got.status is Status.NON_FINITE
    assert got.residual_norm == pytest.approx(2e30, rel=1e-6)
