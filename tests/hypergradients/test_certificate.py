import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.problems import F64, Values, compute, generator, indefinite, quadratic, ridge
from tests.support.systems import Says
from tune_implicit.hypergradients.certificate import Hypergradient, certified
from tune_implicit.hypergradients.guards.losses import Loss
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.products import SecondOrder
from tune_implicit.hypergradients.settings import SOLVERS
from tune_implicit.hypergradients.solvers.solution import Attempt, Solution, Status

each_solver = pytest.mark.parametrize("solver", SOLVERS)
FAILURES = [status for status in Status if status.failed]
ANSWERS = [status for status in Status if not status.failed]

SOLUTION = Solution(torch.tensor([1.0, 2.0]), Status.CONVERGED, 7, 0.5, 0.1, 2.0, 0.3)


def certificate(status: Status = Status.CONVERGED, lambda_max: float = 2.0, **changes: object) -> Hypergradient:
    """The certificate of a solve with these numbers."""
    numbers = {
        "gradients": {},
        "direct": {},
        "solution": replace(SOLUTION, status=status, lambda_max=lambda_max),
        "solver": "cg",
        "b_norm": 4.0,
        "hvps": 8,
        "noise_norm": math.nan,
        "stationarity": 0.0,
        "stationarity_at_zeros": 0.0,
        "ll_norm": 3.0,
        "norm": 1.0,
        "ul_loss": 0.25,
        "ll_loss": math.inf,
    }
    return Hypergradient(**(numbers | changes))


# ---- its numbers


def test_they_are_those_of_the_solve() -> None:
    case = quadratic()
    w, ul = case.problem.ll_model.w, case.problem.ul_model.ul
    with torch.no_grad():
        w += 0.1
    b, gradient = case.b + 0.1, case.h @ torch.full_like(w, 0.1)
    result = case.compute("neumann", k=3)
    residual = b
    for _ in range(3):
        residual = residual - case.step_size * (case.h @ residual)
    assert result.status is Status.MAX_STEPS
    assert (result.solver, result.solver_steps, result.hvps) == ("neumann", 3, 3)
    assert result.residual_norm == pytest.approx(residual.norm().item())
    assert result.relative_residual == pytest.approx((residual.norm() / b.norm()).item())
    assert result.b_norm == pytest.approx(b.norm().item())
    assert result.stationarity == pytest.approx(gradient.norm().item())
    assert result.ll_norm == pytest.approx(w.norm().item())
    assert result.norm == pytest.approx(result.gradients["ul"].norm().item())
    assert result.ul_loss == pytest.approx((b.square().sum() / 2 + ul.square().sum()).item())


def test_those_of_the_solution_are_attributes_here_as_well() -> None:
    solution = replace(SOLUTION, attempts=(Attempt("cg", Status.DIVERGED, 7),))
    got = certificate(solution=solution)
    for field in fields(Solution):
        name = {"steps": "solver_steps"}.get(field.name, field.name)
        assert getattr(got, name) is getattr(solution, field.name)


def test_a_certificate_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        certificate().norm = 0.0


@pytest.mark.parametrize(("b_norm", "expected"), [(4.0, 0.125), (0.25, 2.0), (0.0, 0.0)])
def test_relative_residual_is_that_over_b_and_exact_where_b_is_zero(b_norm: float, expected: float) -> None:
    assert certificate(b_norm=b_norm).relative_residual == expected


@pytest.mark.parametrize("lambda_max", [2.0, -2.0])
def test_relative_stationarity_is_the_part_of_their_length_by_which_the_weights_have_to_move(lambda_max: float) -> None:
    assert certificate(stationarity=1.5, lambda_max=lambda_max).relative_stationarity == 1.5 / (2 * 3)


