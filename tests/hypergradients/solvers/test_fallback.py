import math

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64, symmetric
from tests.support.systems import Counted, assert_certified, spd, times, vector
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.fallback import Damped, Fallback
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.neumann import NeumannSeries
from tune_implicit.hypergradients.solvers.solution import Attempt, Hvp, Solution, Status

CG = ConjugateGradient(500)


class Ends:
    """A solver that ends as it is told, and remembers what it was given."""

    def __init__(self, status: Status, last: float | None = None, residual: float = 0.5) -> None:
        self.status = status
        self.last = last
        self.residual = residual
        self.given: list[Tensor | None] = []

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        self.given.append(v0)
        return Solution(b if self.last is None else torch.full_like(b, self.last), self.status, 7, self.residual)


# ---- damping


@pytest.mark.parametrize("seed", range(10))
def test_indefinite_becomes_definite(seed: int) -> None:
    h, b = symmetric(torch.tensor([1.5, 1.0, 0.5, 0.3, 0.1, -0.2], dtype=F64), seed), vector(6, seed)
    got = Damped(CG).solve(times(h), b)
    damped = h + got.damping * torch.eye(6, dtype=F64)
    assert got.status is Status.CONVERGED
    assert 0.2 < got.damping < 1
    torch.testing.assert_close(got.v, torch.linalg.solve(damped, b), rtol=0, atol=1e-8)
    assert_certified(got, damped, b)


def test_larger_than_the_lanczos_process_indefinite_becomes_definite() -> None:
    values = torch.logspace(0, -3, 100, dtype=F64)
    values[-10:] *= -50
    for seed in range(20):
        h, b = symmetric(values, seed), vector(100, seed)
        got = Damped(CG).solve(times(h), b)
        assert torch.linalg.eigvalsh(h)[0] + got.damping > 0
        torch.testing.assert_close(h @ got.v + got.damping * got.v, b, rtol=0, atol=1e-8)


def test_negative_definite_becomes_definite() -> None:
    h, b = -spd(), vector()
    got = Damped(CG).solve(times(h), b)
    assert got.status is Status.CONVERGED
    assert torch.linalg.eigvalsh(h)[0] + got.damping > 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_definite_and_well_conditioned_is_not_damped(dtype: torch.dtype) -> None:
    h, b = spd(condition=20.0).to(dtype), vector().to(dtype)
    got = Damped(CG).solve(times(h), b)
    assert got.damping == 0
    assert torch.equal(got.v, CG.solve(times(h), b).v)


def test_definite_and_ill_conditioned_is_damped_a_little() -> None:
    h, b = spd(condition=1e6), vector()
    got = Damped(CG).solve(times(h), b)
    assert 0 < got.damping <= 0.01 * 1.9
    assert torch.linalg.cond(h + got.damping * torch.eye(8, dtype=F64)) < 110


def test_singular_and_inconsistent_has_an_answer_once_damped() -> None:
    h = torch.tensor([1.0, 0.5, 0.0], dtype=F64).diag()
    got = Damped(CG).solve(times(h), torch.ones(3, dtype=F64))
    assert got.status is Status.CONVERGED
    assert got.damping == pytest.approx(0.01)


def test_damping_passes_the_warm_start_on() -> None:
    inner = Ends(Status.CONVERGED)
    Damped(inner).solve(times(spd()), vector(), vector(seed=1))
    assert torch.equal(inner.given[0], vector(seed=1))


def test_damping_of_zero_right_hand_side_costs_nothing() -> None:
    hvp = Counted(spd())
    got = Damped(CG).solve(hvp, torch.zeros(8, dtype=F64))
    assert (got.status, hvp.count, got.damping) == (Status.CONVERGED, 0, 0.0)


def test_damping_costs_ten_products() -> None:
    plain, damped = Counted(spd(40)), Counted(spd(40))
    CG.solve(plain, vector(40))
    Damped(CG).solve(damped, vector(40))
    assert damped.count == plain.count + 10


def test_damping_cannot_mend_what_is_not_finite() -> None:
    assert Damped(CG).solve(lambda v: math.nan * v, vector()).status is Status.NON_FINITE
    assert Damped(CG).solve(times(spd()), math.nan * vector()).status is Status.NON_FINITE


def test_a_zero_matrix_cannot_be_lifted() -> None:
    assert Damped(CG).solve(torch.zeros_like, vector()).status.failed


# ---- one after the other


