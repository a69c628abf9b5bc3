"""One contract, over every solver that a setting can name."""

import math

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64, orthogonal, symmetric
from tests.support.systems import Counted, assert_certified, assert_no_worse_than_zero, spd, times, vector
from tune_implicit.hypergradients.settings import SOLVERS, SolverSettings
from tune_implicit.hypergradients.solvers import iterative
from tune_implicit.hypergradients.solvers.arithmetic import dot
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.dense import DenseSolve
from tune_implicit.hypergradients.solvers.neumann import NeumannSeries
from tune_implicit.hypergradients.solvers.solution import Solver, Status

ITERATIVE = ("cg", "minres", "neumann")
each_solver = pytest.mark.parametrize("name", SOLVERS)
each_iterative = pytest.mark.parametrize("name", ITERATIVE)


def make(name: str, k: int = 500, tolerance: float = 1e-10, step_size: float = 1.0, rtol: float = 0.0) -> Solver:
    return SolverSettings(solver=name, step_size=step_size, k=k, tolerance=tolerance, rtol=rtol).make_solver()


# ---- answers


@each_solver
@pytest.mark.parametrize("seed", range(5))
def test_inverse_hvp_matches_dense_solve(name: str, seed: int) -> None:
    h, b = spd(seed=seed), vector(seed=seed)
    got = make(name).solve(times(h), b)
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, torch.linalg.solve(h, b), rtol=0, atol=1e-8)
    assert_certified(got, h, b)


@each_solver
def test_zero_right_hand_side_costs_nothing(name: str) -> None:
    def hvp(v: Tensor) -> Tensor:
        raise AssertionError("b = 0 needs no product.")

    got = make(name).solve(hvp, torch.zeros(3, dtype=F64))
    assert (got.status, got.steps, got.residual_norm) == (Status.CONVERGED, 0, 0.0)
    assert torch.equal(got.v, torch.zeros(3, dtype=F64))


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_multiple_of_the_identity_is_exact_after_one_step(name: str, factor: float, dtype: torch.dtype) -> None:
    # Two libraries return zero here: they leave the loop before they store the step that converged.
    b = vector().to(dtype)
    got = make(name, k=1, step_size=1 / factor, tolerance=1e-5).solve(lambda v: factor * v, b)
    assert got.status is Status.CONVERGED
    assert got.steps <= 1
    torch.testing.assert_close(got.v, b / factor, rtol=1e-15 if dtype == F64 else 1e-6, atol=0)


@each_solver
def test_exact_warm_start_returns_at_once(name: str) -> None:
    h = torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=F64))
    solution = torch.tensor([1.0, -2.0, 4.0], dtype=F64)
    got = make(name).solve(times(h), h @ solution, solution)
    assert got.status is Status.CONVERGED
    assert got.steps == (1 if name == "dense" else 0)
    torch.testing.assert_close(got.v, solution, rtol=1e-14, atol=0)


@each_iterative
def test_warm_start_goes_on_from_where_it_is(name: str) -> None:
    h, b = spd(), vector()
    start = make(name, k=100).solve(times(h), b).v
    cold, warm = (make(name, k=3).solve(times(h), b, v0) for v0 in (None, start))
    assert (b - h @ warm.v).norm().item() <= warm.residual_norm < 1e-2 * cold.residual_norm


@each_solver
def test_warm_start_that_is_worse_than_zero(name: str) -> None:
    h, b = spd(), vector()
    got = make(name).solve(times(h), b, 1e3 * vector(seed=1))
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, torch.linalg.solve(h, b), rtol=0, atol=1e-8)


def test_no_step_is_zero_for_cg_and_the_identity_scaled_for_neumann() -> None:
    h, b = spd(), vector()
    cg, minres, ns = (make(name, k=0, step_size=0.5).solve(times(h), b, vector(seed=1)) for name in ITERATIVE)
    assert torch.equal(cg.v, torch.zeros_like(b))
    assert torch.equal(minres.v, torch.zeros_like(b))
    torch.testing.assert_close(ns.v, 0.5 * b, rtol=1e-15, atol=0)
    for got in (cg, minres, ns):
        assert (got.status, got.steps) == (Status.MAX_STEPS, 0)
    assert cg.residual_norm == minres.residual_norm == pytest.approx(b.norm().item())
    assert math.isnan(ns.residual_norm)


