import math
import weakref

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64, generator, symmetric
from tests.support.systems import assert_certified, assert_no_worse_than_zero, saved_and_loaded, spd, times, vector
from tune_implicit.hypergradients.solvers import iterative
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.quasi_newton import QuasiNewton
from tune_implicit.hypergradients.solvers.solution import Status

CPU = torch.device("cpu")


def pairs_of_different_matrices(
    m: int = 5, n: int = 12, dtype: torch.dtype = F64, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Directions that are nearly parallel, two by two, each with its product with a matrix of its own."""
    random = torch.randn(m, n, generator=generator(seed), dtype=F64)
    s = [random[i - i % 2] + (0.1 * random[i] if i % 2 else 0) for i in range(m)]
    y = [spd(n, 100.0, 10 * seed + i) @ direction for i, direction in enumerate(s)]
    return [v.to(dtype) for v in s], [v.to(dtype) for v in y]


def learned(s: list[Tensor], y: list[Tensor], memory: int = 20) -> QuasiNewton:
    made = QuasiNewton(memory)
    made.add(s, y)
    return made


def two_loops(s: list[Tensor], y: list[Tensor], r: Tensor) -> Tensor:
    """Nocedal & Wright, Algorithm 7.4."""
    q, alphas = r.clone(), []
    for one, image in zip(reversed(s), reversed(y), strict=True):
        alphas.append((one @ q) / (one @ image))
        q -= alphas[-1] * image
    q *= (s[-1] @ y[-1]) / (y[-1] @ y[-1])
    for one, image, alpha in zip(s, y, reversed(alphas), strict=True):
        q += (alpha - (image @ q) / (one @ image)) * one
    return q


# ---- the approximation


@pytest.mark.parametrize("m", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(5))
def test_apply_is_the_two_loop_recursion(m: int, seed: int) -> None:
    s, y = pairs_of_different_matrices(m, seed=seed)
    r = vector(12, seed + 50)
    torch.testing.assert_close(learned(s, y).apply(r), two_loops(s, y, r), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("seed", range(10))
def test_symmetric_and_positive_definite(seed: int, dtype: torch.dtype) -> None:
    made = learned(*pairs_of_different_matrices(8, dtype=dtype, seed=seed))
    matrix = torch.stack([made.apply(column) for column in torch.eye(12, dtype=dtype)]).to(F64)
    precision = 1e4 * torch.finfo(dtype).eps
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=precision * matrix.norm().item())
    values, vectors = torch.linalg.eigh(matrix)
    # Along its flattest directions rounding shows first.
    for r in (*vectors.T, *torch.randn(50, 12, generator=generator(seed), dtype=F64)):
        assert r @ made.apply(r.to(dtype)).to(F64) > 0
    assert values[-1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_secant_condition_of_the_last_pair(dtype: torch.dtype) -> None:
    for seed in range(10):
        s, y = pairs_of_different_matrices(dtype=dtype, seed=seed)
        torch.testing.assert_close(learned(s, y).apply(y[-1]), s[-1], rtol=0, atol=1e4 * torch.finfo(dtype).eps)


def test_conjugate_directions_of_one_matrix_give_its_inverse() -> None:
    h = spd(6)
    made = QuasiNewton(6)
    ConjugateGradient(6, tolerance=0.0, preconditioner=made).solve(times(h), vector(6))
    matrix = torch.stack([made.apply(column) for column in torch.eye(6, dtype=F64)])
    torch.testing.assert_close(matrix, torch.linalg.inv(h), rtol=0, atol=1e-9)


def test_lengths_of_the_directions_do_not_matter() -> None:
    s, y = pairs_of_different_matrices()
    factors = [1e-9, 1e3, 1.0, 7.0, 1e9]
    scaled = learned(*([f * v for f, v in zip(factors, vectors, strict=True)] for vectors in (s, y)))
    torch.testing.assert_close(scaled.apply(vector(12)), learned(s, y).apply(vector(12)))


def test_without_pairs_it_is_the_identity() -> None:
    assert torch.equal(QuasiNewton(3).apply(vector()), vector())


# ---- the pairs


def test_memory_is_bounded_and_holds_the_latest() -> None:
    made = QuasiNewton(3)
    s, y = pairs_of_different_matrices(10)
    for index in range(0, 10, 2):
        made.add(s[index : index + 2], y[index : index + 2])
    torch.testing.assert_close(made.apply(vector(12)), two_loops(s[-3:], y[-3:], vector(12)), rtol=1e-9, atol=1e-9)
    state = made.state_dict()
    assert [len(state[name]) for name in ("s", "y")] == [3, 3]


def test_state_holds_no_more_memory_than_its_pairs() -> None:
    made = learned(*pairs_of_different_matrices(10), memory=2)
    state = made.state_dict()
    assert all(state[name].untyped_storage().nbytes() == 2 * 12 * 8 for name in ("s", "y"))


def test_a_solve_holds_no_more_products_than_the_memory() -> None:
    h, products, held = spd(60, 1e4), [], []

    def hvp(v: Tensor) -> Tensor:
        held.append(sum(product() is not None for product in products))
        image = h @ v
        products.append(weakref.ref(image))
        return image

    ConjugateGradient(40, 0.0, preconditioner=QuasiNewton(2)).solve(hvp, vector(60))
    assert len(held) == 40
    assert max(held) <= 2 + 2  # the last one and the one before it are still in use


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
def test_bad_pairs_are_dropped(bad: float) -> None:
    s, y = pairs_of_different_matrices(3)
    made = learned([s[0], s[1], s[2]], [y[0], bad * s[1], y[2]])
    expected = learned([s[0], s[2]], [y[0], y[2]])
    assert torch.equal(made.apply(vector(12)), expected.apply(vector(12)))


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0])
def test_only_bad_pairs_leave_it_as_it_was(bad: float) -> None:
    s, y = pairs_of_different_matrices(3)
    made, before = learned(s, y), learned(s, y).apply(vector(12))
    made.add([vector(12, 1)], [bad * vector(12, 1)])
    assert torch.equal(made.apply(vector(12)), before)
    made.clear()
    made.add([vector(12, 1)], [bad * vector(12, 1)])
    assert not made.fits(vector(12))


def test_zero_direction_is_dropped() -> None:
    made = QuasiNewton(3)
    made.add([torch.zeros(12, dtype=F64)], [vector(12)])
    assert not made.fits(vector(12))


def test_nothing_fits_once_shape_or_dtype_has_changed() -> None:
    made = learned(*pairs_of_different_matrices())
    assert made.fits(vector(12))
    assert not made.fits(vector(11))
    assert not made.fits(vector(12).float())
    assert not made.fits(torch.empty(12, dtype=F64, device="meta"))
    made.clear()
    assert not made.fits(vector(12))


@pytest.mark.parametrize("other", [vector(5), vector(12).float()], ids=["shape", "dtype"])
def test_pairs_of_another_kind_replace_those_before(other: Tensor) -> None:
    made = learned(*pairs_of_different_matrices())
    made.add([other], [2 * other])
    assert made.fits(other)
    torch.testing.assert_close(made.apply(other), other / 2)


def test_state_round_trip() -> None:
    made = learned(*pairs_of_different_matrices())
    loaded = QuasiNewton(20)
    loaded.load_state_dict(saved_and_loaded(made.state_dict()), CPU)
    assert torch.equal(loaded.apply(vector(12)), made.apply(vector(12)))


def test_state_of_a_larger_memory_keeps_the_latest_pairs() -> None:
    s, y = pairs_of_different_matrices()
    loaded = QuasiNewton(2)
    loaded.load_state_dict(learned(s, y).state_dict(), CPU)
    torch.testing.assert_close(loaded.apply(vector(12)), learned(s[-2:], y[-2:]).apply(vector(12)))


def test_empty_state_round_trip() -> None:
    loaded = learned(*pairs_of_different_matrices())
    loaded.load_state_dict(saved_and_loaded(QuasiNewton(3).state_dict()), CPU)
    assert not loaded.fits(vector(12))


# ---- in conjugate gradient


def solve_two(made: QuasiNewton | None, dtype: torch.dtype = F64) -> tuple:
    """Solve a system, then one slightly changed; return the second and its solution."""
    solver = ConjugateGradient(500, tolerance=0.0, rtol=1e-4 if dtype == torch.float32 else 1e-9, preconditioner=made)
    h, change = spd(60, 1e3), symmetric(torch.linspace(0, 1e-3, 60, dtype=F64), seed=9)
    solver.solve(times(h.to(dtype)), vector(60).to(dtype))
    h, b = (h + change).to(dtype), (vector(60) + 0.1 * vector(60, 1)).to(dtype)
    return h, b, solver.solve(times(h), b)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("memory", [1, 5, 20, 60])
def test_preconditioned_answer_is_the_dense_one(memory: int, dtype: torch.dtype) -> None:
    h, b, got = solve_two(QuasiNewton(memory), dtype)
    assert got.status is Status.CONVERGED
    assert_certified(got, h, b)
    if dtype == F64:
        torch.testing.assert_close(got.v, torch.linalg.solve(h, b), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_slightly_changed_system_takes_fewer_steps(dtype: torch.dtype) -> None:
    plain, some, many = (solve_two(made, dtype)[2].steps for made in (None, QuasiNewton(20), QuasiNewton(60)))
    assert many <= 0.6 * plain
    assert many < some < plain


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("k", [0, 1, 2, 5, 12])
def test_truncated_it_is_never_worse_than_zero(k: int, dtype: torch.dtype) -> None:
    for seed in range(10):
        made = learned(*pairs_of_different_matrices(dtype=dtype, seed=seed))
        h, b = spd(12, 1e4, seed + 500).to(dtype), vector(12, seed).to(dtype)
        got = ConjugateGradient(k, preconditioner=made).solve(times(h), b)
        assert not got.status.failed
        assert_no_worse_than_zero(got, h, b)
        assert_certified(got, h, b)


def test_negative_curvature_is_still_found() -> None:
    values = torch.tensor([1.5, 1.0, 0.5, 0.3, -0.2], dtype=F64)
    for seed in range(10):
        made = learned(*pairs_of_different_matrices(3, 5, seed=seed))
        h, b = symmetric(values, seed), vector(5, seed)
        got = ConjugateGradient(100, preconditioner=made).solve(times(h), b)
        assert got.status is Status.NEGATIVE_CURVATURE
        assert_certified(got, h, b)


def test_reading_norms_in_windows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # The pairs of steps past the end must not be learned.
    _, _, one_by_one = solve_two(QuasiNewton(8))
    monkeypatch.setattr(iterative, "steps_between_readings", lambda b: 4)
    _, _, in_windows = solve_two(QuasiNewton(8))
    assert torch.equal(in_windows.v, one_by_one.v)
    assert (in_windows.steps, in_windows.residual_norm) == (one_by_one.steps, one_by_one.residual_norm)


def test_pairs_that_do_not_fit_are_not_used() -> None:
    h, b = spd(), vector()
    made = learned(*pairs_of_different_matrices())  # of 12 entries, not 8
    plain, got = (ConjugateGradient(5, preconditioner=one).solve(times(h), b) for one in (None, made))
    assert torch.equal(got.v, plain.v)
    assert made.fits(b)


def test_curvatures_lie_in_the_spectrum() -> None:
    h, _, got = solve_two(QuasiNewton(20))
    values = torch.linalg.eigvalsh(h)
    assert values[0] * (1 - 1e-9) <= got.lambda_min <= got.lambda_max <= values[-1] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        (0, ValueError, "`memory` must be 1 or more, got 0"),
        (-2, ValueError, "`memory` must be 1 or more, got -2"),
        (1.5, TypeError, "`memory` must be an integer, got 1.5"),
        (True, TypeError, "`memory` must be an integer, got True"),
    ],
)
def test_messages(memory: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuasiNewton(memory)