def test_first_answer_ends_the_chain() -> None:
    last = Ends(Status.CONVERGED)
    got = Fallback({"one": Ends(Status.DIVERGED), "two": Ends(Status.MAX_STEPS), "three": last}).solve(
        times(spd()), vector()
    )
    assert got.attempts == (Attempt("one", Status.DIVERGED, 7), Attempt("two", Status.MAX_STEPS, 7))
    assert got.status is Status.MAX_STEPS
    assert not last.given


def test_last_failure_is_returned() -> None:
    solvers = {"one": Ends(Status.DIVERGED), "two": Ends(Status.NEGATIVE_CURVATURE)}
    got = Fallback(solvers).solve(times(spd()), vector())
    assert got.status is Status.NEGATIVE_CURVATURE
    assert [attempt.solver for attempt in got.attempts] == ["one", "two"]


def test_what_is_not_finite_ends_the_chain() -> None:
    last = Ends(Status.CONVERGED)
    got = Fallback({"one": Ends(Status.NON_FINITE), "two": last}).solve(times(spd()), vector())
    assert got.status is Status.NON_FINITE
    assert got.attempts == (Attempt("one", Status.NON_FINITE, 7),)
    assert not last.given


def test_each_starts_from_where_the_one_before_it_failed() -> None:
    one, two = Ends(Status.DIVERGED), Ends(Status.CONVERGED)
    v0, b = vector(seed=1), vector()
    Fallback({"one": one, "two": two}).solve(times(spd()), b, v0)
    assert one.given[0] is v0
    assert two.given[0] is b  # which is what such a solver returns


@pytest.mark.parametrize("last", [0.0, math.nan, math.inf])
def test_what_is_no_place_to_start_from_is_not_passed_on(last: float) -> None:
    one, two = Ends(Status.DIVERGED, last), Ends(Status.CONVERGED)
    v0 = vector(seed=1)
    Fallback({"one": one, "two": two}).solve(times(spd()), vector(), v0)
    assert two.given[0] is v0


def test_a_truncated_solve_that_found_nothing_is_no_answer() -> None:
    got = Fallback({"cg": ConjugateGradient(0), "minres": Minres(3)}).solve(times(spd()), vector())
    assert [attempt.solver for attempt in got.attempts] == ["cg", "minres"]
    assert got.v.any()


def test_a_doubtful_answer_is_left_for_a_good_one() -> None:
    b = vector()
    large, small = 3 * b.norm().item(), 1.9 * b.norm().item()
    doubtful, good = Ends(Status.MAX_STEPS, residual=large), Ends(Status.MAX_STEPS, residual=small)
    got = Fallback({"one": doubtful, "two": good}).solve(times(spd()), b)
    assert (got.residual_norm, [attempt.solver for attempt in got.attempts]) == (small, ["one", "two"])
    assert good.given[0] is None  # a doubtful place is none to start from


@pytest.mark.parametrize("failure", [Status.DIVERGED, Status.NON_FINITE])
def test_the_least_doubtful_answer_is_better_than_none(failure: Status) -> None:
    b = vector()
    one, two = (Ends(Status.MAX_STEPS, residual=factor * b.norm().item()) for factor in (3.0, 4.0))
    got = Fallback({"one": one, "two": two, "three": Ends(failure)}).solve(times(spd()), b)
    assert got.residual_norm == one.residual
    assert [attempt.solver for attempt in got.attempts] == ["two", "three", "one"]


def test_cg_near_a_singular_system_is_left_for_minres() -> None:
    h, b = symmetric(torch.tensor([1.0, 1e-4, -1.0], dtype=F64)), vector(3)
    got = Fallback({"cg": ConjugateGradient(1), "minres": Minres(1)}).solve(times(h), b)
    assert got.residual_norm <= 2 * b.norm()


def test_a_saddle_is_solved_by_the_next() -> None:
    h, b = symmetric(torch.tensor([1.5, 1.0, 0.5, -0.2], dtype=F64)), vector(4)
    got = Fallback({"cg": CG, "minres": Minres(100)}).solve(times(h), b)
    assert [attempt.status for attempt in got.attempts] == [Status.NEGATIVE_CURVATURE, Status.CONVERGED]
    torch.testing.assert_close(got.v, torch.linalg.solve(h, b))


def test_damping_of_the_solver_that_answered_is_kept() -> None:
    h, b = symmetric(torch.tensor([1.5, 1.0, 0.5, -0.2], dtype=F64)), vector(4)
    got = Fallback({"neumann": NeumannSeries(1.0, 500), "damped": Damped(CG)}).solve(times(h), b)
    assert got.damping > 0.2
    torch.testing.assert_close(h @ got.v + got.damping * got.v, b)


def test_message_of_no_solvers() -> None:
    with pytest.raises(ValueError, match="`solvers` must hold at least one solver, got none"):
        Fallback({})
