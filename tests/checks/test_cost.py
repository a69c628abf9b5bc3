import pytest
import torch

from tests.support.broken import seen_by, settings
from tests.support.problems import indefinite, quadratic
from tests.support.working import working
from tune_implicit import BilevelProblem
from tune_implicit.checks.cost import look_at_cost
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
    fixed, _ = looked_at(case.problem, warmup_ll_steps=7)
    assert torch.equal(fixed.problem.ll_model.w, case.problem.ll_model.w)
    assert not torch.equal(fixed.problem.ul_model.ul, case.problem.ul_model.ul)


@pytest.mark.parametrize("policy", ["raise", "stop"])
def test_a_solve_that_fails_is_timed_all_the_same(policy: str) -> None:
    _, report = looked_at(indefinite().problem, on_failure=policy, failures_to_stop=1)
    assert [finding.name for finding in report.findings] == ["cost"]