@pytest.mark.parametrize("k", [0, 1, 2, 7, 30])
def test_neumann_is_the_series_written_out(k: int) -> None:
    h, b = spd(), vector()
    term = 0.9 * b
    v = term.clone()
    for _ in range(k):
        term = term - 0.9 * h @ term
        v += term
    got = NeumannSeries(0.9, k, tolerance=0.0).solve(times(h), b)
    assert (got.status, got.steps) == (Status.MAX_STEPS, k)
    torch.testing.assert_close(got.v, v, rtol=1e-13, atol=1e-13)


def test_conjugate_gradient_ends_after_n_steps() -> None:
    h, b = spd(n=6, condition=5.0), vector(6)
    assert ConjugateGradient(6, tolerance=1e-8).solve(times(h), b).status is Status.CONVERGED


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_step_costs_one_product(name: str) -> None:
    hvp = Counted(spd())
    got = make(name, k=7).solve(hvp, vector())
    assert hvp.count == got.steps == 7


@each_iterative
def test_a_residual_in_doubt_costs_one_product_more(name: str) -> None:
    hvp = Counted(spd())
    got = make(name, k=5000, tolerance=0.0).solve(hvp, vector())
    assert got.status is Status.STAGNATED
    assert got.steps < hvp.count <= got.steps + 5


@each_iterative
def test_relative_tolerance(name: str) -> None:
    h, b = spd(40), vector(40)
    got = make(name, tolerance=0.0, rtol=1e-3).solve(times(h), b)
    assert got.status is Status.CONVERGED
    assert 1e-6 < got.residual_norm / b.norm().item() < 1e-3


# ---- the certificate


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("k", [1, 3, 8, 20, 1000])
@pytest.mark.parametrize("condition", [5.0, 1e3, 1e5])
def test_residual_is_what_it_says(name: str, dtype: torch.dtype, k: int, condition: float) -> None:
    for seed in range(8):
        h, b = spd(12, condition, seed).to(dtype), vector(12, seed).to(dtype)
        got = make(name, k=k).solve(times(h), b)
        assert not got.status.failed
        assert_certified(got, h, b, bound=name == "neumann")
        # Truncated is never worse than leaving the implicit term out.
        assert_no_worse_than_zero(got, h, b)


@pytest.mark.parametrize("name", ["cg", "minres"])
def test_residual_has_the_digits_that_the_system_allows(name: str) -> None:
    h, b = spd(), vector()
    got = make(name, k=3).solve(times(h), b)
    assert got.residual_norm == pytest.approx((b - h @ got.v).norm().item(), rel=1e-12)


@each_iterative
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_far_past_convergence_nothing_breaks(name: str, dtype: torch.dtype) -> None:
    h, b = spd(condition=5.0).to(dtype), vector().to(dtype)
    got = make(name, k=5000, tolerance=0.0).solve(times(h), b)
    assert got.status is Status.STAGNATED
    assert got.steps < 500
    torch.testing.assert_close(got.v.to(F64), torch.linalg.solve(h.to(F64), b.to(F64)), rtol=0, atol=1e-4)
    assert_certified(got, h, b)


@each_solver
@pytest.mark.parametrize("exponent", [-100, 100])
def test_the_unit_of_the_loss_does_not_matter(name: str, exponent: int) -> None:
    # 2**100 is about 1e30, whose square is no float32; a power of two, so that even the roundings agree.
    h, b = spd().float(), vector().float()
    solver = make(name, k=15, tolerance=0.0)
    plain, scaled = (solver.solve(times(h), factor * b) for factor in (1.0, 2.0**exponent))
    assert torch.equal(scaled.v, 2.0**exponent * plain.v)
    assert (scaled.status, scaled.steps) == (plain.status, plain.steps)
    assert scaled.residual_norm == pytest.approx(2.0**exponent * plain.residual_norm, rel=1e-6)


