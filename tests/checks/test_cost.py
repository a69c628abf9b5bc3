from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from tests.support.broken import seen_by, settings
from tests.support.problems import indefinite, quadratic
from tests.support.working import working
from tune_implicit import BilevelProblem, State
from tune_implicit.checks.budget import Budget
from tune_implicit.checks.cost import estimate, look_at_cost
from tune_implicit.checks.findings import CheckReport, Level
from tune_implicit.checks.fixed import FixedProblem


def looked_at(problem: BilevelProblem, **changes: object) -> tuple[FixedProblem, CheckReport]:
    fixed, report = FixedProblem.of(problem, settings(**changes)), CheckReport(figures={"ll_step_s": 1.0})
    look_at_cost(fixed, report)
    return fixed, report


def test_the_cost_of_a_ul_step_is_told_in_seconds_and_in_ll_steps() -> None:
    report = seen_by(look_at_cost, working())
    (finding,) = report.findings
    assert (finding.name, finding.level) == ("cost", Level.OK)
    assert finding.message.startswith("one ul step takes ")
    assert finding.message.endswith(" ll steps")
    assert report.figures["ul_step_s"] > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"ll_steps": 0}, False), ({"ll_steps": 0, "warmup_ll_steps": 3}, True), ({"ll_steps": 1}, True)],
    ids=str,
)
def test_ll_steps_are_spoken_of_where_a_trial_takes_some(changes: dict[str, int], told: bool) -> None:
    _, report = looked_at(quadratic().problem, **changes)
    assert report.findings[0].message.endswith(" ll steps") == told


def test_what_is_timed_is_ul_steps_alone() -> None:
    case = quadratic()
    calls: list[str] = []

    def counted(name: str) -> Callable[[State], Tensor]:
        def objective(state: State) -> Tensor:
            calls.append(name)
            return getattr(case.problem, name)(state)

        return objective

    problem = replace(case.problem, **{name: counted(name) for name in ("ul_objective", "ll_objective")})
    fixed, _ = looked_at(problem, warmup_ll_steps=7)
    assert (calls.count("ul_objective"), calls.count("ll_objective")) == (5, 5)
    for model in ("ul_model", "ll_model"):
        assert str(getattr(fixed.problem, model).state_dict()) == str(getattr(case.problem, model).state_dict())


def test_without_time_one_ul_step_is_timed() -> None:
    clock = iter(range(100))
    fixed = FixedProblem.of(quadratic().problem, settings(), Budget(0, lambda: float(next(clock))))
    report = CheckReport(figures={"ll_step_s": 1.0})
    look_at_cost(fixed, report)
    assert report.figures["ul_step_s"] == 1
    assert next(clock) < 6


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({"ll_steps": 10, "ul_steps": 100}, 100 * (10 * 2 + 3) + 20 * 5),
        ({"ll_steps": 10, "ul_steps": 100, "warmup_ll_steps": 7}, 7 * 2 + 100 * (10 * 2 + 3) + 20 * 5),
        ({"ll_steps": 10, "ul_steps": 101, "ul_learning_rate": 0.0}, 101 * 10 * 2 + 21 * 5),
    ],
    ids=str,
)
def test_a_trial_takes_as_long_as_its_steps_and_its_reports(changes: dict[str, Any], seconds: float) -> None:
    report = CheckReport(figures={"ll_step_s": 2.0, "ul_step_s": 3.0})
    estimate(settings(**changes), 10, 5.0, report)
    assert report.figures["trial_s"] == seconds


@pytest.mark.parametrize("policy", ["raise", "stop"])
def test_a_solve_that_fails_is_timed_all_the_same(policy: str) -> None:
    _, report = looked_at(indefinite().problem, on_failure=policy, failures_to_stop=1)
    assert [finding.name for finding in report.findings] == ["cost"]
