"""What a trial writes into its study, and what that says of its end."""

import json
import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from tune_implicit import InvalidValueError
from tune_implicit.searches.outcome import (
    CUT_OFF,
    Outcome,
    failure_of,
    is_interrupted,
    outcome_of,
    write_config,
    write_failure,
    write_outcome,
)

RECORD = {"select_loss": 0.5, "hvps": 3, "completed": True, "solver_status": "converged"}
# As version 0.2 wrote it, which knew no attribute: a study of its must still be read.
SAID_BY_0_2 = "The search ended before the trial did."


def ask() -> optuna.Trial:
    return optuna.create_study().ask()


# ---- how a trial ended


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, Outcome(TrialState.COMPLETE)),
        ({"completed": False}, Outcome(TrialState.PRUNED)),
        ({"failure": "diverged"}, Outcome(TrialState.FAIL, "diverged")),
        ({"failure": "diverged", "completed": False}, Outcome(TrialState.FAIL, "diverged")),
        ({"select_loss": math.inf}, Outcome(TrialState.FAIL, "`select_loss` became inf.")),
        ({"select_loss": math.nan, "completed": False}, Outcome(TrialState.FAIL, "`select_loss` became nan.")),
    ],
)
def test_each_end_of_a_trial_has_its_outcome(changes: dict[str, Any], outcome: Outcome) -> None:
    assert outcome_of(RECORD | changes, "select_loss") == outcome


def test_a_record_that_does_not_say_so_is_of_a_completed_trial() -> None:
    assert outcome_of({"loss": 1.0}, "loss") == Outcome(TrialState.COMPLETE)


def test_why_a_record_has_no_value() -> None:
    record = RECORD | {"half": np.float32(0.5)}
    assert failure_of(record, "select_loss") is None
    assert failure_of(record, "half") is None
    assert failure_of(record | {"failure": "diverged"}, "unknown") == "diverged"
    assert failure_of(record | {"select_loss": math.inf}, "select_loss") == "`select_loss` became inf."


@pytest.mark.parametrize("metric", ["unknown", "solver_status", "completed"])
def test_a_metric_that_is_no_number_of_the_record_is_an_error(metric: str) -> None:
    for told in (failure_of, outcome_of):
        with pytest.raises(InvalidValueError, match=rf"{metric!r} is reported .* reports hvps, select_loss\."):
            told(RECORD, metric)


# ---- what is written


def test_a_config_that_is_its_params_is_not_written_twice() -> None:
    trial = ask()
    write_config(trial, {"k": trial.suggest_int("k", 1, 4)})
    assert trial.user_attrs == {}


def test_a_config_that_is_not_the_params_is_written() -> None:
    trial = ask()
    write_config(trial, {"width": np.int64(64), "lr": np.float32(0.5), "layers": [1, 2], "model": object})
    config = trial.user_attrs["config"]
    assert {**config, "model": None} == {"width": 64, "lr": 0.5, "layers": [1, 2], "model": None}
    assert config["model"] == "<class 'object'>"


def test_an_outcome_is_what_json_can_hold() -> None:
    trial = ask()
    record = {"loss": 0.5, "nan": math.nan, "inf": math.inf, "nested": {"a": 1}, "status": "cg", "k": 3, "done": True}
    write_outcome(trial, record, Outcome(TrialState.FAIL, "diverged"))
    assert trial.user_attrs == {
        "metrics": {"loss": 0.5, "status": "cg", "k": 3, "done": True},
        "failure": "diverged",
    }
    json.dumps(trial.user_attrs, allow_nan=False)


@pytest.mark.parametrize(
    ("outcome", "written"),
    [
        (Outcome(TrialState.COMPLETE), {}),
        (Outcome(TrialState.PRUNED), {}),
        (Outcome(TrialState.FAIL, "diverged"), {"failure": "diverged"}),
        (CUT_OFF, {"failure": SAID_BY_0_2, "interrupted": True}),
    ],
)
def test_only_what_failed_has_a_reason_written(outcome: Outcome, written: dict[str, Any]) -> None:
    trial = ask()
    write_failure(trial, outcome)
    assert trial.user_attrs == written


def test_what_a_record_says_of_how_a_trial_did_not_learn_is_written() -> None:
    trial = ask()
    record = RECORD | {"failure": "The ll loss became nan.", "troubles": "failed", "ul_moved": math.inf}
    write_outcome(trial, record, Outcome(TrialState.FAIL, "The ll loss became nan."))
    assert trial.user_attrs["troubles"] == {"failed": "The trial failed: The ll loss became nan."}
    assert trial.user_attrs["metrics"]["troubles"] == "failed"


def test_of_a_trial_that_learned_no_troubles_are_written() -> None:
    trial = ask()
    write_outcome(trial, RECORD | {"troubles": ""}, Outcome(TrialState.COMPLETE))
    assert set(trial.user_attrs) == {"metrics"}


# ---- whether a trial was cut off


@pytest.mark.parametrize("failure", [SAID_BY_0_2, "Someone found better words since.", None])
def test_a_trial_with_the_attribute_was_interrupted_whatever_its_failure_says(failure: str | None) -> None:
    trial = create_trial(state=TrialState.FAIL, user_attrs={"failure": failure, "interrupted": True})
    assert is_interrupted(trial)


@pytest.mark.parametrize("more", ["", " It raised MistakeError: the factory is wrong"])
def test_a_trial_that_version_0_2_cut_off_was_interrupted(more: str) -> None:
    assert is_interrupted(create_trial(state=TrialState.FAIL, user_attrs={"failure": SAID_BY_0_2 + more}))


@pytest.mark.parametrize(
    "attributes", [{}, {"failure": "The ll loss became nan."}, {"failure": SAID_BY_0_2, "interrupted": False}]
)
def test_a_trial_that_failed_by_itself_was_not_interrupted(attributes: dict[str, Any]) -> None:
    assert not is_interrupted(create_trial(state=TrialState.FAIL, user_attrs=attributes))


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.WAITING])
def test_only_a_trial_that_failed_was_interrupted(state: TrialState) -> None:
    value = 1.0 if state is TrialState.COMPLETE else None
    assert not is_interrupted(create_trial(state=state, value=value, user_attrs={"interrupted": True}))


def test_a_trial_cut_off_is_read_as_interrupted() -> None:
    study = optuna.create_study()
    trial = study.ask()
    write_failure(trial, CUT_OFF)
    study.tell(trial, state=CUT_OFF.state)
    assert is_interrupted(study.trials[0])
