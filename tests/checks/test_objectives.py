import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.support.broken import Broken, first_weight, seen_by, wrong
from tests.support.problems import F64, Values
from tests.support.working import SETTINGS, D, LearningRate, ll_objective, ul_objective, working
from tune_implicit import BilevelProblem, State
from tune_implicit.checks.findings import CheckReport, StopCheckError
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.checks.objectives import look_at_objectives


class Count(Values):
    def __init__(self) -> None:
        super().__init__(log_l2=torch.full((D,), -3.0, dtype=F64))
        self.layers = nn.Parameter(torch.tensor(3), requires_grad=False)


def edits_its_batch(state: State) -> Tensor:
    state.data.mul_(0.99)
    return ll_objective(state)


def edits_a_weight(state: State) -> Tensor:
    with torch.no_grad():
        state.ll_model[0].weight.clamp_(max=0.1)
    return ll_objective(state)


def edits_what_autograd_needs(state: State) -> Tensor:
    hidden = state.ll_model(state.data).exp()
    loss = hidden.square().mean()
    hidden.add_(1.0)
    return loss + ll_objective(state)


def outside(problem: BilevelProblem) -> BilevelProblem:
    model = problem.ll_model
    return replace(problem, ul_objective=lambda s: mse_loss(model(s.data), s.target))


def with_zeta(state: State) -> Tensor:
    """Return a loss whose derivative torch does not have."""
    return ul_objective(state) + torch.special.zeta(2 + first_weight(state), torch.full((), 2.0, dtype=F64))


BROKEN = {
    "integer parameters": Broken("integer-parameter", lambda: working(ul_model=Count())),
    "an objective that returns a number": Broken("not-a-loss", partial(working, ul_objective=lambda s: 1.0)),
    "an objective that is no scalar": Broken(
        "non-scalar",
        partial(working, ul_objective=lambda s: mse_loss(s.ll_model(s.data), s.target, reduction="none")),
    ),
    "a loss that is NaN": Broken("non-finite", partial(working, ll_objective=lambda s: ll_objective(s) + math.nan)),
    "a ll loss under no_grad": Broken("detached", partial(working, ll_objective=torch.no_grad()(ll_objective))),
    "a detached ul loss": Broken(
        "detached",
        partial(
            working, ul_objective=lambda s: mse_loss(s.ll_model(s.data).detach(), s.target) + s.ul_model.log_l2.sum()
        ),
    ),
    "a model from outside the state": Broken("detached", lambda: outside(working())),
    "a loss that torch cannot differentiate": Broken("double-backward", partial(working, ul_objective=with_zeta)),
    "data edited in place": Broken("in-place", partial(working, ll_objective=edits_its_batch)),
    "weights edited in place": Broken("in-place", partial(working, ll_objective=edits_a_weight)),
    "activations edited in place": Broken("in-place", partial(working, ll_objective=edits_what_autograd_needs)),
    "shapes that do not fit": Broken(
        "torch-error", partial(working, ul_objective=lambda s: s.ll_model(s.data.T).sum())
    ),
    "a ul value that nothing uses": Broken(
        "unused-ul-value",
        lambda: working(ul_model=Values(log_l2=torch.zeros(D, dtype=F64), spare=torch.zeros(2, dtype=F64))),
    ),
    "a ul value behind .item()": Broken(
        "unused-ul-value",
        lambda: working(
            ul_model=Values(log_l2=torch.zeros((), dtype=F64)),
            ll_objective=lambda s: ul_objective(s) + s.ul_model.log_l2.exp().item() * s.ll_model[0].weight.norm(),
        ),
    ),
    "a learning rate as ul value": Broken("learning-rate", lambda: working(ul_model=LearningRate())),
    "objectives swapped": Broken(
        "objectives-swapped", partial(working, ul_objective=ll_objective, ll_objective=ul_objective)
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_found_by_name(broken: Broken) -> None:
    assert wrong(broken.seen_by(look_at_objectives)) == {broken.finding: broken.level}


def test_of_a_working_problem_the_losses_and_the_paths_are_told() -> None:
    losses, paths = seen_by(look_at_objectives, working()).findings
    assert (losses.name, paths.name) == ("losses", "ul-values")
    assert "before any step" in losses.message
    assert paths.message == "a path from 'log_l2' through the ll weights"


@pytest.mark.parametrize(
    ("names", "finding"),
    [
        ("lr log_lr learning_rate log_learning_rate step_size momentum beta1 initial_scale", "learning-rate"),
        ("alr colour betatron", "unused-ul-value"),
    ],
)
def test_what_belongs_to_the_search_is_told_by_its_name(names: str, finding: str) -> None:
    for name in names.split():
        values = {"log_l2": torch.zeros(D, dtype=F64), name: torch.zeros((), dtype=F64)}
        report = seen_by(look_at_objectives, working(ul_model=Values(**values)))
        assert list(wrong(report)) == [finding]
        assert f"the ul model's {name!r}" in report.faults[0].message


def test_what_nothing_uses_is_frozen_for_the_looks_after_it_and_for_no_one_else() -> None:
    problem = working(ul_model=LearningRate())
    fixed = FixedProblem.of(problem, SETTINGS)
    look_at_objectives(fixed, CheckReport())
    assert list(fixed.ul_params()) == ["log_l2"]
    assert problem.ul_model.log_lr.requires_grad


def test_without_any_ul_value_in_use_nothing_else_is_looked_at() -> None:
    fixed, report = FixedProblem.of(working(ll_objective=ul_objective), SETTINGS), CheckReport()
    with pytest.raises(StopCheckError):
        look_at_objectives(fixed, report)
    assert list(wrong(report)) == ["unused-ul-value"]


def test_a_ul_value_may_enter_the_ul_loss_alone_beside_one_that_does_not() -> None:
    values = {"log_l2": torch.zeros(D, dtype=F64), "offset": torch.zeros((), dtype=F64)}
    problem = working(ul_model=Values(**values), ul_objective=lambda s: ul_objective(s) + s.ul_model.offset.square())
    report = seen_by(look_at_objectives, problem)
    assert report.passed
    assert report.findings[-1].message == "a path from 'log_l2' through the ll weights"
