import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from tests.support.broken import Broken, below, seen_by, settings, unbounded, wrong
from tests.support.problems import F64, Case, quadratic
from tests.support.working import N, ll_objective, ul_objective, working
from tune_implicit import State
from tune_implicit.checks.budget import Budget
from tune_implicit.checks.curvature import look_at_curvature
from tune_implicit.checks.findings import CheckReport, Level
from tune_implicit.checks.fixed import FixedProblem


class DrawnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        return g.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 + torch.rand(g.shape, dtype=g.dtype))


class Drawn(torch.autograd.Function):
    """A function whose second derivative is another at every product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return DrawnBackward.apply(g)


def drawn(state: State) -> Tensor:
    w = Drawn.apply(state.ll_model[0].weight)
    penalty = (state.ul_model.log_l2.exp() * w.square()).sum()
    return mse_loss(state.data @ w.T + state.ll_model[0].bias, state.target) + penalty


def of_two_weights(state: State) -> Tensor:
    """Return an ll loss that leaves two weights and the bias alone, which the ul loss uses."""
    w = state.ll_model[0].weight[:, :2]
    return mse_loss(state.data[:, :2] @ w.T, state.target) + (state.ul_model.log_l2.exp()[:2] * w.square()).sum()


BROKEN = {
    "a Hessian that is not finite where training ends": Broken(
        "non-finite", partial(working, ll_objective=lambda s: ll_objective(s) + below(s).pow(1.5))
    ),
    "a ul gradient that is not finite where training ends": Broken(
        "non-finite", partial(working, ul_objective=lambda s: ul_objective(s) + below(s).sqrt())
    ),
    "ll loss of the wrong sign": Broken(
        "wrong-sign",
        partial(working, ll_objective=lambda s: s.ul_model.log_l2.exp().sum() - ll_objective(s)),
        settings(ll_steps=1, ul_steps=10, solver="minres"),
    ),
    "a Neumann step above 2 / lambda_max": Broken("diverging-step", working, settings(solver="neumann", step_size=5.0)),
    "a penalty of the wrong sign": Broken(
        "negative-curvature", partial(working, ll_objective=unbounded), settings(ll_steps=1, on_failure="skip")
    ),
    "negative curvature that another solver answers": Broken(
        "negative-curvature", partial(working, ll_objective=unbounded), settings(ll_steps=1), Level.WARNING
    ),
    "products that are not repeatable": Broken("solver", partial(working, ll_objective=drawn), settings(verify=True)),
    "weights that the ll loss leaves alone": Broken(
        "effort", partial(working, ll_objective=of_two_weights), settings(solver="minres"), Level.WARNING
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_found_by_name(broken: Broken) -> None:
    assert wrong(broken.seen_by(look_at_curvature)) == {broken.finding: broken.level}


def test_a_problem_at_its_minimum_is_told_what_its_solvers_need() -> None:
    report = seen_by(look_at_curvature, working())
    assert [finding.name for finding in report.findings] == ["curvature", "solver", "effort"]
    assert wrong(report) == {}
    figures = report.figures
    assert figures["k_cg"] <= figures["k_neumann_auto"] <= figures["k_neumann"]


def test_figures_are_those_of_the_hessian() -> None:
    problem = working()
    ((x, _),) = problem.train_data
    ones = torch.cat([x, torch.ones(N, 1, dtype=F64)], 1)
    penalty = torch.cat([problem.ul_model.log_l2.detach().exp(), torch.zeros(1, dtype=F64)])
    values = torch.linalg.eigvalsh(2 * ones.T @ ones / N + 2 * penalty.diag())
    figures = seen_by(look_at_curvature, problem).figures
    assert figures["lambda_min"] == pytest.approx(values[0].item())
    assert figures["lambda_max"] == pytest.approx(values[-1].item())
    assert figures["largest_step_size"] == pytest.approx(2 / values[-1].item())


def looked_at(case: Case, **changes: Any) -> CheckReport:
    report = CheckReport()
    look_at_curvature(FixedProblem.of(case.problem, settings(**changes)), report)
    return report


def test_no_step_size_is_told_where_training_goes_to_a_maximum() -> None:
    report = looked_at(quadratic((-4.0, -2.0, -1.0, 0.5)))
    assert "wrong-sign" in wrong(report)
    assert report.figures["lambda_min"] == pytest.approx(-4)
    assert {"largest_step_size", "k_neumann_auto"}.isdisjoint(report.figures)


@pytest.mark.parametrize("solver", ["cg", "minres", "neumann"])
def test_k_is_the_least_power_of_two_with_which_the_implicit_term_is_right_to_a_percent(solver: str) -> None:
    case = quadratic((0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.0))
    direct = 2 * case.problem.ul_model.ul.detach()
    exact = case.expected["ul"] - direct
    k = int(looked_at(case, ll_learning_rate=0.3).figures[f"k_{solver}"])

    def error(k: int) -> float:
        term = case.compute(solver, k, ll_learning_rate=0.3).gradients["ul"] - direct
        return ((term - exact).norm() / exact.norm()).item()

    assert error(k) < 0.011
    assert error(k // 2) > 0.009


def test_damping_is_part_of_the_system_that_k_is_told_for() -> None:
    case = quadratic((0.01, 0.1, 1.0, 4.0))
    bare, damped = (looked_at(case, ll_learning_rate=0.2, damping=damping).figures for damping in (0.0, 2.0))
    assert damped["k_neumann"] < bare["k_neumann"]
    assert damped["lambda_max"] == pytest.approx(bare["lambda_max"])


def test_what_takes_too_long_is_not_measured() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-3
        return now[0]

    def seen(seconds: float) -> CheckReport:
        now[0] = 0.0
        report = CheckReport()
        look_at_curvature(FixedProblem.of(quadratic().problem, settings(), Budget(seconds, clock)), report)
        return report

    short, longer, enough = seen(0.002), seen(0.5), seen(1000.0)
    assert wrong(short) == {"no-time": Level.WARNING}
    assert {"k_cg", "k_minres"} <= set(enough.figures)
    assert not {"k_cg", "k_minres"} & set(short.figures)
    assert math.isfinite(enough.figures["k_cg"])
    assert longer.figures["hvp_s"] == pytest.approx(1e-3 / 4)


def test_a_figure_there_was_no_time_for_is_told_as_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, report = FixedProblem.of(quadratic().problem, settings(), Budget(0.0)), CheckReport(figures={"hvp_s": 0.0})
    look_at_curvature(fixed, report)
    monkeypatch.setattr(Budget, "affords", lambda self, each_s, most: most)
    look_at_curvature(fixed, report)
    assert math.isnan(report.figures["k_cg"])
    assert "cg not measured" in report.findings[-1].message