@pytest.mark.parametrize("scale", [{"ll_norm": 0.0}, {"lambda_max": 0.0}])
def test_relative_stationarity_at_no_scale_is_infinite_unless_stationary(scale: dict[str, float]) -> None:
    assert certificate(stationarity=1e-9, **scale).relative_stationarity == math.inf
    assert certificate(stationarity=0.0, **scale).relative_stationarity == 0


def test_relative_stationarity_is_unknown_where_no_curvature_was_met() -> None:
    got = certificate(stationarity=1.0, lambda_max=math.nan)
    assert math.isnan(got.relative_stationarity)
    assert got.caveat == ""


# ---- why it failed


@pytest.mark.parametrize("status", FAILURES)
def test_a_failure_has_a_reason_and_no_caveat(status: Status) -> None:
    got = certificate(status, stationarity=1.0)
    assert got.reason.startswith(status.explanation)
    assert got.caveat == ""


@pytest.mark.parametrize("status", ANSWERS)
def test_an_answer_has_no_reason(status: Status) -> None:
    assert certificate(status).reason == ""


def test_reason_of_numbers_that_are_not_finite_tells_the_losses() -> None:
    assert "The ul loss is 0.25, the ll loss inf." in certificate(Status.NON_FINITE).reason


def test_reason_of_a_divergence_names_a_step_size_that_works() -> None:
    case = ridge(60, 20)
    largest = torch.linalg.eigvalsh(case.h)[-1].item()
    result = case.compute("neumann", ll_learning_rate=30 / largest)
    assert result.status is Status.DIVERGED
    assert 2 / result.lambda_max >= 2 / largest * (1 - 1e-9)
    for said in (f"at least {result.lambda_max:.3g}", f"below {2 / result.lambda_max:.3g}", 'step_size="auto"'):
        assert said in result.reason
    assert not case.compute("neumann", step_size="auto", ll_learning_rate=30 / largest).reason


def test_reason_of_a_divergence_without_a_curvature_names_none() -> None:
    assert certificate(Status.DIVERGED, lambda_max=math.nan).reason == Status.DIVERGED.explanation


def test_reason_of_a_solver_that_lies() -> None:
    case = ridge(60, 20)
    result = compute(case.implicit(Says(0.0), verify=True), case.problem)
    assert result.status is Status.UNVERIFIED
    assert result.reason == "The residual computed anew is larger than the one that the solver reported."
    assert result.gradients == {}


def test_reason_of_a_divergence_that_a_solver_object_does_not_explain() -> None:
    case = ridge(60, 20)
    assert "nan" not in compute(case.implicit(Says(0.5, Status.DIVERGED)), case.problem).reason


# ---- what to know of an answer


def test_converged_at_a_stationary_point_there_is_nothing_to_know() -> None:
    assert certificate(stationarity=1e-6).caveat == ""


@pytest.mark.parametrize("status", [Status.MAX_STEPS, Status.STAGNATED])
def test_an_answer_that_has_not_converged_says_so(status: Status) -> None:
    assert certificate(status).caveat == status.explanation


def test_an_answer_far_from_a_stationary_point_says_so() -> None:
    got = certificate(stationarity=1.0)
    assert got.caveat.startswith("||df/dw|| is 1, and the formula takes it to be 0: train the ll model longer")
    both = certificate(Status.MAX_STEPS, stationarity=1.0)
    assert both.caveat == f"{Status.MAX_STEPS.explanation} {got.caveat}"


