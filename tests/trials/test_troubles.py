import math
import warnings
from typing import Any

import pytest
import torch

from tests.support import toy
from tests.support.working import finish
from tune_implicit.errors import DivergedError, LearningWarning
from tune_implicit.trials.record import Record
from tune_implicit.trials.trial import Trial
from tune_implicit.trials.troubles import TROUBLES, TroubleTeller, sentences, troubles_of

CONFIG = {"ul_steps": 6, "ul_steps_per_report": 2, "ll_learning_rate": 0.05}

# The last record of a trial that learned.
LEARNED: Record = {
    "select_loss": 0.5,
    "start_loss": 2.0,
    "kept_ul_step": 90,
    "ul_step": 100,
    "skipped_ul_steps": 0,
    "lagging_ul_steps": 0,
    "ul_rate": 0.02,
    "ul_moved": 0.7,
    "completed": True,
    "ended_by": "steps",
    "solver_status": "converged",
}

# What is otherwise in the record of a trial with that trouble.
SEEN: dict[str, Record] = {
    "failed": {"failure": "The ll loss became nan."},
    "skipped": {"skipped_ul_steps": 50, "solver_status": "negative_curvature"},
    "unmoved": {"ul_moved": 1e-7, "ul_rate": 1e-9},
    "ran-away": {"ul_moved": 1e3},
    "worse": {"select_loss": 3.0},
    "diverged": {"ended_by": "divergence", "divergence": "The ll loss became nan."},
    "lagging": {"lagging_ul_steps": 99},
}


def last_record(**config: Any) -> Record:
    trial = Trial(toy.problem, CONFIG | config)
    finish(trial)
    return trial.record


def told(record: Record) -> list[str]:
    return record["troubles"].split()


# ---- in a trial


@pytest.mark.parametrize("solver", ["minres", "cg", "neumann", "dense"])
def test_trial_that_learns_has_no_trouble(solver: str) -> None:
    record = last_record(solver=solver, ul_steps=20)
    assert record["troubles"] == ""
    assert sentences(record) == {}


def test_trial_without_ul_steps_has_no_trouble() -> None:
    assert told(last_record(ul_learning_rate=0.0)) == []


def test_trial_whose_solves_fail() -> None:
    record = last_record(fault="indefinite", solver="cg", k=1, on_failure="skip", ll_steps=0)
    assert "skipped" in told(record)
    sentence = sentences(record)["skipped"]
    assert "6 of 6 ul steps were skipped" in sentence
    assert "negative_curvature" in sentence
    # And what it says helps.
    record = last_record(fault="indefinite", solver="cg", k=1, on_failure="fallback", ll_steps=0)
    assert "skipped" not in told(record)


def test_trial_whose_ul_values_hardly_move() -> None:
    record = last_record(ul_learning_rate=1e-9, adapt_ul_learning_rate=False)
    assert told(record) == ["unmoved"]
    assert "at a rate of 1e-09" in sentences(record)["unmoved"]


def test_trial_that_its_budget_ended_is_told_of_it() -> None:
    assert told(last_record(max_gradient_evaluations=1)) == []
    record = last_record(ul_learning_rate=1e-9, adapt_ul_learning_rate=False, max_gradient_evaluations=1)
    assert (told(record), record["ended_by"]) == (["unmoved"], "budget")
    assert sentences(record)["unmoved"].endswith("or a larger `max_gradient_evaluations`.")
    spent = LEARNED | {"select_loss": 3.0, "troubles": "worse"}
    assert "first step. Take a smaller `ll_learning_rate`" in sentences(spent)["worse"]
    spent["ended_by"] = "budget"
    assert "take a larger `max_gradient_evaluations`. Or take a smaller `ll_lear" in sentences(spent)["worse"]


def test_trial_whose_ul_values_run_away() -> None:
    record = last_record(ul_learning_rate=100.0, adapt_ul_learning_rate=False, keep="last")
    assert "ran-away" in told(record)


def test_trial_whose_ll_model_does_not_follow() -> None:
    record = last_record(ll_learning_rate=1e-9, ll_steps=2, ul_steps=30, patience=0)
    assert "lagging" in told(record)
    assert f"{record['lagging_ul_steps']} of 30 ul steps" in sentences(record)["lagging"]


