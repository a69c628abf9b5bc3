"""A search that is killed goes on as if it had not been; `benchmarks/kill.py` has every point on every storage."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.databases import databases, why_not
from tests.support.kills import (
    DOUBLE,
    POINTS,
    SIGNALS,
    Kill,
    Plan,
    end_of,
    has_no_place,
    run_plan,
    toll_of,
)

# After a kill while the journal's lock is held, Optuna waits for half a minute.
SLOW = ("in a write", "half a line")
KILLED = [point for point in POINTS if point not in (*SIGNALS, *SLOW)]
N_TRIALS = len(KILLED)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """How the trials of the search end that is left alone."""
    plan = Plan(str(tmp_path_factory.mktemp("alone") / "found"), n_trials=N_TRIALS)
    run_plan(plan)
    return end_of(plan)


def first(alone: dict[int, Any], n_trials: int) -> dict[int, Any]:
    return {number: end for number, end in alone.items() if number < n_trials}


def plan_in(output: Path, *points: str, **how: Any) -> Plan:
    """Return a search that is killed at one point after the other, each in the next trial."""
    kills = []
    for number, point in enumerate(points):
        kills += [Kill("in a report", number)] if point in DOUBLE else []
        kills += [Kill(point, number)]
    return Plan(str(output), kills, **{"n_trials": len(points), "settle_s": 0.1} | how)


def check(plan: Plan, alone: dict[int, Any]) -> None:
    """Run a plan, and check that its trials end as in a search that was left alone."""
    toll = toll_of(plan, {number: end for number, end in alone.items() if number < plan.n_trials})
    assert toll.statuses == plan.statuses
    assert toll.nothing, toll


def test_a_search_that_is_killed_at_every_point_ends_in_the_same_bits(alone: dict[int, Any], output: Path) -> None:
    check(plan_in(output, *KILLED), alone)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "grpc"])
def test_so_does_one_whose_study_is_in_a_database(alone: dict[int, Any], tmp_path: Path, kind: str) -> None:
    if (why := why_not(kind)) is not None:
        pytest.skip(why)
    points = [point for point in ("in a write", "in a report") if not has_no_place(point, "optuna", kind)]
    with databases(kind, tmp_path) as storage:
        check(plan_in(tmp_path / "found", *points, storage=storage), alone)


def test_so_does_one_on_ray_whose_driver_is_killed(alone: dict[int, Any], output: Path) -> None:
    check(plan_in(output, "in a report", engine="ray"), alone)


def test_so_does_one_that_is_asked_to_end(alone: dict[int, Any], output: Path) -> None:
    check(plan_in(output, "SIGTERM in a step", "Ctrl-C in a step"), alone)


def test_the_last_trial_is_listed_where_only_that_was_missing(alone: dict[int, Any], output: Path) -> None:
    check(plan_in(output, "after tell"), alone)


def test_a_trial_ends_at_the_report_at_which_its_pruner_has_stopped_it(tmp_path: Path) -> None:
    # In its last save, or in the report itself, with no save since the trial began.
    how = {"prune_at": 4, "saves": False}
    left_alone = Plan(str(tmp_path / "alone"), n_trials=2, **how)
    run_plan(left_alone)
    check(plan_in(tmp_path / "found", "between last report and end", "in a report", **how), end_of(left_alone))