@dataclass(frozen=True)
class Regression:
    """Least squares with a penalty ``exp(l)`` for each weight, solved to the end by ``solve``."""

    penalty: Callable[[Tensor], Tensor]
    # One proximal or projected gradient step from the gradient step's end, with the penalties times the step size.
    proximal: Callable[[Tensor, Tensor], Tensor]

    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        random = generator(3)
        # The features are correlated, so that those whose weight is 0 matter to the others.
        x, x_validate = (torch.randn(40, 7, generator=random, dtype=F64) for _ in range(2))
        x, x_validate = (data[:, :6] + 2 * data[:, 6:] for data in (x, x_validate))
        truth = torch.tensor([2, -1, 0.5, 0, 0, 0], dtype=F64)
        y, y_validate = (a @ truth + torch.randn(40, generator=random, dtype=F64) / 2 for a in (x, x_validate))
        return x, y, x_validate, y_validate

    def solve(self, log_penalty: Tensor) -> Tensor:
        x, y, _, _ = self.data()
        step = 1 / torch.linalg.eigvalsh(x.T @ x / len(x))[-1]
        w = torch.zeros(6, dtype=F64)
        for _ in range(3000):
            w = self.proximal(w - step * x.T @ (x @ w - y) / len(x), step * log_penalty.exp())
        return w

    def ul_loss(self, w: Tensor) -> Tensor:
        _, _, x, y = self.data()
        return (x @ w - y).square().mean() / 2

    def hypergradient(self, solver: str) -> Hypergradient:
        return self.implicit(solver).compute_gradients(None, None)

    def implicit(self, solver: str, **settings: Any) -> Implicit:
        x, y, _, _ = self.data()
        log_penalty = torch.full((6,), -1.5, dtype=F64)
        largest = torch.linalg.eigvalsh(x.T @ x / len(x))[-1].item() + log_penalty.exp().max().item()
        return Implicit(
            lambda s: self.ul_loss(s.ll_model.w),
            Values(l=log_penalty),
            lambda s: (
                (x @ s.ll_model.w - y).square().mean() / 2 + (s.ul_model.l.exp() * self.penalty(s.ll_model.w)).sum()
            ),
            Values(w=self.solve(log_penalty)),
            ll_learning_rate=1.9 / largest,
            k=5000,
            solver=solver,
            **settings,
        )


@cache
def differences(regression: Regression, h: float = 1e-5) -> Tensor:
    """The hypergradient, by differences of the retrained problem."""
    shifts = h * torch.eye(6, dtype=F64)
    losses = [[regression.ul_loss(regression.solve(sign * shift - 1.5)).item() for sign in (1, -1)] for shift in shifts]
    return torch.tensor([(high - low) / (2 * h) for high, low in losses], dtype=F64)


def shrunk(w: Tensor, threshold: Tensor) -> Tensor:
    return w.sign() * (w.abs() - threshold).clamp(min=0)


SMOOTH = Regression(lambda w: w.square() / 2, lambda w, penalty: w / (1 + penalty))
NOT_SMOOTH = {
    "L1": Regression(torch.abs, shrunk),
    "projected": Regression(lambda w: w.square() / 2, lambda w, penalty: (w / (1 + penalty)).clamp(min=0)),
}


@each_solver
def test_a_smooth_solution_has_no_caveat(solver: str) -> None:
    result = SMOOTH.hypergradient(solver)
    torch.testing.assert_close(result.gradients["l"], differences(SMOOTH), rtol=1e-6, atol=1e-9)
    assert result.relative_stationarity < 1e-9
    assert result.caveat == ""


@each_solver
@pytest.mark.parametrize("name", NOT_SMOOTH)
def test_a_kink_or_a_constraint_at_the_solution_is_told(name: str, solver: str) -> None:
    regression = NOT_SMOOTH[name]
    result = regression.hypergradient(solver)
    assert result.status is Status.CONVERGED
    assert (result.gradients["l"] - differences(regression)).norm() > 0.01 * result.norm
    assert result.relative_stationarity > 1e-3
    assert "smooth the kink or the constraint" in result.caveat


def test_a_small_kink_is_told_by_the_weights_that_it_holds_at_zero() -> None:
    told = certificate(stationarity=1e-6, stationarity_at_zeros=1e-6)
    assert told.relative_stationarity < 1e-3
    assert "||df/dw|| is 1e-06, nearly all of it on weights that are exactly 0" in told.caveat
    assert certificate(stationarity=1e-6, stationarity_at_zeros=5e-7).caveat == ""
    assert certificate(stationarity=1e-12, stationarity_at_zeros=1e-12).caveat == ""  # it may be rounding


