import math

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64, symmetric
from tests.support.systems import ITERATIVE, Counted, Says, saved_and_loaded, spd, times, vector
from tune_implicit.hypergradients.inverse_hvp import InverseHvp
from tune_implicit.hypergradients.settings import SOLVERS, SolverSettings
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status

CPU = torch.device("cpu")
each_solver = pytest.mark.parametrize("solver", SOLVERS)
each_iterative = pytest.mark.parametrize("solver", ITERATIVE)


def make(solver: object = "cg", k: int = 500, ll_learning_rate: float = 1.0, **arguments: object) -> InverseHvp:
    return InverseHvp(SolverSettings(solver=solver, ll_learning_rate=ll_learning_rate, k=k, **arguments))


def count_of(one: InverseHvp, h: Tensor, b: Tensor) -> int:
    """Solve, and return the products taken."""
    hvp = Counted(h)
    assert not one.solve(hvp, b).status.failed
    return hvp.count


def assert_same(got: Solution, expected: Solution) -> None:
    assert torch.equal(got.v, expected.v)
    assert (got.status, got.steps) == (expected.status, expected.steps)
    assert got.residual_norm == pytest.approx(expected.residual_norm, rel=0, abs=0, nan_ok=True)


INDEFINITE = symmetric(torch.tensor([1.5, 1.3, 1.1, 0.9, 0.7, 0.5, 0.3, -0.2], dtype=F64))


# ---- one solve after another


@each_solver
def test_every_solve_matches_the_dense_one(solver: str) -> None:
    one = make(solver, k=2000, warm_start=True, preconditioner_memory=4 if solver == "cg" else 0)
    for seed in range(5):
        h, b = spd(seed=seed), vector(seed=seed)
        got = one.solve(times(h), b)
        assert got.status is Status.CONVERGED
        torch.testing.assert_close(got.v, torch.linalg.solve(h, b), rtol=0, atol=1e-8)


@each_iterative
def test_warm_start_takes_fewer_steps_on_a_repeated_system(solver: str) -> None:
    one, h, b = make(solver, warm_start=True), spd(40), vector(40)
    first = count_of(one, h, b)
    assert count_of(one, h, b) <= 3 < first
    # Also where the right-hand side has another scale, or the matrix has moved a little.
    assert count_of(one, h, -1e3 * b) < first / 2
    assert count_of(one, 1.0001 * h + 1e-6 * spd(40, seed=3), b) < first


@each_iterative
def test_without_a_warm_start_each_solve_is_the_first(solver: str) -> None:
    one, h, b = make(solver), spd(40), vector(40)
    assert_same(one.solve(times(h), b), one.solve(times(h), b))


@each_iterative
@pytest.mark.parametrize("b", [vector(6), vector().float()], ids=["shape", "dtype"])
def test_warm_start_of_another_kind_is_dropped(solver: str, b: Tensor) -> None:
    warm, cold = make(solver, warm_start=True, verify=True), make(solver, verify=True)
    warm.solve(times(spd()), vector())
    h = spd(len(b), seed=1).to(b.dtype)
    assert_same(warm.solve(times(h), b), cold.solve(times(h), b))


@each_iterative
def test_no_step_does_not_start_anywhere(solver: str) -> None:
    warm, cold = make(solver, k=0, warm_start=True), make(solver, k=0)
    for seed in range(3):
        hvp = Counted(spd())
        b = vector(seed=seed)
        assert_same(warm.solve(hvp, b), cold.solve(times(spd()), b))
        assert hvp.count == 0


@pytest.mark.parametrize("memory", [0, 4])
def test_a_failed_solve_is_forgotten(memory: int) -> None:
    one, cold = (make("cg", warm_start=warm, preconditioner_memory=memory) for warm in (True, False))
    one.solve(times(spd()), vector())
    assert one.solve(times(INDEFINITE), vector()).status is Status.NEGATIVE_CURVATURE
    assert one.state_dict() == {"v": None, "top": None, "preconditioner": {} if memory else None}
    assert_same(one.solve(times(spd()), vector()), cold.solve(times(spd()), vector()))


def test_a_preconditioner_that_fails_is_forgotten_and_the_solve_done_without() -> None:
    one, cold = make("cg", preconditioner_memory=4), make("cg")
    one.solve(times(spd()), vector())
    pairs = one.state_dict()["preconditioner"]
    # Its last direction now has a curvature that is zero to rounding.
    bad = {"s": pairs["s"], "y": -pairs["y"], "largest": pairs["largest"]}
    one.load_state_dict({"v": None, "top": None, "preconditioner": bad}, torch.device("cpu"))
    got, expected = one.solve(times(spd()), vector()), cold.solve(times(spd()), vector())
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, expected.v)


