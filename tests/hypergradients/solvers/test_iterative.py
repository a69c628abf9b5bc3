"""The driver: what it does for every iterative method, and what a recursion may leave to it."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, field

import pytest
import torch
from torch import Tensor

from tests.support.problems import F64
from tests.support.systems import ITERATIVE, Counted, assert_certified, named_solver, spd, times, vector
from tune_implicit.hypergradients.solvers import iterative
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.iterative import IterativeSolver, Recursion, System
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.neumann import NeumannSeries
from tune_implicit.hypergradients.solvers.solution import Solver, Status

each_method = pytest.mark.parametrize("name", ITERATIVE)


# ---- what a solve costs, and where it stops


@each_method
def test_a_step_costs_one_product(name: str) -> None:
    hvp = Counted(spd())
    got = named_solver(name, k=7).solve(hvp, vector())
    assert hvp.count == got.steps == 7


@each_method
def test_a_residual_in_doubt_costs_one_product_more(name: str) -> None:
    hvp = Counted(spd())
    got = named_solver(name, k=5000, tolerance=0.0).solve(hvp, vector())
    assert got.status is Status.STAGNATED
    assert got.steps < hvp.count <= got.steps + 5


@each_method
def test_relative_tolerance(name: str) -> None:
    h, b = spd(40), vector(40)
    got = named_solver(name, tolerance=0.0, rtol=1e-3).solve(times(h), b)
    assert got.status is Status.CONVERGED
    assert 1e-6 < got.residual_norm / b.norm().item() < 1e-3


@each_method
def test_it_stops_at_the_first_residual_below_the_tolerance(name: str) -> None:
    h, b = spd(40), vector(40)
    got = named_solver(name, tolerance=1e-2).solve(times(h), b)
    before = named_solver(name, k=got.steps - 1, tolerance=1e-2).solve(times(h), b)
    assert got.status is Status.CONVERGED
    assert before.status is Status.MAX_STEPS
    assert got.residual_norm < 1e-2 <= before.residual_norm


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_far_past_convergence_nothing_breaks(name: str, dtype: torch.dtype) -> None:
    h, b = spd(condition=5.0).to(dtype), vector().to(dtype)
    got = named_solver(name, k=5000, tolerance=0.0).solve(times(h), b)
    assert got.status is Status.STAGNATED
    assert got.steps < 500
    torch.testing.assert_close(got.v.to(F64), torch.linalg.solve(h.to(F64), b.to(F64)), rtol=0, atol=1e-4)
    assert_certified(got, h, b)


@pytest.mark.parametrize("name", ["cg", "minres"])
def test_no_step_is_zero(name: str) -> None:
    hvp, b = Counted(spd()), vector()
    got = named_solver(name, k=0).solve(hvp, b, vector(seed=1))
    assert (got.status, got.steps, hvp.count) == (Status.MAX_STEPS, 0, 0)
    assert torch.equal(got.v, torch.zeros_like(b))
    assert got.residual_norm == pytest.approx(b.norm().item())


@pytest.mark.parametrize("name", ["cg", "minres"])
def test_residual_has_the_digits_that_the_system_allows(name: str) -> None:
    h, b = spd(), vector()
    got = named_solver(name, k=3).solve(times(h), b)
    assert got.residual_norm == pytest.approx((b - h @ got.v).norm().item(), rel=1e-12)


@each_method
@pytest.mark.parametrize("k", [0, 1, 5, 6, 100])
@pytest.mark.parametrize("lowest", [0.1, 0.0, -0.3, math.nan])
@pytest.mark.parametrize("step_size", [1.0, 1.3])
def test_reading_norms_in_windows_changes_nothing(
    name: str, k: int, lowest: float, step_size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An accelerator reads its norms every few steps: the iterates past the end must leave no trace.
    h = torch.tensor([1.9, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, lowest], dtype=F64)
    solver, b = named_solver(name, k, step_size=step_size), vector()
    one_by_one = solver.solve(lambda v: h * v, b)
    monkeypatch.setattr(iterative, "steps_between_readings", lambda b: 4)
    in_windows = solver.solve(lambda v: h * v, b)
    assert torch.equal(in_windows.v, one_by_one.v)
    assert in_windows.status is one_by_one.status
    assert in_windows.steps == one_by_one.steps
    assert in_windows.residual_norm == pytest.approx(one_by_one.residual_norm, rel=0, abs=0, nan_ok=True)


# ---- where it starts


@each_method
def test_warm_start_goes_on_from_where_it_is(name: str) -> None:
    h, b = spd(), vector()
    start = named_solver(name, k=100).solve(times(h), b).v
    cold, warm = (named_solver(name, k=3).solve(times(h), b, v0) for v0 in (None, start))
    assert (b - h @ warm.v).norm().item() <= warm.residual_norm < 1e-2 * cold.residual_norm


@each_method
def test_warm_start_costs_one_product(name: str) -> None:
    hvp = Counted(spd())
    assert named_solver(name, k=7).solve(hvp, vector(), vector(seed=1)).steps == 7
    assert hvp.count == 8


@each_method
def test_warm_start_is_left_as_it_was(name: str) -> None:
    v0 = vector(seed=1)
    named_solver(name).solve(times(spd()), vector(), v0)
    assert torch.equal(v0, vector(seed=1))


@each_method
def test_non_finite_warm_start(name: str) -> None:
    h, b = spd(), vector()
    got = named_solver(name).solve(times(h), b, torch.full((8,), math.nan, dtype=F64))
    assert got.status is Status.CONVERGED
    torch.testing.assert_close(got.v, torch.linalg.solve(h, b), rtol=0, atol=1e-8)


@each_method
def test_warm_start_whose_rounding_is_as_large_as_b_is_forgotten(name: str) -> None:
    # Along it the multiple of least residual is 1e10, whose float32 rounding is a thousand.
    h, b = torch.tensor([1.0, 1e-10]), torch.ones(2)
    cold, warm = (named_solver(name, k=5).solve(lambda v: h * v, b, v0) for v0 in (None, torch.tensor([0.0, 1.0])))
    assert torch.equal(warm.v, cold.v)
    assert (warm.status, warm.steps, warm.residual_norm) == (cold.status, cold.steps, cold.residual_norm)


# ---- what a recursion leaves to the driver


@dataclass(frozen=True)
class Part(IterativeSolver):
    """A method that goes ``part`` of the way to the solution in one step a run, and does not know its residual."""

    inverse: Tensor
    part: float
    k: int = 50
    tolerance: float = 1e-8
    rtol: float = 0.0
    ends: list = field(default_factory=list)

    def begin(self, system: System) -> Recursion:
        return PartOfTheWay(self, system)


class PartOfTheWay(Recursion):
    def __init__(self, method: Part, system: System) -> None:
        self.method, self.r = method, system.r
        self.x, self.residual, self.largest = torch.zeros_like(system.r), 0.0, 2.0

    def step(self) -> tuple[Tensor, list[Tensor]]:
        return self.method.part * (self.method.inverse @ self.r), [self.r.norm()]

    def judge(self, made: Tensor, scalars: list[float]) -> Status:
        self.x = made
        return Status.STAGNATED

    def end(self, status: Status) -> None:
        self.method.ends.append(status)


H, B = spd(), vector()
INVERSE = torch.linalg.inv(H)


def test_what_a_run_leaves_is_solved_for_by_the_next() -> None:
    hvp = Counted(H)
    got = Part(INVERSE, 0.9).solve(hvp, B)
    assert got.status is Status.CONVERGED
    assert got.steps == hvp.count == math.ceil(math.log10(B.norm().item() / 1e-8))
    assert_certified(got, H, B)


def test_runs_share_the_steps() -> None:
    got = Part(INVERSE, 0.9, k=3).solve(times(H), B)
    assert (got.status, got.steps) == (Status.STAGNATED, 3)
    assert got.residual_norm == pytest.approx(1e-3 * B.norm().item())


def test_a_run_that_makes_little_progress_is_the_last() -> None:
    got = Part(INVERSE, 0.3).solve(times(H), B)
    assert (got.status, got.steps) == (Status.STAGNATED, 1)
    assert got.residual_norm == pytest.approx(0.7 * B.norm().item())
    torch.testing.assert_close(got.v, 0.3 * INVERSE @ B)


def test_a_run_that_leads_away_is_not_taken() -> None:
    got = Part(INVERSE, -1.0).solve(times(H), B)
    assert got.status is Status.NEGATIVE_CURVATURE
    assert torch.equal(got.v, torch.zeros_like(B))
    assert got.residual_norm == pytest.approx(B.norm().item())


def test_a_measured_residual_that_is_not_finite_is_told() -> None:
    assert Part(INVERSE, 0.9).solve(lambda v: math.nan * v, B).status is Status.NON_FINITE


def test_every_run_is_ended_with_its_status() -> None:
    method = Part(INVERSE, 0.9, k=3)
    method.solve(times(H), B)
    assert method.ends == [Status.STAGNATED] * 3
    idle = Part(INVERSE, 0.9, k=0)
    idle.solve(times(H), B)
    assert idle.ends == [Status.MAX_STEPS]


def test_a_large_right_hand_side_reaches_the_method_scaled() -> None:
    seen = []

    class Sees(Part):
        def begin(self, system: System) -> Recursion:
            seen.append((system.r.abs().max().item(), system.stop))
            return super().begin(system)

    got = Sees(INVERSE, 0.9, k=1, tolerance=1e30).solve(times(H), 2.0**100 * B)
    largest = B.abs().max().item()
    (size, stop), *_ = seen
    assert 1 <= size < 2
    assert stop / size == pytest.approx(1e30 / (2.0**100 * largest))
    torch.testing.assert_close(got.v, 2.0**100 * (0.9 * INVERSE @ B))


# ---- messages


@pytest.mark.parametrize(
    "make", [ConjugateGradient, Minres, lambda *arguments: NeumannSeries(0.1, *arguments)], ids=ITERATIVE
)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, r"^`k` must be 0 or more, got -1\.$"),
        ((1.5,), TypeError, "`k` must be an integer, got 1.5"),
        ((True,), TypeError, "`k` must be an integer, got True"),
        ((1, -1e-3), ValueError, r"`tolerance` must be 0 or more, got -0.001\."),
        ((1, math.nan), ValueError, "`tolerance` must be 0 or more, got nan"),
        ((1, "small"), TypeError, "`tolerance` must be a number, got 'small'"),
        ((1, 0.0, -1.0), ValueError, "`rtol` must be 0 or more, got -1.0"),
        ((1, 0.0, math.nan), ValueError, "`rtol` must be 0 or more, got nan"),
    ],
)
def test_messages_of_the_iterative_solvers(
    make: Callable[..., Solver], arguments: tuple, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(*arguments)


@each_method
def test_a_solver_cannot_be_changed(name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        named_solver(name).k = 3