@pytest.mark.parametrize("solver", ["cg", "minres", "neumann"])
def test_a_warm_start_that_is_the_answer_keeps_the_caveat(solver: str) -> None:
    implicit = NOT_SMOOTH["L1"].implicit(solver, warm_start=True, rtol=1e-3)
    first, second = (implicit.compute_gradients(None, None) for _ in range(2))
    assert second.solver_steps == 0
    assert second.relative_stationarity > 1e-3
    assert second.caveat == first.caveat != ""


# ---- what is certified


def certify(solution: Solution = SOLUTION, ul_loss: float = 1.0, ll_loss: float = 1.0, slope: float = 1.0) -> tuple:
    """The certificate of a gradient of length 5, with ``f`` sloped so, and the gradients that went in."""
    w = nn.Parameter(torch.zeros(2))
    gradients = {"l": torch.tensor([3.0, 4.0])}
    second = SecondOrder(slope * w.sum() + w.square().sum(), [w])
    losses = tuple([Loss(w.sum() + value)] for value in (ul_loss, ll_loss))
    return certified(gradients, {}, solution, "cg", second, torch.ones(4), 3.0, math.nan, losses), gradients


def test_an_answer_with_finite_numbers_keeps_its_status() -> None:
    got, gradients = certify()
    assert got.solution is SOLUTION
    assert got.gradients is gradients
    assert (got.norm, got.b_norm, got.ul_loss, got.ll_loss) == (5.0, 2.0, 1.0, 1.0)
    assert got.stationarity == pytest.approx(2**0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["ul_loss", "ll_loss", "slope"])
def test_an_answer_with_a_number_that_is_not_finite_is_none(where: str, bad: float) -> None:
    got, _ = certify(**{where: bad})
    assert got.status is Status.NON_FINITE
    assert got.gradients == {}
    assert math.isnan(got.norm)
    assert got.v is SOLUTION.v


def test_a_gradient_that_is_not_finite_is_none() -> None:
    w = nn.Parameter(torch.zeros(2))
    losses = [Loss(w.sum())], [Loss(w.sum())]
    second = SecondOrder(w.square().sum(), [w])
    got = certified({"l": torch.tensor([math.inf])}, {}, SOLUTION, "cg", second, torch.ones(4), 3.0, math.nan, losses)
    assert got.status is Status.NON_FINITE


@pytest.mark.parametrize("status", FAILURES)
def test_a_failure_stays_the_failure_it_is(status: Status) -> None:
    got, _ = certify(replace(SOLUTION, status=status), ul_loss=math.nan)
    assert got.status is status
    assert got.gradients == {}
    assert math.isnan(got.norm)


def test_the_solver_that_answered_is_named() -> None:
    attempts = (Attempt("cg", Status.DIVERGED, 7), Attempt("minres", Status.CONVERGED, 7))
    assert certify()[0].solver == "cg"
    assert certify(replace(SOLUTION, attempts=attempts))[0].solver == "minres"


def test_attempts_of_a_fallback_are_recorded() -> None:
    result = indefinite().compute("cg", fallback=True)
    assert [(attempt.solver, attempt.status) for attempt in result.attempts] == [
        ("cg", Status.NEGATIVE_CURVATURE),
        ("minres", Status.CONVERGED),
    ]
    assert result.solver == "minres"


def test_direct_part_is_that_of_the_ul_objective_alone() -> None:
    case = quadratic()
    got = case.compute("dense")
    torch.testing.assert_close(got.direct, {"ul": 2 * case.problem.ul_model.ul.detach()})
    implicit = -case.mixed(torch.linalg.solve(case.h, case.b))["ul"]
    torch.testing.assert_close(got.gradients["ul"] - got.direct["ul"], implicit)
    assert ridge(60, 20).compute("dense").direct == {}
    assert indefinite().compute("cg").direct == {}
