import ast
import json
import math

import pytest

from tests.support.working import SETTINGS, LearningRate, working
from tune_implicit import ImplicitSettings, check
from tune_implicit.checks.findings import CheckReport, Finding, Level, StopCheckError


def test_a_report_without_findings_passes() -> None:
    report = CheckReport()
    assert report.passed
    assert report.details == "passed\nrecommended settings: {}"
    assert json.loads(report.to_json()) == {"passed": True, "findings": [], "figures": {}, "recommended": {}}


def test_faults_alone_keep_a_report_from_passing() -> None:
    report = CheckReport()
    report.ok("one", "is well")
    report.warn("two", "wants to be read")
    assert report.passed
    report.fault("three", "is broken")
    assert not report.passed
    assert report.faults == [Finding("three", Level.FAULT, "is broken")]
    assert [finding.name for finding in report.findings] == ["one", "two", "three"]


def test_a_fault_that_stops_is_a_fault_as_well() -> None:
    report = CheckReport()
    with pytest.raises(StopCheckError):
        report.stop("one", "is broken")
    assert report.faults == [Finding("one", Level.FAULT, "is broken")]


@pytest.mark.parametrize(
    ("faults", "warnings", "verdict"),
    [
        (0, 0, "passed"),
        (0, 1, "passed, 1 to be read"),
        (1, 0, "1 fault"),
        (2, 3, "2 faults, 3 to be read"),
    ],
)
def test_the_line_before_the_last_counts_faults_and_warnings(faults: int, warnings: int, verdict: str) -> None:
    report = CheckReport()
    report.ok("name", "is well")
    for _ in range(faults):
        report.fault("name", "is broken")
    for _ in range(warnings):
        report.warn("name", "wants to be read")
    assert str(report).splitlines()[-2] == verdict


def test_a_long_message_is_wrapped_below_itself() -> None:
    report = CheckReport()
    report.warn("name", "word " * 30)
    first, second, _verdict, _recommended = report.details.splitlines()
    assert first.startswith("warning name                word word")
    assert second.startswith(" " * 28 + "word")
    assert max(len(first), len(second)) <= 120


def test_a_figure_that_is_not_finite_is_null_in_json() -> None:
    figures = {"k_cg": 4.0, "k_minres": math.inf, "k_neumann": math.nan}
    assert json.loads(CheckReport(figures=figures).to_json())["figures"] == {
        "k_cg": 4.0,
        "k_minres": None,
        "k_neumann": None,
    }


def test_the_report_as_text_and_as_json() -> None:
    report = check(working(select_data=None, ul_model=LearningRate()), SETTINGS)
    lines = str(report).splitlines()
    assert lines[0].startswith("Not ready: 1 thing must be mended first (a hyperparameter can be searched for, but not")
    assert lines[-2] == "1 fault, 1 to be read"
    assert max(map(len, lines[:-1])) <= 120
    assert any(line.startswith("FAULT   learning-rate ") for line in lines)
    told = json.loads(report.to_json())
    assert told["passed"] is False
    assert {"name", "level", "message"} == set(told["findings"][0])
    assert told["figures"]["lambda_max"] > 0
    assert (
        ast.literal_eval(lines[-1].removeprefix("recommended settings: ")) == told["recommended"] == report.recommended
    )


def test_the_last_line_can_be_pasted_as_settings() -> None:
    report = CheckReport()
    report.recommend(k=5, adapt_ul_learning_rate=True, ul_learning_rate=0.01)
    report.recommend(solver="minres", ll_steps="auto", k=10)
    last = str(report).splitlines()[-1]
    assert last == (
        'recommended settings: {"solver": "minres", "k": 10, "ul_learning_rate": 0.01, "adapt_ul_learning_rate": True, '
        '"ll_steps": "auto"}'
    )
    assert ast.literal_eval(last.removeprefix("recommended settings: ")) == report.recommended
    assert ImplicitSettings(**report.recommended).k == 10


def test_what_there_was_no_time_for_is_a_warning() -> None:
    report = CheckReport()
    report.no_time("The Hessian")
    (finding,) = report.findings
    assert (finding.name, finding.level) == ("no-time", Level.WARNING)
    assert finding.message.startswith("The Hessian: not looked at for lack of time. Take `thorough=True`")
