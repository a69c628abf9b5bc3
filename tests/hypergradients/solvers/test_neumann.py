import math

import pytest
import torch

from tests.support.problems import F64
from tests.support.systems import Counted, assert_certified, assert_no_worse_than_zero, spd, times, vector
from tune_implicit.hypergradients.solvers.neumann import NeumannSeries
from tune_implicit.hypergradients.solvers.solution import Status

# ---- the series


@pytest.mark.parametrize("k", [0, 1, 2, 7, 30])
def test_it_is_the_series_written_out(k: int) -> None:
    h, b = spd(), vector()
    term = 0.9 * b
    v = term.clone()
    for _ in range(k):
        term = term - 0.9 * h @ term
        v += term
    got = NeumannSeries(0.9, k, tolerance=0.0).solve(times(h), b)
    assert (got.status, got.steps) == (Status.MAX_STEPS, k)
    torch.testing.assert_close(got.v, v, rtol=1e-13, atol=1e-13)


def test_no_step_is_the_scaled_identity_of_which_nothing_is_known() -> None:
    hvp, b = Counted(spd()), vector()
    got = NeumannSeries(0.5, 0).solve(hvp, b, vector(seed=1))
    assert (got.status, got.steps, hvp.count) == (Status.MAX_STEPS, 0, 0)
    torch.testing.assert_close(got.v, 0.5 * b, rtol=1e-15, atol=0)
    assert math.isnan(got.residual_norm)


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_residual_reported_is_that_of_the_sum_without_its_last_term(k: int) -> None:
    h, b = spd(), vector()
    got, before = (NeumannSeries(1.0, steps, tolerance=0.0).solve(times(h), b) for steps in (k, k - 1))
    assert got.residual_norm == pytest.approx((b - h @ before.v).norm().item(), rel=1e-12)
    assert (b - h @ got.v).norm().item() < got.residual_norm


def test_largest_curvature_is_the_largest_ratio_of_lengths_and_there_is_no_smallest() -> None:
    h, b = spd(), vector()
    got = NeumannSeries(1.0, 30, tolerance=0.0).solve(times(h), b)
    terms = [torch.linalg.matrix_power(torch.eye(8, dtype=F64) - h, i) @ b for i in range(30)]
    assert got.lambda_max == pytest.approx(max((h @ term).norm().item() / term.norm().item() for term in terms))
    assert got.lambda_max <= torch.linalg.eigvalsh(h)[-1].item()
    assert math.isnan(got.lambda_min)


# ---- where it does not converge


@pytest.mark.parametrize("step_size", [1.1, 2.0, 100.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_step_size_too_large_is_seen_early(step_size: float, dtype: torch.dtype) -> None:
    h, b = spd().to(dtype), vector().to(dtype)  # 2 / L is 1.05
    got = NeumannSeries(step_size, 1000).solve(times(h), b)
    assert got.status is Status.DIVERGED
    assert got.steps < 25
    assert_no_worse_than_zero(got, h, b)
    assert_certified(got, h, b)


@pytest.mark.parametrize("n", [10, 50, 200])
@pytest.mark.parametrize("factor", [2.1, 2.5, 3.0, 5.0, 10.0, 30.0, 100.0])
def test_divergence_gives_a_lower_bound_of_the_largest_eigenvalue(factor: float, n: int) -> None:
    step_size = factor / 1.9
    for seed in range(50):
        hvp = Counted(spd(n, condition=100.0, seed=seed))
        got = NeumannSeries(step_size, 1000).solve(hvp, vector(n, seed + 1000))
        assert got.status is Status.DIVERGED
        assert hvp.count <= 25
        assert 2 / step_size * (1 - 1e-12) <= got.lambda_max <= 1.9 * (1 + 1e-9)


def test_negative_curvature_is_not_blamed_on_the_step_size() -> None:
    # Found by trial: where the largest eigenvalues are still in the residual as the negative one makes it grow,
    # `r' H r` is positive. The step size, 1, is below 2 / 1.9.
    h = torch.tensor([1.9, -0.1], dtype=F64)
    got = NeumannSeries(1.0, 500).solve(lambda v: h * v, torch.tensor([1.0, 0.1], dtype=F64))
    assert got.status is Status.NEGATIVE_CURVATURE


def test_a_step_size_too_large_is_not_taken_for_negative_curvature() -> None:
    h = torch.tensor([2.1, 0.1], dtype=F64)
    got = NeumannSeries(1.0, 500).solve(lambda v: h * v, torch.tensor([0.01, 1.0], dtype=F64))
    assert got.status is Status.DIVERGED


def test_a_matrix_without_curvature_gives_no_answer() -> None:
    got = NeumannSeries(1.0, 100).solve(torch.zeros_like, vector())
    assert got.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(got.v, torch.zeros(8, dtype=F64))


# ---- messages


@pytest.mark.parametrize("step_size", [0.0, -1.0, math.nan, math.inf])
def test_message_of_a_bad_step_size(step_size: float) -> None:
    with pytest.raises(ValueError, match="`step_size` must be positive and finite, got"):
        NeumannSeries(step_size, 1)


def test_several_mistakes_are_told_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"`step_size` must be positive.* `k` must be 0 or more.* `rtol` must be 0 or"):
        NeumannSeries(0.0, -1, rtol=-1.0)