@each_solver
@pytest.mark.parametrize("magnitude", [1e-300, 1e-180, 1e300])
def test_right_hand_side_at_the_ends_of_float64(name: str, magnitude: float) -> None:
    # A tolerance of 1e-10, divided by such a scale and squared, was an OverflowError.
    b = magnitude * torch.tensor([1.0, -0.5], dtype=F64)
    got = make(name, step_size=0.5).solve(lambda v: v, b)
    assert got.status in (Status.CONVERGED, Status.STAGNATED)
    torch.testing.assert_close(got.v, b, rtol=1e-10, atol=1e-10)


@each_iterative
@pytest.mark.parametrize("k", [0, 1, 5, 6, 100])
@pytest.mark.parametrize("lowest", [0.1, 0.0, -0.3, math.nan])
@pytest.mark.parametrize("step_size", [1.0, 1.3])
def test_reading_norms_in_windows_changes_nothing(
    name: str, k: int, lowest: float, step_size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An accelerator reads its norms every few steps: the iterates past the end must leave no trace.
    h = torch.tensor([1.9, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, lowest], dtype=F64)
    solver, b = make(name, k, step_size=step_size), vector()
    one_by_one = solver.solve(lambda v: h * v, b)
    monkeypatch.setattr(iterative, "steps_between_readings", lambda b: 4)
    in_windows = solver.solve(lambda v: h * v, b)
    assert torch.equal(in_windows.v, one_by_one.v)
    assert in_windows.status is one_by_one.status
    assert in_windows.steps == one_by_one.steps
    assert in_windows.residual_norm == pytest.approx(one_by_one.residual_norm, rel=0, abs=0, nan_ok=True)


def test_inner_products_are_accumulated_in_float64() -> None:
    # 2**24 + 1 is no float32.
    assert dot(torch.tensor([4096.0, 1.0]), torch.tensor([4096.0, 1.0])).item() == 2**24 + 1


# ---- failures, told apart


@each_solver
def test_singular_but_consistent(name: str) -> None:
    h = symmetric(torch.tensor([1.0, 0.8, 0.5, 0.3, 0.0, 0.0], dtype=F64))
    b = h @ vector(6)
    got = make(name).solve(times(h), b)
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, torch.linalg.pinv(h, rtol=1e-10) @ b, rtol=0, atol=1e-8)


@each_solver
def test_singular_and_inconsistent(name: str) -> None:
    h = torch.diag(torch.tensor([1.0, 0.5, 0.0], dtype=F64))
    b = torch.tensor([1.0, 1.0, 0.3], dtype=F64)
    got = make(name).solve(times(h), b)
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
        got = make(name).solve(times(h), b)
        assert got.status is not Status.CONVERGED
        assert got.residual_norm >= 0.99 * hopeless
        assert_certified(got, h, b, bound=name == "neumann")


@pytest.mark.parametrize("name", ["cg", "neumann"])
@pytest.mark.parametrize("seed", range(10))
def test_negative_curvature_is_no_answer(name: str, seed: int) -> None:
    h, b = symmetric(torch.tensor([1.5, 1.0, 0.5, 0.3, -0.2], dtype=F64), seed), vector(5, seed)
    got = make(name).solve(times(h), b)
    assert got.status is Status.NEGATIVE_CURVATURE
    assert_no_worse_than_zero(got, h, b)
    assert_certified(got, h, b)


