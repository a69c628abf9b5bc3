import math

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64, symmetric
from tests.support.systems import Counted, assert_certified, spd, times, vector
from tune_implicit.hypergradients.solvers.dense import DenseSolve
from tune_implicit.hypergradients.solvers.solution import Status


def test_it_takes_n_products_whatever_the_warm_start() -> None:
    hvp = Counted(spd())
    cold, warm = (DenseSolve().solve(hvp, vector(), v0) for v0 in (None, vector(seed=1)))
    assert hvp.count == 16
    assert torch.equal(warm.v, cold.v)
    assert cold.steps == 1


@pytest.mark.parametrize("values", [(0.5, 1.0, 2.0), (-3.0, -1.0, 2.0), (-2.0, -1.0, -0.5)])
def test_curvatures_are_the_ends_of_the_spectrum(values: tuple[float, ...]) -> None:
    got = DenseSolve().solve(times(symmetric(torch.tensor(values, dtype=F64))), vector(3))
    assert (got.lambda_min, got.lambda_max) == pytest.approx((values[0], values[-1]))


def test_a_singular_system_gets_its_shortest_least_squares_solution() -> None:
    h, b = symmetric(torch.tensor([2.0, 1.0, -0.5, 0.0, 0.0], dtype=F64)), vector(5)
    got = DenseSolve().solve(times(h), b)
    assert got.status is Status.STAGNATED
    torch.testing.assert_close(got.v, torch.linalg.pinv(h, rtol=1e-10) @ b)
    assert_certified(got, h, b)


def test_a_matrix_without_curvature_gives_no_answer() -> None:
    got = DenseSolve().solve(torch.zeros_like, vector())
    assert got.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(got.v, torch.zeros(8, dtype=F64))


def test_products_that_are_not_quite_symmetric_are_made_so() -> None:
    h, b = spd(), vector()
    skew = 1e-3 * (torch.ones(8, 8, dtype=F64).triu(1) - torch.ones(8, 8, dtype=F64).tril(-1))
    got = DenseSolve().solve(times(h + skew), b)
    torch.testing.assert_close(got.v, torch.linalg.solve(h, b))
    # It is that of the products as they are.
    assert got.residual_norm == pytest.approx((b - (h + skew) @ got.v).norm().item())


@pytest.mark.parametrize("stopping", [{"tolerance": 0.0}, {"tolerance": 1e-30}, {"tolerance": 0.0, "rtol": 1e-30}])
def test_a_tolerance_below_rounding_is_not_met(stopping: dict[str, float]) -> None:
    got = DenseSolve(**stopping).solve(times(spd()), vector())
    assert got.status is Status.STAGNATED
    assert 0 < got.residual_norm < 1e-13


@pytest.mark.parametrize("stopping", [{"tolerance": 1e-3}, {"tolerance": 0.0, "rtol": 1e-3}])
def test_a_singular_system_whose_rest_is_below_the_tolerance_has_converged(stopping: dict[str, float]) -> None:
    h, b = torch.tensor([1.0, 2.0, 0.0], dtype=F64).diag(), torch.tensor([1.0, 1.0, 1e-4], dtype=F64)
    got = DenseSolve(**stopping).solve(times(h), b)
    assert got.status is Status.CONVERGED
    assert got.residual_norm == pytest.approx(1e-4)


def test_products_of_which_one_is_not_finite_give_no_answer() -> None:
    def hvp(v: Tensor) -> Tensor:
        return math.inf * v if v[3] else v

    got = DenseSolve().solve(hvp, vector())
    assert got.status is Status.NON_FINITE
    assert torch.equal(got.v, torch.zeros(8, dtype=F64))
    assert got.residual_norm == pytest.approx(vector().norm().item())


# ---- messages


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_size": 0}, ValueError, "`max_size` must be 1 or more, got 0"),
        ({"max_size": 2.5}, TypeError, "`max_size` must be an integer, got 2.5"),
        ({"tolerance": -1.0}, ValueError, "`tolerance` must be 0 or more, got -1.0"),
        ({"rtol": math.nan}, ValueError, "`rtol` must be 0 or more, got nan"),
    ],
)
def test_messages(change: dict[str, float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DenseSolve(**change)


def test_message_of_a_system_that_is_too_large() -> None:
    with pytest.raises(ValueError, match=r"forms an 8 x 8 matrix, more than `max_size` = 7.*ConjugateGradient"):
        DenseSolve(7).solve(times(spd()), vector())
    assert DenseSolve(8).solve(times(spd()), vector()).status is Status.CONVERGED
