import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.support.broken import Broken, below, drawing, seen_by, settings, unbounded, wrong
from tests.support.problems import F64, Values, quadratic, tiny_mlp
from tests.support.working import SETTINGS, D, ll_objective, ul_objective, working
from tune_implicit import BilevelProblem, State
from tune_implicit.checks.budget import Budget
from tune_implicit.checks.findings import Level
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.checks.retraining import Retraining, look_at_retraining


class Spare(nn.Module):
    """A linear model with weights that only a penalty sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D, 1, dtype=F64))
        self.spare = nn.Parameter(torch.full((D,), 0.1, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def of_no_penalty() -> BilevelProblem:
    """Return a problem whose penalty is 0 at its ul values, and negative beside them."""

    def penalised(state: State) -> Tensor:
        w = torch.cat([state.ll_model.weight[:, 0], state.ll_model.spare])
        return ul_objective(state) + (state.ul_model.l2.repeat(2) * w.square()).sum()

    return working(ul_model=Values(l2=torch.zeros(D, dtype=F64)), ll_model=Spare(), ll_objective=penalised)


def past_the_weights(share: float) -> BilevelProblem:
    """Return a problem whose ll objective leaves something behind that its ul objective reads."""
    left: dict[str, Tensor] = {}

    def leaving(state: State) -> Tensor:
        left["size"] = state.ll_model[0].weight.detach().square().sum()
        return ll_objective(state)

    return working(ll_objective=leaving, ul_objective=lambda s: ul_objective(s) + share * left.get("size", 0.0))


BROKEN = {
    "an ll problem without a minimum": Broken(
        "not-solved", partial(working, ll_objective=unbounded), settings(ll_steps=1), Level.WARNING
    ),
    "a ul gradient that is not finite at the minimum": Broken(
        "not-solved",
        partial(working, ul_objective=lambda s: ul_objective(s) + below(s).sqrt()),
        settings(ll_steps=0),
        Level.WARNING,
    ),
    "an ll problem without a minimum beside the ul values": Broken("not-solved", of_no_penalty, level=Level.WARNING),
    "objectives that share more than the weights": Broken("finite-differences", partial(past_the_weights, 1.0)),
    "objectives that share a little more than the weights": Broken(
        "finite-differences", partial(past_the_weights, 0.0025), level=Level.WARNING
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_found_by_name(broken: Broken) -> None:
    assert wrong(broken.seen_by(look_at_retraining)) == {broken.finding: broken.level}


@pytest.mark.parametrize("steps", [0, 10])
def test_a_right_hypergradient_agrees_with_differences_however_long_trials_train(steps: int) -> None:
    report = seen_by(look_at_retraining, working(), settings(ll_steps=steps))
    (finding,) = report.findings
    assert (finding.name, finding.level) == ("finite-differences", Level.OK)
    assert report.figures["finite_difference_error"] < 1e-6


def test_nothing_is_compared_where_an_objective_is_not_repeatable() -> None:
    report = seen_by(look_at_retraining, drawing())
    assert report.findings == []
    assert "finite_difference_error" not in report.figures


# ---- a problem that is solved again and again


def retraining_of(problem: BilevelProblem, ends: float = math.inf) -> Retraining:
    return Retraining(FixedProblem.of(problem, SETTINGS, Budget(ends)))


def test_it_trains_to_the_minimum() -> None:
    case = quadratic()
    solution = case.problem.ll_model.w.detach().clone()
    retraining = retraining_of(case.problem)
    (w,) = retraining.exact.ll_params()
    with torch.no_grad():
        w.add_(1.0)
    assert retraining.train_to_minimum()
    torch.testing.assert_close(w.detach(), solution, rtol=1e-8, atol=1e-8)


def test_its_hypergradient_is_exact_and_leaves_no_gradient_behind() -> None:
    case = quadratic()
    retraining = retraining_of(case.problem)
    torch.testing.assert_close(retraining.hypergradient().gradients, case.expected, rtol=1e-8, atol=1e-10)
    assert retraining.exact.ul_params()["ul"].grad is None


def test_a_difference_is_the_hypergradient_along_its_direction_and_leaves_both_models_where_they_were() -> None:
    case = quadratic()
    retraining = retraining_of(case.problem)
    models = retraining.exact.problem.ul_model, retraining.exact.problem.ll_model
    before = [copy.deepcopy(model.state_dict()) for model in models]
    direction = {"ul": torch.tensor([1.0, -1.0, 2.0], dtype=F64)}
    expected = (case.expected["ul"] * direction["ul"]).sum().item()
    assert retraining.difference(direction, 1e-4) == pytest.approx(expected, rel=1e-5)
    for model, state in zip(models, before, strict=True):
        torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=1e-14, atol=1e-14)


def test_there_is_no_difference_where_there_is_no_minimum() -> None:
    retraining = retraining_of(working(ll_objective=unbounded))
    assert not retraining.train_to_minimum()
    assert retraining_of(of_no_penalty()).difference({"l2": torch.ones(D, dtype=F64)}, 1e-3) is None


def test_it_gives_up_where_the_line_search_breaks_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(torch.optim.LBFGS, "step", broken)
    assert not retraining_of(tiny_mlp()).train_to_minimum()


def test_it_gives_up_at_its_deadline() -> None:
    assert not retraining_of(tiny_mlp(), ends=-math.inf).train_to_minimum()
    assert retraining_of(tiny_mlp()).train_to_minimum()