def test_trial_that_ends_worse_than_it_began() -> None:
    """Its ll model starts at its best, and is trained away from it."""

    def problem(config: dict[str, Any]) -> toy.BilevelProblem:
        made = toy.problem(config)
        ((x, y),) = made.select_data
        made.ll_model.weight.data.copy_(torch.linalg.lstsq(x, y).solution.T)
        made.ll_model.bias.data.zero_()
        return made

    trial = Trial(problem, CONFIG)
    finish(trial)
    assert told(trial.record) == ["worse"]
    assert f"was {trial.record['start_loss']:.4g} before" in sentences(trial.record)["worse"]


def test_trial_that_diverges_after_a_report() -> None:
    trial = Trial(toy.problem, CONFIG)
    trial.advance()
    trial.problem.ll_model.weight.data.fill_(math.nan)
    assert told(trial.advance()) == ["diverged"]
    assert "its report of ul step 2 is kept. The ll loss became nan" in sentences(trial.record)["diverged"]


def test_trial_that_fails() -> None:
    trial = Trial(toy.problem, CONFIG | {"fault": "nan"})
    with pytest.raises(DivergedError) as raised:
        trial.advance()
    record = trial.failure_record(str(raised.value))
    assert told(record) == ["failed"]
    assert sentences(record) == {"failed": f"The trial failed: {raised.value}"}


# ---- in a record


def test_every_trouble_is_tried() -> None:
    assert set(SEEN) == set(TROUBLES)
    assert troubles_of(LEARNED) == []


@pytest.mark.parametrize("name", SEEN)
def test_trouble_is_found_and_told(name: str) -> None:
    record = LEARNED | SEEN[name]
    assert troubles_of(record) == [name]
    (sentence,) = sentences(record | {"troubles": name}).values()
    assert sentence.endswith(".")
    assert "{" not in sentence


@pytest.mark.parametrize("name", SEEN)
def test_trial_that_goes_on_may_yet_move_and_get_better(name: str) -> None:
    record = LEARNED | SEEN[name] | {"completed": False}
    assert troubles_of(record) == ([] if name in ("unmoved", "worse") else [name])


def test_several_troubles_are_told_together() -> None:
    record = LEARNED | SEEN["worse"] | SEEN["lagging"]
    assert troubles_of(record) == ["worse", "lagging"]
    assert list(sentences(record | {"troubles": "worse lagging"})) == ["worse", "lagging"]


def test_few_skipped_or_lagging_steps_are_no_trouble() -> None:
    assert troubles_of(LEARNED | {"skipped_ul_steps": 3, "lagging_ul_steps": 20}) == []


def test_what_a_record_does_not_say_is_no_trouble() -> None:
    without = {name: value for name, value in LEARNED.items() if name not in ("ul_rate", "ul_moved", "start_loss")}
    assert troubles_of(without) == []


def test_records_of_other_versions_are_read() -> None:
    assert sentences({"ul_step": 3}) == {}
    assert sentences({"troubles": "unheard-of"}) == {}


# ---- as warnings


def test_each_kind_is_warned_of_once() -> None:
    teller, record = TroubleTeller(), LEARNED | SEEN["unmoved"] | {"troubles": "unmoved"}
    with pytest.warns(LearningWarning, match=r"^Trial 3 did not learn as it should \(unmoved\)\. The ul values hardly"):
        teller.tell(record, "Trial 3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teller.tell(record, "Trial 4")
        teller.tell(LEARNED | {"troubles": ""}, "Trial 5")
    with pytest.warns(LearningWarning, match=r"\(lagging\)") as caught:
        teller.tell(record | SEEN["lagging"] | {"troubles": "unmoved lagging"})
    assert len(caught) == 1
    with pytest.warns(LearningWarning, match=r"\(unmoved\)"):
        TroubleTeller().tell(record)  # another search


def test_how_far_ul_values_move_is_measured_by_their_own_size() -> None:
    small, large = LEARNED | {"ul_moved": 7e-4, "ul_scale": 1e-4}, LEARNED | {"ul_moved": 577.0, "ul_scale": 75.0}
    assert troubles_of(small) == troubles_of(large) == []
    assert troubles_of(small | {"ul_scale": 0.0}) == ["unmoved"]
    assert troubles_of(large | {"ul_scale": 0.0}) == ["ran-away"]


def test_ul_values_that_are_not_finite_have_run_away() -> None:
    without = {name: value for name, value in LEARNED.items() if name != "ul_moved"}
    assert troubles_of(without) == ["ran-away"]
    assert "by inf (root mean square)" in sentences(without | {"troubles": "ran-away"})["ran-away"]