@each_solver
@pytest.mark.parametrize("factor", [-3.0, 0.0, math.nan])
def test_what_the_caller_does_to_an_answer_spoils_none_after_it(solver: str, factor: float) -> None:
    one, h, b = make(solver, warm_start=True), spd(), vector()
    one.solve(times(h), b).v.mul_(factor)
    torch.testing.assert_close(one.solve(times(h), b).v, torch.linalg.solve(h, b), rtol=0, atol=1e-8)


@each_solver
def test_right_hand_side_is_left_as_it_was(solver: str) -> None:
    one, b = make(solver, warm_start=True, verify=True, damping=0.1), vector()
    for _ in range(2):
        one.solve(times(spd()), b)
    assert torch.equal(b, vector())


def test_a_warm_start_on_a_singular_matrix_is_no_failure() -> None:
    # What is left of `b` is its part in the kernel, which no step takes down: measured from the start, nothing moves.
    h = torch.cat([torch.zeros(10), torch.logspace(-1, 0, 40)])
    one, b = make("neumann", 20, 1.0, warm_start=True), vector(50).float()
    assert {one.solve(lambda v: h * v, b).status for _ in range(30)} <= {Status.MAX_STEPS, Status.STAGNATED}


def test_noise_is_a_tolerance() -> None:
    h, b = spd(40, 1e3), vector(40)
    got = make().solve(times(h), b, noise=1e-2)
    assert got.status is Status.CONVERGED
    assert 1e-4 < got.residual_norm < 1e-2


def test_solver_object_is_given_the_warm_start() -> None:
    given = []

    class Remembers(Says):
        def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
            given.append(v0)
            return super().solve(hvp, b, v0)

    one = make(Remembers(0.0), warm_start=True)
    one.solve(times(spd()), vector())
    one.solve(times(spd()), vector(seed=1))
    assert given[0] is None
    assert torch.equal(given[1], vector())


# ---- the step size of the series


def auto(k: int = 3000, **arguments: object) -> InverseHvp:
    # A thousand times what converges.
    return make("neumann", k, ll_learning_rate=1e3 * 2 / 1.9, step_size="auto", **arguments)


def test_automatic_step_size_where_the_learning_rate_is_far_too_large() -> None:
    h, b = spd(40), vector(40)
    assert make("neumann", ll_learning_rate=1e3).solve(times(h), b).status is Status.DIVERGED
    got = auto().solve(times(h), b)
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, torch.linalg.solve(h, b), rtol=0, atol=1e-8)


def test_automatic_step_size_costs_ten_products_and_then_one_each() -> None:
    one, hvp = auto(), Counted(spd(40))
    for estimate in (10, 1, 1):
        hvp.count = 0
        got = one.solve(hvp, vector(40))
        assert hvp.count == got.steps + estimate


def test_automatic_step_size_of_a_zero_right_hand_side_costs_nothing() -> None:
    hvp = Counted(spd())
    assert auto().solve(hvp, 0 * vector()).status is Status.CONVERGED
    assert hvp.count == 0


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e4])
def test_automatic_step_size_converges_on_every_system(condition: float) -> None:
    # A bound that is too low by 5% gives a series that diverges.
    failed = []
    for seed in range(100):
        h, b = spd(100, condition, seed + 100), vector(100, seed + 5000)
        if auto(k=100).solve(times(h), b).status.failed:
            failed.append(seed)
    assert not failed


def grown_in_another_direction(h: Tensor, factor: float) -> Tensor:
    """``h``, its smallest eigenvalue made ``factor`` times its largest."""
    values, vectors = torch.linalg.eigh(h)
    return h + factor * values[-1] * torch.outer(vectors[:, 0], vectors[:, 0])


@pytest.mark.parametrize("growth", ["in all", "in another direction"])
@pytest.mark.parametrize("warm_start", [False, True])
def test_a_matrix_that_grows_a_hundredfold_is_still_solved(growth: str, warm_start: bool) -> None:
    one, h, b = auto(k=20000, rtol=1e-6, warm_start=warm_start), spd(40), vector(40)
    one.solve(times(h), b)
    h = 100 * h if growth == "in all" else grown_in_another_direction(h, 100.0)
    for _ in range(2):
        got = one.solve(times(h), b)
        assert got.status is Status.CONVERGED
        torch.testing.assert_close(got.v, torch.linalg.solve(h, b), rtol=0, atol=1e-4)


def test_with_a_fallback_the_step_size_is_estimated_anew_too() -> None:
    one, h, b = auto(k=20000, fallback=True), spd(40), vector(40)
    one.solve(times(h), b)
    grown = grown_in_another_direction(h, 100.0)
    for _ in range(2):
        # The series alone is enough.
        assert [attempt.solver for attempt in one.solve(times(grown), b).attempts] == ["neumann"]


