from functools import partial

import pytest
import torch

from tests.support.broken import settings
from tests.support.working import working
from tune_implicit import BilevelProblem
from tune_implicit.checks.budget import Budget
from tune_implicit.checks.findings import CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.checks.rates import look_for_rate, told_rate, train
from tune_implicit.errors import DivergedError

sgd = partial(working, ll_optimizer=torch.optim.SGD)


def rate_for(problem: BilevelProblem, rate: float, budget: Budget | None = None) -> CheckReport:
    fixed, report = FixedProblem.of(problem, settings(ll_learning_rate=rate), budget), CheckReport()
    before = str([fixed.problem.ll_model.state_dict(), fixed.problem.ul_model.state_dict()])
    look_for_rate(fixed, 300, report)
    assert str([fixed.problem.ll_model.state_dict(), fixed.problem.ul_model.state_dict()]) == before
    return report


@pytest.mark.parametrize("rate", [5.0, 1e-4])
def test_where_a_rate_diverges_or_hardly_moves_one_is_found_with_which_training_goes_further(rate: float) -> None:
    best = rate_for(sgd(), rate).recommended["ll_learning_rate"]
    assert 0.005 <= best <= 0.1


def test_a_rate_that_is_fine_is_recommended_by_name() -> None:
    assert rate_for(sgd(), 0.05).recommended == {"ll_learning_rate": 0.05}


def test_without_time_to_compare_nothing_is_recommended() -> None:
    assert rate_for(sgd(), 1e-4, Budget(0.0)).recommended == {}


def test_the_rate_that_was_found_ends_a_message() -> None:
    fixed, report = FixedProblem.of(sgd(), settings(ll_learning_rate=1e-4)), CheckReport()
    assert told_rate(fixed, report) == ""
    report.recommend(ll_learning_rate=1e-4)
    assert told_rate(fixed, report) == ""
    report.recommend(ll_learning_rate=0.01)
    assert told_rate(fixed, report) == " With ll_learning_rate=0.01, training goes clearly further."


def test_training_ends_after_its_steps_or_when_time_is_out_and_takes_some_in_any_case() -> None:
    fixed = FixedProblem.of(sgd(), settings())
    assert train(fixed, fixed.problem, fixed.settings, 47) == 47
    late = FixedProblem.of(sgd(), settings(), Budget(0.0))
    assert train(late, late.problem, late.settings, 47) == 10
    assert train(late, late.problem, late.settings, 0) == 0


def test_training_that_diverges_says_so() -> None:
    fixed = FixedProblem.of(sgd(), settings(ll_learning_rate=5.0))
    with pytest.raises(DivergedError):
        train(fixed, fixed.problem, fixed.settings, 1000)
