import math

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64, orthogonal, symmetric
from tests.support.systems import Counted, spd, times, vector
from tune_implicit.hypergradients.solvers.spectrum import random_direction, spectrum, track


def random_systems(n: int = 100, seeds: int = 50) -> list[tuple[Tensor, float]]:
    """Dense matrices of several kinds of spectrum, with their largest eigenvalue."""
    systems = []
    for seed in range(seeds):
        x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
        for values in (
            torch.logspace(0, -1, n, dtype=F64),
            torch.logspace(0, -4, n, dtype=F64),
            torch.linspace(0.01, 1, n, dtype=F64),
            torch.linalg.eigvalsh(x @ x.T / n),
        ):
            systems.append((symmetric(values, seed + 100), values.max().item()))
    return systems


# ---- the Lanczos process


@pytest.mark.parametrize("seed", range(5))
def test_ritz_values_of_the_whole_krylov_space_are_the_eigenvalues(seed: int) -> None:
    h = symmetric(torch.tensor([3.0, 2.5, 1.0, 0.2, -0.7, -2.0], dtype=F64), seed)
    got = spectrum(times(h), vector(6, seed), 6)
    assert got.lambda_min == pytest.approx(-2.0, rel=1e-12)
    assert got.lambda_max == pytest.approx(3.0, rel=1e-12)
    assert got.bound == pytest.approx(3.0, rel=1e-12)
    torch.testing.assert_close(h @ got.top, 3.0 * got.top, rtol=0, atol=1e-12)
    assert got.top.norm().item() == pytest.approx(1.0)


def test_few_steps_see_the_spectrum_from_inside() -> None:
    for h, largest in random_systems(40, seeds=10):
        smallest = torch.linalg.eigvalsh(h)[0].item()
        got = spectrum(times(h), random_direction(h[0]), 6)
        assert smallest * (1 - 1e-12) <= got.lambda_min <= got.lambda_max <= largest * (1 + 1e-12)


def test_bound_is_no_less_than_the_largest_eigenvalue_to_some_percent() -> None:
    too_low = [
        (got.bound / largest, seed)
        for seed, (h, largest) in enumerate(random_systems())
        if (got := spectrum(times(h), random_direction(h[0]), 10)).bound < 0.95 * largest
    ]
    assert not too_low


def test_an_eigenvalue_lies_within_the_bound_of_the_ritz_value() -> None:
    for h, _ in random_systems(40, seeds=10):
        got = spectrum(times(h), random_direction(h[0]), 6)
        distance = (torch.linalg.eigvalsh(h) - got.lambda_max).abs().min().item()
        assert distance <= got.bound - got.lambda_max + 1e-12


def test_a_step_costs_one_product() -> None:
    for steps, expected in ((1, 1), (5, 5), (99, 8)):
        hvp = Counted(spd())
        spectrum(hvp, vector(), steps)
        assert hvp.count == expected


def test_start_at_an_eigenvector_stops_early() -> None:
    values = torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=F64)
    hvp = Counted(symmetric(values))
    got = spectrum(hvp, orthogonal(4, 4)[:, 1], 4)
    assert hvp.count == 1
    assert (got.lambda_min, got.lambda_max, got.bound) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_few_distinct_eigenvalues_stop_early(dtype: torch.dtype) -> None:
    h = torch.tensor([2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.5, 2.0], dtype=dtype).diag()
    hvp = Counted(h)
    got = spectrum(hvp, vector().to(dtype), 8)
    assert hvp.count <= 3
    assert (got.lambda_min, got.lambda_max) == pytest.approx((0.5, 2.0), rel=1e-5)


def test_zero_matrix() -> None:
    got = spectrum(torch.zeros_like, vector(), 10)
    assert (got.lambda_min, got.lambda_max, got.bound) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("good_products", [0, 2])
def test_product_that_is_not_finite(bad: float, good_products: int) -> None:
    hvp = Counted(spd())
    got = spectrum(lambda v: hvp(v) if hvp.count < good_products else torch.full_like(v, bad), vector(), 10)
    assert all(map(math.isnan, (got.lambda_min, got.lambda_max, got.bound)))


def test_float32_agrees_with_float64() -> None:
    h = spd(50, 1e3)
    double, single = (spectrum(times(h.to(dtype)), vector(50).to(dtype), 10) for dtype in (F64, torch.float32))
    assert single.top.dtype == torch.float32
    assert single.lambda_max == pytest.approx(double.lambda_max, rel=1e-5)
    assert single.bound == pytest.approx(double.bound, rel=1e-4)


def test_random_direction_is_the_same_on_every_call_and_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    one, other = (random_direction(torch.empty(5, dtype=dtype)) for dtype in (F64, torch.float32))
    torch.testing.assert_close(one.float(), other)
    assert other.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


# ---- following it


def test_track_follows_a_matrix_that_moves_a_little() -> None:
    h = symmetric(torch.tensor([3.0, 1.5, 1.0, 0.5, 0.2, 0.1], dtype=F64))
    top = spectrum(times(h), vector(6), 6).top
    for seed in range(20):
        change = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)
        h = h + 0.01 * (change + change.T)
        hvp = Counted(h)
        got = track(hvp, top)
        top = got.top
        assert hvp.count == 1
        largest = torch.linalg.eigvalsh(h)[-1].item()
        assert got.lambda_max <= largest * (1 + 1e-12)
        assert largest <= got.bound <= 1.1 * largest
        assert top.norm().item() == pytest.approx(1.0)


def test_track_at_a_matrix_that_is_the_same() -> None:
    h = symmetric(torch.tensor([3.0, 1.5, 1.0, 0.5], dtype=F64))
    got = track(times(h), spectrum(times(h), vector(4), 4).top)
    assert (got.lambda_max, got.bound) == pytest.approx((3.0, 3.0), rel=1e-10)
