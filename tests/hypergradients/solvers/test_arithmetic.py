import math

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64
from tests.support.systems import Counted, spd, times, vector
from tune_implicit.hypergradients.solvers.arithmetic import (
    decided_by,
    dot,
    length,
    norm,
    read,
    scaled,
    start,
    steps_between_readings,
)
from tune_implicit.hypergradients.solvers.solution import Status

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, F64])


# ---- what the right-hand side decides


@pytest.mark.parametrize("b", [torch.zeros(3), -torch.zeros(3, dtype=F64)])
def test_zero_is_solved_by_zero(b: Tensor) -> None:
    scale, known = decided_by(b)
    assert (scale, known.status, known.steps, known.residual_norm) == (1.0, Status.CONVERGED, 0, 0.0)
    assert torch.equal(known.v, torch.zeros_like(b))
    assert known.v.dtype == b.dtype


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_has_no_solution(place: int, bad: float) -> None:
    b = torch.ones(3)
    b[place] = bad
    _, known = decided_by(b)
    assert known.status is Status.NON_FINITE
    assert torch.equal(known.v, torch.zeros(3))
    assert not math.isfinite(known.residual_norm)


@both_dtypes
@pytest.mark.parametrize("largest", [1.0, -3.0, 1e8, -1e-8])
def test_what_is_of_ordinary_size_is_not_scaled(largest: float, dtype: torch.dtype) -> None:
    b = torch.tensor([largest, 0.0], dtype=dtype)
    scale, known = decided_by(b)
    assert (scale, known) == (1.0, None)
    assert scaled(b, scale) is b


@both_dtypes
@pytest.mark.parametrize("largest", [1e30, -1e30, 1e12, -1e-12, 1e-30, 1e-44])
def test_other_sizes_are_scaled_without_rounding(largest: float, dtype: torch.dtype) -> None:
    b = torch.tensor([largest, largest / 3], dtype=dtype)
    scale, known = decided_by(b)
    assert known is None
    assert math.frexp(scale)[0] == 0.5  # a power of two
    assert torch.tensor(1 / scale, dtype=dtype).isfinite()
    divided = scaled(b, scale)
    assert torch.equal(divided * scale, b)
    assert 1 <= divided.abs().max() < 2 or b.abs().max() < torch.finfo(dtype).tiny


# ---- where a solve starts


def test_start_is_the_multiple_of_least_residual() -> None:
    h, b, v0 = spd(), vector(), vector(seed=1)
    v, r, image = start(times(h), b, v0)
    best = torch.linalg.lstsq((h @ v0)[:, None], b[:, None]).solution.item()
    torch.testing.assert_close(v, best * v0)
    torch.testing.assert_close(r, b - h @ v)
    assert image == pytest.approx(((h @ v0).norm() / v0.norm()).item())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("definite", [False, True])
def test_start_is_never_worse_than_zero(definite: bool, magnitude: float, dtype: torch.dtype) -> None:
    for seed in range(20):
        h, b = spd(condition=1e4, seed=seed).to(dtype), vector(seed=seed).to(dtype)
        found = start(times(h), b, (magnitude * vector(seed=seed + 50)).to(dtype), definite)
        if found is None:
            continue
        v, r, _ = found
        assert r.norm() <= b.norm() * (1 + 1e-6)
        assert v @ h @ v / 2 - b @ v <= 1e-6 or not definite
        torch.testing.assert_close(r, b - h @ v, rtol=0, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("definite", [False, True])
def test_start_of_an_answer_to_another_scale_is_the_answer(definite: bool) -> None:
    h, b = spd(), vector()
    _, r, _ = start(times(h), b, -1e6 * torch.linalg.solve(h, b), definite)
    assert r.norm() < 1e-12


def test_start_costs_one_product() -> None:
    hvp = Counted(spd())
    start(hvp, vector(), vector(seed=1))
    assert hvp.count == 1


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_there_is_no_start_along_no_direction(bad: float) -> None:
    assert start(times(spd()), vector(), torch.full((8,), bad, dtype=F64)) is None


@pytest.mark.parametrize("product", [0.0, math.nan, math.inf])
def test_there_is_no_start_along_a_direction_without_a_product(product: float) -> None:
    assert start(lambda v: torch.full_like(v, product), vector(), vector(seed=1)) is None


def test_there_is_no_start_along_negative_curvature_for_a_definite_solver() -> None:
    assert start(lambda v: -v, vector(), vector(seed=1), definite=True) is None
    assert start(lambda v: -v, vector(), vector(seed=1)) is not None


# ---- inner products, norms and readings


def test_inner_products_are_accumulated_in_float64() -> None:
    # 2**24 + 1 is no float32.
    assert dot(torch.tensor([4096.0, 1.0]), torch.tensor([4096.0, 1.0])).item() == 2**24 + 1


@both_dtypes
@pytest.mark.parametrize("n", [1, 8, 2**15, 2**15 + 1, 10**5])
def test_inner_product_of_any_length(n: int, dtype: torch.dtype) -> None:
    a, b = vector(n).to(dtype), vector(n, 1).to(dtype)
    for one, other in ((a, b), (a, a)):
        got = dot(one, other)
        assert got.dtype == F64
        torch.testing.assert_close(got, (one.double() * other.double()).sum(), rtol=1e-6, atol=1e-3)


def test_length_is_that_of_entries_of_any_size() -> None:
    v = torch.tensor([3e30, 4e30])
    assert length(v) == pytest.approx(5e30)
    assert math.isinf(torch.dot(v, v).item())


def test_norm_is_of_the_dtype_of_its_vector() -> None:
    got = norm(torch.tensor([3.0, 4.0]))
    assert (got.item(), got.dtype) == (5.0, torch.float32)


def test_readings_are_numbers_as_they_are() -> None:
    got = read([torch.tensor(1 / 3), torch.tensor(1 / 3, dtype=F64), torch.tensor(math.nan), torch.tensor(math.inf)])
    assert got[:2] == [torch.tensor(1 / 3).item(), 1 / 3]
    assert math.isnan(got[2])
    assert got[3] == math.inf


def test_an_accelerator_is_read_less_often() -> None:
    assert steps_between_readings(torch.zeros(3)) == 1
    assert steps_between_readings(torch.zeros(3, device="meta")) > 1
