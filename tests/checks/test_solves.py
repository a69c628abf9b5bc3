import math
from functools import partial
from typing import Any

import pytest

from tests.support.broken import seen_by, settings, wrong
from tests.support.problems import indefinite
from tests.support.working import working
from tune_implicit import BilevelProblem
from tune_implicit.checks.budget import Budget
from tune_implicit.checks.findings import CheckReport, Level
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.checks.solves import look_at_solves

seen = partial(seen_by, look_at_solves)
SERIES = {"solver": "neumann", "step_size": 1e-3, "k": 5, "warm_start": False}


def looked_at(problem: BilevelProblem, budget: Budget | None = None, **changes: Any) -> CheckReport:
    report = CheckReport(figures={"ll_step_s": 1e-3, "ul_step_s": 1e-2, "hvp_s": 1e-3})
    look_at_solves(FixedProblem.of(problem, settings(**changes), budget), report)
    return report


def test_a_solver_that_is_good_enough_is_recommended_by_name_with_the_least_k() -> None:
    report = seen(working())
    assert [(finding.name, finding.level) for finding in report.findings] == [("solves", Level.OK)]
    assert report.recommended["solver"] == "cg"
    assert report.recommended["k"] < 20
    assert report.figures["hypergradient_error"] < 1e-3
    assert "step_size" not in report.recommended


def test_a_series_that_is_hardly_more_than_its_first_term_is_a_fault_that_names_what_mends_it() -> None:
    report = seen(working(), settings(**SERIES))
    (fault,) = report.faults
    assert fault.name == "residual-near-one"
    assert "would be better" in fault.message
    assert report.figures["relative_residual"] > 0.9
    got = looked_at(working(), **SERIES | report.recommended)
    assert wrong(got) == {}
    assert got.figures["hypergradient_error"] < 0.1


def test_the_identity_is_judged_by_its_residual_as_well() -> None:
    assert "residual-near-one" in wrong(seen(working(), settings(**SERIES | {"k": 0})))


def test_a_step_size_is_recommended_where_the_series_is() -> None:
    recommended = seen(working(), settings(solver="neumann", step_size="auto", k=20)).recommended
    assert recommended["solver"] in {"neumann", "minres"}
    assert ("step_size" in recommended) == (recommended["solver"] == "neumann")


def test_a_solver_that_fails_is_not_recommended() -> None:
    report = looked_at(indefinite().problem, solver="cg", ll_steps=0)
    assert report.recommended["solver"] == "minres"
    assert wrong(report) == {"solves": Level.WARNING}
    assert "failed" in report.findings[0].message


def test_without_time_for_a_round_it_says_so() -> None:
    report = looked_at(working(), Budget(0.0))
    assert wrong(report) == {"no-time": Level.WARNING}
    assert report.recommended == {}


def test_in_little_time_the_settings_are_looked_at_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "affords", lambda self, each_s, most: 1)
    report = looked_at(working(), Budget(0.0))
    assert report.recommended == {"solver": "cg", "k": 5}
    assert math.isfinite(report.figures["relative_residual"])
    assert "hypergradient_error" not in report.figures


def test_without_ul_steps_there_are_no_solves() -> None:
    report = looked_at(working(), ul_learning_rate=0.0)
    assert report.findings == []
    assert report.recommended == {}