def test_a_step_size_may_be_given() -> None:
    b = vector()
    got = make("neumann", 0, step_size=0.25).solve(times(spd()), b)
    torch.testing.assert_close(got.v, 0.25 * b)


@pytest.mark.parametrize("h", [-spd(), torch.zeros(8, 8, dtype=F64), math.nan * spd()], ids=["-", "0", "nan"])
def test_no_positive_curvature_is_a_status(h: Tensor) -> None:
    one = auto()
    for _ in range(2):
        assert one.solve(times(h), vector()).status.failed
    assert one.solve(times(spd()), vector()).status is Status.CONVERGED


def test_automatic_step_size_of_another_shape() -> None:
    one = auto()
    for n in (8, 12):
        assert one.solve(times(spd(n)), vector(n)).status is Status.CONVERGED


# ---- damping


@each_solver
def test_damping_is_added_to_the_diagonal(solver: str) -> None:
    h, b = spd(), vector()
    got = make(solver, k=2000, ll_learning_rate=0.5, damping=0.3).solve(times(h), b)
    assert (got.status, got.damping) == (Status.CONVERGED, 0.3)
    torch.testing.assert_close(got.v, torch.linalg.solve(h + 0.3 * torch.eye(8, dtype=F64), b), rtol=0, atol=1e-8)


@each_solver
def test_damping_makes_a_saddle_definite(solver: str) -> None:
    got = make(solver, k=2000, ll_learning_rate=0.5, damping=0.3).solve(times(INDEFINITE), vector())
    assert got.status is Status.CONVERGED
    assert (INDEFINITE @ got.v + 0.3 * got.v - vector()).norm() < 1e-9


def test_automatic_step_size_is_that_of_the_damped_system() -> None:
    h, b = spd(), vector()
    got = auto(damping=30.0).solve(times(h), b)
    torch.testing.assert_close(got.v, torch.linalg.solve(h + 30 * torch.eye(8, dtype=F64), b), rtol=0, atol=1e-10)


def test_damping_of_a_fallback_is_counted_with_it() -> None:
    # With 0.1 on the diagonal the last is a kernel, and `b` lies in it.
    h, b = torch.tensor([1.0, 0.5, -0.1], dtype=F64).diag(), torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    got = make("cg", damping=0.1, fallback=True, verify=True).solve(times(h), b)
    assert [attempt.solver for attempt in got.attempts] == ["cg", "minres", "damped"]
    assert got.damping > 0.1
    torch.testing.assert_close(h @ got.v + got.damping * got.v, b)


# ---- the residual computed anew


@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_verify_replaces_the_bound_of_the_series(k: int) -> None:
    h, b = spd(condition=1e3), vector()
    plain, verified = Counted(h), Counted(h)
    bound, exact = make("neumann", k).solve(plain, b), make("neumann", k, verify=True).solve(verified, b)
    assert verified.count == plain.count + 1
    assert exact.status is Status.MAX_STEPS
    assert exact.residual_norm == pytest.approx((b - h @ exact.v).norm().item(), rel=1e-12)
    assert exact.residual_norm < bound.residual_norm or (k == 0 and math.isnan(bound.residual_norm))


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("condition", [5.0, 1e3, 1e5])
def test_verify_finds_no_fault_with_our_own_solvers(solver: str, condition: float, dtype: torch.dtype) -> None:
    for seed in range(5):
        for k in (1, 8, 2000):
            h, b = spd(12, condition, seed).to(dtype), vector(12, seed).to(dtype)
            got = make(solver, k, tolerance=0.0, verify=True).solve(times(h), b)
            assert not got.status.failed


def test_verify_finds_a_solver_that_lies() -> None:
    h, b = spd(), vector()
    one = make(Says(0.0), verify=True, warm_start=True)
    got = one.solve(times(h), b)
    assert got.status is Status.UNVERIFIED
    assert got.residual_norm == pytest.approx((b - h @ b).norm().item())
    assert one.state_dict()["v"] is None
    assert make(Says(0.0)).solve(times(h), b).status is Status.CONVERGED


def test_verify_finds_an_answer_that_is_not_finite() -> None:
    got = make(Says(0.0, factor=math.nan), verify=True).solve(times(spd()), vector())
    assert got.status is Status.NON_FINITE


def test_verify_forgives_a_residual_that_is_smaller_than_reported() -> None:
    h, b = spd(), vector()
    got = make(Says(1e3), verify=True).solve(times(h), b)
    assert got.status is Status.CONVERGED
    assert got.residual_norm == pytest.approx((b - h @ b).norm().item())


