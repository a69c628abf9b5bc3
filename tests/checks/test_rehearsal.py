from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.support.broken import settings, unbounded, wrong
from tests.support.problems import indefinite
from tests.support.working import finish, working
from tune_implicit import BilevelProblem, ImplicitSettings, check
from tune_implicit.checks.budget import Budget
from tune_implicit.checks.findings import CheckReport, Finding, Level
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.checks.rehearsal import look_at_rehearsal
from tune_implicit.trials.trial import Trial

sgd = partial(working, ll_optimizer=torch.optim.SGD)


def looked_at(problem: BilevelProblem, budget: Budget | None = None, **changes: Any) -> CheckReport:
    report = CheckReport(figures={"ll_step_s": 1e-3, "ul_step_s": 1e-2})
    look_at_rehearsal(FixedProblem.of(problem, settings(**changes), budget), report)
    return report


def finding(report: CheckReport, name: str) -> Finding:
    return next(finding for finding in report.findings if finding.name == name)


def test_ul_steps_that_go_well_recommend_their_settings_by_name() -> None:
    problem = working()
    before = str([problem.ul_model.state_dict(), problem.ll_model.state_dict()])
    report = looked_at(problem)
    assert [(found.name, found.level) for found in report.findings] == [("ul-steps", Level.OK)]
    assert report.recommended == {"ul_learning_rate": 0.01, "ll_steps": 10}
    assert report.figures["ll_steps_per_ul_step"] == 10
    assert report.figures["trial_s"] > 30 * (10 * 1e-3 + 1e-2)
    assert str([problem.ul_model.state_dict(), problem.ll_model.state_dict()]) == before


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"ul_learning_rate": 1e-6, "adapt_ul_learning_rate": False}, True),
        ({"ul_learning_rate": 1e-6, "ul_steps": 5}, True),
        ({"ul_learning_rate": 1e-6, "ul_steps": 100}, False),
        ({"ul_learning_rate": 1e-2, "adapt_ul_learning_rate": False}, False),
        ({"ul_learning_rate": 1e-4, "adapt_ul_learning_rate": False, "ul_steps": 100}, False),
    ],
    ids=str,
)
def test_a_ul_rate_that_gets_nowhere_in_all_ul_steps_is_a_fault(changes: dict[str, Any], fault: bool) -> None:
    report = looked_at(working(), **changes)
    assert ("ul-rate-too-small" in wrong(report)) == fault, str(report)
    if fault:
        assert report.recommended["ul_learning_rate"] == 0.01
        assert report.recommended["adapt_ul_learning_rate"] is True
        assert "would move by" in report.faults[0].message
        assert "It did not happen with ul_learning_rate=0.01" in report.faults[0].message


def test_skipped_ul_steps_are_a_fault_that_names_what_mends_them() -> None:
    report = looked_at(indefinite().problem, solver="cg", on_failure="skip", ll_steps=0)
    fault = finding(report, "skipped-steps")
    assert fault.level is Level.FAULT
    assert "20 of 20 ul steps were skipped" in fault.message
    assert 'on_failure="fallback"' in fault.message
    assert "ul-rate-too-small" not in wrong(report)


@pytest.mark.parametrize("policy", ["raise", "stop"])
def test_a_trial_that_would_end_at_a_failed_solve_is_rehearsed_to_the_end(policy: str) -> None:
    report = looked_at(indefinite().problem, solver="cg", on_failure=policy, failures_to_stop=1, ll_steps=0)
    assert "20 of 20 ul steps were skipped" in finding(report, "skipped-steps").message


def test_ul_values_that_run_away_are_a_fault() -> None:
    report = looked_at(working(), ul_learning_rate=50.0, adapt_ul_learning_rate=False)
    assert wrong(report)["ul-values-run-away"] is Level.FAULT


def test_training_that_diverges_once_the_ul_values_move_is_a_fault() -> None:
    report = looked_at(sgd(), ul_learning_rate=5.0, adapt_ul_learning_rate=False, ll_learning_rate=0.3)
    fault = finding(report, "trial-diverges")
    assert "take a smaller `ul_learning_rate`" in fault.message
    assert report.recommended.get("ul_learning_rate") in {None, 0.01}
    assert not any("nan" in str(value) for value in report.recommended.values())


def test_an_ll_model_that_lags_gets_more_ll_steps_or_a_larger_rate() -> None:
    report = looked_at(sgd(), ll_steps=2, ll_learning_rate=1e-3, ul_steps=100)
    assert wrong(report)["ll-model-lags"] is Level.WARNING
    assert report.recommended.get("ll_steps") == "auto" or report.recommended["ll_learning_rate"] > 1e-3


def test_what_was_recommended_before_and_does_worse_is_taken_back() -> None:
    report = CheckReport(figures={"ll_step_s": 1e-3, "ul_step_s": 1e-2})
    report.recommend(ll_learning_rate=1e-6)
    look_at_rehearsal(FixedProblem.of(working(), settings()), report)
    assert report.recommended["ll_learning_rate"] == 0.05
    assert "which therefore stay" in finding(report, "recommended").message


def test_without_time_for_a_ul_step_it_says_so() -> None:
    report = looked_at(working(), Budget(0.0))
    assert wrong(report) == {"no-time": Level.WARNING}
    assert "The first ul steps of a trial" in report.findings[0].message


def test_without_ul_steps_there_is_nothing_to_rehearse() -> None:
    assert looked_at(working(), ul_learning_rate=0.0).findings == []


def test_a_problem_without_a_minimum_recommends_nothing_that_is_not_finite() -> None:
    report = looked_at(working(ll_objective=unbounded))
    ImplicitSettings(**report.recommended)


# ---- what is recommended is no worse than what it replaces

PROBLEMS: dict[str, tuple[Callable[[], BilevelProblem], dict[str, Any], bool]] = {
    "fine": (working, {}, False),
    "an ll rate far too small": (sgd, {"ll_learning_rate": 1e-4}, True),
    "an ll rate that diverges": (sgd, {"ll_learning_rate": 5.0}, True),
    "a ul rate far too small": (working, {"ul_learning_rate": 1e-6, "adapt_ul_learning_rate": False}, False),
    "a series that is not solved": (working, {"solver": "neumann", "step_size": 1e-4}, False),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_trial_with_the_recommended_settings_does_at_least_as_well(name: str) -> None:
    problem, own, clearly = PROBLEMS[name]
    recommended = check(problem(), ImplicitSettings(**own)).recommended

    def loss(config: dict[str, Any]) -> float:
        trial = Trial(lambda _: problem(), config)
        finish(trial)
        return float(trial.record["select_loss"])

    before, after = loss(own), loss(own | recommended)
    assert after <= 1.01 * before
    if clearly:
        assert after < 0.95 * before
