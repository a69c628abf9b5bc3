"""ImplicitOptunaSearch: by itself, told what Tune would tell it, and in an ordinary Tuner."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from tests.support import toy
from tests.support.toy import on_optuna
from tune_implicit import ImplicitOptunaSearch, InvalidTypeError, InvalidValueError, StorageError
from tune_implicit.searches.borrowed import running_trial
from tune_implicit.searches.leases import Lease, lease_of

pytestmark = pytest.mark.usefixtures("quiet")


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def result(ul_step: int = 2, **changes: Any) -> dict[str, Any]:
    record = {"select_loss": 1.0 / ul_step, "ul_step": ul_step, "completed": False, "done": False}
    return record | {"training_iteration": ul_step // 2, "pid": 1, "config/k": 3} | changes


# ---- how a trial ends


def test_a_completed_trial_has_its_value_and_metrics() -> None:
    searcher = ImplicitOptunaSearch(toy.SPACE)
    assert set(searcher.suggest("a")) == set(toy.SPACE)
    searcher.on_trial_result("a", result(2))
    searcher.on_trial_complete("a", result(4, completed=True, done=True))
    (trial,) = searcher.study.trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.25)
    assert trial.intermediate_values == {2: 0.5, 4: 0.25}
    # Only what the trial itself reports, as on Optuna: none of Tune's own entries.
    assert trial.user_attrs["metrics"] == {"select_loss": 0.25, "ul_step": 4, "completed": True}
    assert lease_of(trial).runs == ("a",)


def test_a_stopped_trial_is_pruned_at_its_last_value() -> None:
    searcher = ImplicitOptunaSearch(toy.SPACE)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, done=True))
    (trial,) = searcher.study.trials
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.25)
    assert "failure" not in trial.user_attrs


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({"result": result(select_loss=math.nan, completed=True)}, "`select_loss` became nan"),
        ({"result": result(select_loss=math.inf, failure="The ll loss became nan.")}, "The ll loss became nan"),
        ({"error": True}, "see Ray Tune's folder of trial a"),
        ({"result": result(), "error": True}, "see Ray Tune's folder of trial a"),
    ],
)
def test_a_trial_without_a_value_fails_with_its_reason(end: dict[str, Any], reason: str) -> None:
    searcher = ImplicitOptunaSearch(toy.SPACE)
    searcher.suggest("a")
    searcher.on_trial_complete("a", **end)
    (trial,) = searcher.study.trials
    assert trial.state is TrialState.FAIL
    assert reason in trial.user_attrs["failure"]
    assert not any(value != value for value in trial.user_attrs["metrics"].values())


@pytest.mark.parametrize("end", [{"result": result()}, {}], ids=["between two reports", "before the first"])
def test_a_trial_that_was_cut_off_goes_back_to_the_queue(end: dict[str, Any]) -> None:
    searcher = ImplicitOptunaSearch(toy.SPACE)
    config = searcher.suggest("a")
    searcher.on_trial_complete("a", **end)
    assert [trial.state for trial in searcher.study.trials] == [TrialState.WAITING]
    assert searcher.suggest("b") == config
    assert lease_of(searcher.study.trials[0]).runs == ("a", "b")


def test_a_study_may_be_ahead_of_a_searcher_that_is_restored(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.journal")
    searcher = ImplicitOptunaSearch(toy.SPACE, storage=storage)
    for name in "abc":
        searcher.suggest(name)
    searcher.on_trial_result("b", result(2))
    searcher.save(str(tmp_path / "searcher"))
    # Told after the file was written, by a driver that was then killed.
    searcher.on_trial_complete("a", result(4, completed=True, done=True))
    searcher.on_trial_result("b", result(4))
    restored = ImplicitOptunaSearch(toy.SPACE, storage=storage)
    restored.restore(str(tmp_path / "searcher"))
    for name in "ab":
        restored.on_trial_result(name, result(4))
        restored.on_trial_complete(name, result(4, completed=True, done=True))
    assert [trial.state.name for trial in restored.study.trials] == ["COMPLETE", "COMPLETE", "RUNNING"]


def test_a_trial_that_another_worker_has_is_told_by_that_one() -> None:
    searcher = ImplicitOptunaSearch(toy.SPACE)
    searcher.suggest("a")
    Lease("another/1/1/a", ("x",)).write(running_trial(searcher.study, searcher.study.trials[0]))
    searcher.on_trial_complete("a", result(4, completed=True, done=True))
    assert [trial.state for trial in searcher.study.trials] == [TrialState.RUNNING]


def test_a_paused_trial_that_its_scheduler_gives_up_is_pruned() -> None:
    searcher = ImplicitOptunaSearch(toy.SPACE)
    searcher.suggest("a")
    searcher.on_trial_result("a", result(2))
    searcher.on_pause("a")
    searcher.on_unpause("a")
    searcher.on_trial_complete("a", None)
    assert (searcher.study.trials[0].state, searcher.study.trials[0].value) == (TrialState.PRUNED, 0.5)


def test_steps_taken_again_after_a_worker_died_are_reported_once() -> None:
    searcher = ImplicitOptunaSearch(toy.SPACE)
    searcher.suggest("a")
    for step in (2, 4, 2, 4, 6):
        searcher.on_trial_result("a", result(step))  # Optuna warns of a step reported twice
    searcher.on_trial_complete("a", result(8, completed=True, done=True))
    assert list(searcher.study.trials[0].intermediate_values) == [2, 4, 6, 8]


def test_a_trial_ends_once() -> None:
    searcher = ImplicitOptunaSearch(toy.SPACE)
    searcher.suggest("a")
    searcher.on_trial_complete("a", error=True)
    searcher.on_trial_complete("a", result(completed=True))
    searcher.on_trial_result("a", result())
    assert states(searcher.study) == ["FAIL"]


def test_a_sampler_may_run_out_of_proposals() -> None:
    searcher = ImplicitOptunaSearch({"k": toy.SPACE["k"]}, sampler=optuna.samplers.GridSampler({"k": [1, 2]}))
    for trial_id in "ab":
        searcher.suggest(trial_id)
        searcher.on_trial_complete(trial_id, result(completed=True))
    assert sorted(trial.params["k"] for trial in searcher.study.trials) == [1, 2]
    assert states(searcher.study) == ["COMPLETE", "COMPLETE"]


# ---- arguments


def test_the_searchs_arguments_are_checked() -> None:
    with pytest.raises(InvalidValueError, match='`mode` must be "min" or "max", got \'best\''):
        ImplicitOptunaSearch(toy.SPACE, mode="best")
    with pytest.raises(InvalidTypeError, match="must be an Optuna distribution"):
        ImplicitOptunaSearch({"k": tune.randint(1, 4)})
    with pytest.raises(StorageError, match="cannot be opened"):
        ImplicitOptunaSearch(toy.SPACE, storage="nowhere://study")


def test_a_url_and_a_path_become_storages(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    for storage in (url, str(tmp_path / "study.journal")):
        ImplicitOptunaSearch(toy.SPACE, storage=storage, study_name="s").suggest("a")
        assert len(ImplicitOptunaSearch(toy.SPACE, storage=storage, study_name="s").study.trials) == 1
    assert len(optuna.load_study(storage=RDBStorage(url), study_name="s").trials) == 1


@pytest.mark.parametrize(
    "space", [toy.SPACE, lambda trial: {"k": trial.suggest_int("k", 1, 9)}], ids=["dict", "lambda"]
)
@pytest.mark.parametrize("storage", [None, "journal", "sqlite"])
def test_a_saved_searcher_goes_on_where_it_was(tmp_path: Path, space: Any, storage: str | None) -> None:
    place = {None: None, "journal": str(tmp_path / "j.log"), "sqlite": f"sqlite:///{tmp_path}/s.db"}[storage]
    searcher = ImplicitOptunaSearch(space, storage=place, seed=0)
    searcher.suggest("a")
    searcher.suggest("b")
    searcher.on_trial_complete("a", result(completed=True))
    searcher.save(str(tmp_path / "searcher"))
    other = ImplicitOptunaSearch(toy.SPACE)
    other.restore(str(tmp_path / "searcher"))
    other.on_trial_complete("b", result(completed=True))
    assert set(other.suggest("c")) == set(searcher.study.trials[0].params)
    assert states(other.study) == ["COMPLETE", "COMPLETE", "RUNNING"]


# ---- in an ordinary Tuner


@pytest.mark.parametrize("changes", [{"metric": "error"}, {"mode": "max"}])
def test_a_tune_config_that_compares_otherwise_is_an_error(tuned: Callable[..., Any], changes: dict[str, str]) -> None:
    with pytest.raises(InvalidValueError, match="Pass the same `metric` and `mode` to both"):
        tuned(ImplicitOptunaSearch(toy.SPACE), **changes)


def test_an_ordinary_tuner_with_failing_trials(tuned: Callable[..., Any]) -> None:
    searcher = ImplicitOptunaSearch(toy.faulty("none", "nan"), seed=0)
    results = tuned(searcher, num_samples=6)
    assert not results.errors  # a trial that diverged is a result, not an error to repeat
    trials = searcher.study.trials
    for trial in trials:
        assert trial.state is {"none": TrialState.COMPLETE, "nan": TrialState.FAIL}[trial.params["fault"]]
        assert ("became nan" in trial.user_attrs.get("failure", "")) == (trial.params["fault"] == "nan")
        assert all(math.isfinite(v) for v in trial.user_attrs["metrics"].values() if not isinstance(v, str))
    assert {"COMPLETE", "FAIL"} == set(states(searcher.study))
    completed = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    for trial in completed:
        # The same params, the same bits, and the same record on both engines.
        twin = on_optuna(trial.params, toy.faulty("none", "nan"))
        assert twin.value == trial.value
        assert twin.user_attrs["metrics"] == trial.user_attrs["metrics"]
        assert twin.intermediate_values == trial.intermediate_values
    assert results.get_best_result().metrics["select_loss"] == min(trial.value for trial in completed)


def test_a_trial_that_asha_stops_is_pruned_at_its_last_value(tuned: Callable[..., Any]) -> None:
    points = [{"k": 3, "ll_learning_rate": rate} for rate in (0.1, 0.05, 0.002, 0.001)]
    searcher = ImplicitOptunaSearch(toy.SPACE, points_to_evaluate=points)
    asha = ASHAScheduler(time_attr="ul_step", grace_period=2, max_t=6, reduction_factor=2)
    tuned(searcher, scheduler=asha)
    pruned = [trial for trial in searcher.study.trials if trial.state is TrialState.PRUNED]
    assert pruned
    assert set(states(searcher.study)) == {"COMPLETE", "PRUNED"}
    for trial in pruned:
        last = trial.user_attrs["metrics"]["ul_step"]
        assert last < 6
        assert trial.value == on_optuna(trial.params).intermediate_values[last]