def test_verify_leaves_a_failure_as_it_is() -> None:
    hvp = Counted(spd())
    got = make(Says(0.5, Status.DIVERGED), verify=True).solve(hvp, vector())
    assert (got.status, got.residual_norm, hvp.count) == (Status.DIVERGED, 0.5, 0)


def test_the_scaled_identity_far_too_large_is_not_vouched_for() -> None:
    # No product is taken: only `verify` can tell.
    h, b = spd(), vector()
    assert make("neumann", 0, 1e3, verify=True).solve(times(h), b).status is Status.DIVERGED
    got = make("neumann", 0, 1.0, verify=True).solve(times(h), b)
    assert got.status is Status.MAX_STEPS


# ---- where a solver fails


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_fallback_answers_at_a_saddle(solver: str) -> None:
    got = make(solver, fallback=True).solve(times(INDEFINITE), vector())
    assert [(attempt.solver, attempt.status) for attempt in got.attempts] == [
        (solver, Status.NEGATIVE_CURVATURE),
        ("minres", Status.CONVERGED),
    ]
    torch.testing.assert_close(INDEFINITE @ got.v, vector())


def test_fallback_of_a_solver_object_has_its_class_for_a_name() -> None:
    got = make(Says(0.5, Status.DIVERGED), fallback=True).solve(times(spd()), vector())
    assert [attempt.solver for attempt in got.attempts] == ["Says", "minres"]


def test_fallback_ends_with_the_identity() -> None:
    # No curvature at all: neither MINRES nor the damped system has an answer.
    b = vector()
    got = make("cg", fallback=True, ll_learning_rate=0.25).solve(torch.zeros_like, b)
    assert [attempt.solver for attempt in got.attempts] == ["cg", "minres", "damped", "identity"]
    torch.testing.assert_close(got.v, 0.25 * b)


def test_without_a_failure_the_first_solver_is_the_only_attempt() -> None:
    h, b = spd(), vector()
    got = make("cg", fallback=True).solve(times(h), b)
    assert [attempt.solver for attempt in got.attempts] == ["cg"]
    assert_same(got, make("cg").solve(times(h), b))


def test_nothing_is_tried_after_numbers_that_are_not_finite() -> None:
    got = make("cg", fallback=True).solve(lambda v: math.nan * v, vector())
    assert [attempt.status for attempt in got.attempts] == [Status.NON_FINITE]


# ---- its state

REMEMBERING = {
    "neumann": {"solver": "neumann", "k": 30},
    "auto": {"solver": "neumann", "k": 30, "step_size": "auto"},
    "cg": {"solver": "cg", "k": 7},
    "preconditioned": {"solver": "cg", "k": 7, "preconditioner_memory": 8},
    "minres": {"solver": "minres", "k": 7},
    "dense": {"solver": "dense"},
}


def trajectory(one: InverseHvp, steps: range, dtype: torch.dtype) -> list[Solution]:
    solutions = []
    for step in steps:
        h, b = spd(40) + 0.01 * step * spd(40, seed=1), vector(40) + 0.1 * step * vector(40, 1)
        solutions.append(one.solve(times(h.to(dtype)), b.to(dtype)))
    return solutions


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("arguments", REMEMBERING.values(), ids=REMEMBERING)
def test_state_continues_bit_for_bit(arguments: dict, dtype: torch.dtype) -> None:
    one, loaded = (make(**arguments, warm_start=True) for _ in range(2))
    trajectory(one, range(3), dtype)
    loaded.load_state_dict(saved_and_loaded(one.state_dict()), CPU)
    for got, expected in zip(trajectory(loaded, range(3, 5), dtype), trajectory(one, range(3, 5), dtype), strict=True):
        assert_same(got, expected)


def test_state_of_another_size_is_not_used() -> None:
    one = make("cg", warm_start=True, preconditioner_memory=4)
    one.solve(times(spd(40)), vector(40))
    loaded = make("cg", warm_start=True, preconditioner_memory=4)
    loaded.load_state_dict(one.state_dict(), CPU)
    assert_same(loaded.solve(times(spd()), vector()), make("cg").solve(times(spd()), vector()))


@pytest.mark.parametrize("source", REMEMBERING.values(), ids=REMEMBERING)
@pytest.mark.parametrize("target", REMEMBERING.values(), ids=REMEMBERING)
def test_state_of_another_solver_loads(source: dict, target: dict) -> None:
    one, loaded = (make(**arguments, warm_start=True) for arguments in (source, target))
    trajectory(one, range(2), F64)
    loaded.load_state_dict(saved_and_loaded(one.state_dict()), CPU)
    assert not any(solution.status.failed for solution in trajectory(loaded, range(2), F64))