@pytest.mark.parametrize("name", ["minres", "dense"])
@pytest.mark.parametrize("seed", range(10))
def test_an_indefinite_matrix_is_solved_and_told(name: str, seed: int) -> None:
    h, b = symmetric(torch.tensor([1.5, 1.0, 0.5, 0.3, -0.2], dtype=F64), seed), vector(5, seed)
    got = make(name).solve(times(h), b)
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(h @ got.v, b, rtol=0, atol=1e-12)
    assert got.lambda_min == pytest.approx(-0.2)
    assert got.lambda_max == pytest.approx(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("k", [5, 40, 500])
def test_minres_never_reports_less_than_the_true_residual(dtype: torch.dtype, k: int) -> None:
    # Its textbook recursion reports 1e-1 here while the true residual is 1e13: `b` has a part in the kernel.
    for seed in range(10):
        h, b = (
            symmetric(torch.tensor([1.0, 0.5, 0.3, 0.1, 1e-9, 0.0], dtype=F64), seed).to(dtype),
            vector(6, seed).to(dtype),
        )
        got = make("minres", k=k).solve(times(h), b)
        assert got.residual_norm <= 1.001 * b.norm().item()
        assert_certified(got, h, b)


@pytest.mark.parametrize("step_size", [1.1, 2.0, 100.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_step_size_too_large_is_seen_early(step_size: float, dtype: torch.dtype) -> None:
    h, b = spd().to(dtype), vector().to(dtype)  # 2 / L is 1.05
    got = NeumannSeries(step_size, 1000).solve(times(h), b)
    assert got.status is Status.DIVERGED
    assert got.steps < 25
    assert_no_worse_than_zero(got, h, b)
    assert_certified(got, h, b)


def test_negative_curvature_is_not_blamed_on_the_step_size() -> None:
    # Found by trial: where the largest eigenvalues are still in the residual as the negative one makes it grow,
    # `r' H r` is positive. The step size, 1, is below 2 / 1.9.
    h = torch.tensor([1.9, -0.1], dtype=F64)
    got = NeumannSeries(1.0, 500).solve(lambda v: h * v, torch.tensor([1.0, 0.1], dtype=F64))
    assert got.status is Status.NEGATIVE_CURVATURE


@each_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("good_products", [0, 2])
def test_non_finite_product(name: str, bad: float, good_products: int) -> None:
    h, b, calls = spd(), vector(), []

    def hvp(v: Tensor) -> Tensor:
        calls.append(v)
        # Entry by entry, so that the infinite entry is not multiplied into NaN first.
        return h @ v if len(calls) <= good_products else torch.where(torch.arange(8) == 3, bad, h @ v)

    got = make(name).solve(hvp, b)
    assert got.status is Status.NON_FINITE
    assert_certified(got, h, b)


@each_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_right_hand_side(name: str, bad: float) -> None:
    got = make(name).solve(times(spd()), torch.where(torch.arange(8) == 3, bad, vector()))
    assert got.status is Status.NON_FINITE
    assert torch.equal(got.v, torch.zeros(8, dtype=F64))
    assert not math.isfinite(got.residual_norm)


@each_iterative
def test_non_finite_warm_start(name: str) -> None:
    h, b = spd(), vector()
    got = make(name).solve(times(h), b, torch.full((8,), math.nan, dtype=F64))
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, torch.linalg.solve(h, b), rtol=0, atol=1e-8)


@each_solver
def test_nonfinite_product_of_a_huge_right_hand_side_reports_its_norm(name: str) -> None:
    got = make(name).solve(lambda v: math.nan * v, torch.full((4,), 1e30))
    assert got.status is Status.NON_FINITE
    assert got.residual_norm == pytest.approx(2e30, rel=1e-6)


# ---- messages


@pytest.mark.parametrize("make_one", [ConjugateGradient, lambda *a: NeumannSeries(0.1, *a)], ids=["cg", "neumann"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, r"^`k` must be 0 or more, got -1\.$"),
        ((1.5,), TypeError, "`k` must be an integer, got 1.5"),
        ((True,), TypeError, "`k` must be an integer, got True"),
        ((1, -1e-3), ValueError, r"`tolerance` must be 0 or more, got -0.001\."),
        ((1, math.nan), ValueError, "`tolerance` must be 0 or more, got nan"),
        ((1, 0.0, -1.0), ValueError, "`rtol` must be 0 or more, got -1.0"),
        ((1, 0.0, math.nan), ValueError, "`rtol` must be 0 or more, got nan"),
    ],
)
def test_messages_of_the_iterative_solvers(make_one, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        make_one(*arguments)


@pytest.mark.parametrize("step_size", [0.0, -1.0, math.nan, math.inf])
def test_message_of_a_bad_step_size(step_size: float) -> None:
    with pytest.raises(ValueError, match="`step_size` must be positive and finite, got"):
        NeumannSeries(step_size, 1)


def test_messages_of_the_dense_solver() -> None:
    with pytest.raises(ValueError, match="`max_size` must be 1 or more, got 0"):
        DenseSolve(0)
    with pytest.raises(ValueError, match=r"forms an 8 x 8 matrix, more than `max_size` = 7.*ConjugateGradient"):
        DenseSolve(7).solve(times(spd()), vector())
