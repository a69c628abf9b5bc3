"""ImplicitTrainable and ImplicitOptunaSearch in an ordinary Tuner, and ``search`` on Ray."""

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from tests.support import toy
from tune_implicit import (
    ImplicitObjective,
    ImplicitOptunaSearch,
    ImplicitTrainable,
    InvalidTypeError,
    InvalidValueError,
    StorageError,
    search,
)
from tune_implicit.searches.outcome import CUT_OFF

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def run_tuner(output: Path, search_alg: Any = None, space: Any = None, **arguments: Any) -> Any:
    trainable = tune.with_parameters(ImplicitTrainable, problem=toy.problem, mode=arguments.get("mode", "min"))
    arguments = {"metric": "select_loss", "mode": "min", "num_samples": 4, "reuse_actors": True} | arguments
    return tune.Tuner(
        trainable,
        param_space=toy.SETTINGS | (space or {}),
        tune_config=tune.TuneConfig(search_alg=search_alg, max_concurrent_trials=2, **arguments),
        run_config=tune.RunConfig(storage_path=str(output), name="ray", verbose=0),
    ).fit()


def on_optuna(params: dict[str, Any], space: Any = None) -> FrozenTrial:
    study = optuna.create_study()
    study.enqueue_trial(params)
    study.optimize(ImplicitObjective(toy.problem, space or toy.SPACE, settings=toy.SETTINGS), n_trials=1)
    return study.trials[0]


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def result(ul_step: int = 2, **changes: Any) -> dict[str, Any]:
    record = {"select_loss": 1.0 / ul_step, "ul_step": ul_step, "completed": False, "done": False}
    return record | {"training_iteration": ul_step // 2, "pid": 1, "config/k": 3} | changes


# The searcher by itself.


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
    assert trial.user_attrs["ray_trial_id"] == "a"


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
        ({"result": result()}, CUT_OFF.failure),
        ({}, CUT_OFF.failure),
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


def test_a_define_by_run_space_returns_the_whole_config() -> None:
    def space(trial: optuna.Trial) -> dict[str, Any]:
        return {"ll_learning_rate": 10 ** trial.suggest_float("exponent", -3, -1)}

    searcher = ImplicitOptunaSearch(space)
    config = searcher.suggest("a")
    (trial,) = searcher.study.trials
    assert config == trial.user_attrs["config"] == {"ll_learning_rate": 10 ** trial.params["exponent"]}


def test_a_define_by_run_space_that_returns_nothing_means_its_params() -> None:
    searcher = ImplicitOptunaSearch(lambda trial: trial.suggest_int("k", 1, 4) and None)
    assert searcher.suggest("a") == searcher.study.trials[0].params


def test_a_define_by_run_space_that_returns_something_else_is_an_error() -> None:
    with pytest.raises(InvalidTypeError, match=r"`space\(trial\)` must return the config as a dict"):
        ImplicitOptunaSearch(lambda trial: trial.suggest_int("k", 1, 4)).suggest("a")


def test_the_searchs_arguments_are_checked() -> None:
    with pytest.raises(InvalidValueError, match='`mode` must be "min" or "max", got \'best\''):
        ImplicitOptunaSearch(toy.SPACE, mode="best")
    with pytest.raises(InvalidTypeError, match="must be an Optuna distribution"):
        ImplicitOptunaSearch({"k": tune.randint(1, 4)})
    with pytest.raises(StorageError, match="cannot be opened"):
        ImplicitOptunaSearch(toy.SPACE, storage="nowhere://study")


@pytest.mark.parametrize("changes", [{"metric": "error"}, {"mode": "max"}])
def test_a_tune_config_that_compares_otherwise_is_an_error(tmp_path: Path, changes: dict[str, str]) -> None:
    with pytest.raises(InvalidValueError, match="Pass the same `metric` and `mode` to both"):
        run_tuner(tmp_path, ImplicitOptunaSearch(toy.SPACE), **changes)


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


def test_a_url_and_a_path_become_storages(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    for storage in (url, str(tmp_path / "study.journal")):
        ImplicitOptunaSearch(toy.SPACE, storage=storage, study_name="s").suggest("a")
        assert len(ImplicitOptunaSearch(toy.SPACE, storage=storage, study_name="s").study.trials) == 1
    assert len(optuna.load_study(storage=RDBStorage(url), study_name="s").trials) == 1


# The trainable by itself.


def trainable(**config: Any) -> ImplicitTrainable:
    made = tune.with_parameters(ImplicitTrainable, problem=toy.problem)
    return made(config=toy.SETTINGS | toy.PARAMS | config)


def test_a_trainable_reports_what_optuna_gets() -> None:
    expected = on_optuna(toy.PARAMS)
    one = trainable()
    records = [one.train() for _ in range(3)]
    assert {record["ul_step"]: record["select_loss"] for record in records} == expected.intermediate_values
    assert [record["done"] for record in records] == [False, False, True]


def test_a_checkpoint_restores_exactly(tmp_path: Path) -> None:
    one = trainable()
    one.train()
    one.save(str(tmp_path))
    other = trainable()
    other.restore(str(tmp_path))
    assert [one.train()["select_loss"] for _ in range(2)] == [other.train()["select_loss"] for _ in range(2)]


def test_a_reused_worker_begins_a_fresh_trial() -> None:
    one = trainable()
    one.train()
    config = toy.SETTINGS | {"k": 1, "ll_learning_rate": 0.05}
    assert one.reset(config)
    assert one.train()["select_loss"] == trainable(k=1, ll_learning_rate=0.05).train()["select_loss"]


@pytest.mark.parametrize("reused", [False, True])
def test_a_trial_that_loads_a_donors_checkpoint_keeps_its_own_settings(tmp_path: Path, reused: bool) -> None:
    donor = trainable(tolerance=1e-3)
    donor.train()
    donor.save(str(tmp_path))
    own = {"k": 7, "ll_learning_rate": 0.05, "ul_learning_rate": 0.5, "tolerance": 1e-6}
    heir = donor if reused else trainable(**own)
    if reused:
        assert heir.reset(toy.SETTINGS | own)
    heir.restore(str(tmp_path))
    trainer = heir._trial.trainer
    assert (trainer.ul_step, len(heir._trial.history)) == (2, 1)
    assert trainer._ll_optimizer.param_groups[0]["lr"] == 0.05
    assert trainer._ul_optimizer.param_groups[0]["lr"] == 0.5
    solver = trainer._implicit._inverse_hvp._settings.make_solver(0.05)
    assert (solver.k, solver.tolerance) == (7, 1e-6)
    heir.train()
    assert trainer._ll_optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize(("mode", "worst"), [("min", math.inf), ("max", -math.inf)])
def test_a_failed_trial_is_the_worst_by_its_mode(mode: str, worst: float) -> None:
    # A scheduler that saw +inf as the best accuracy would stop every other trial.
    made = tune.with_parameters(ImplicitTrainable, problem=toy.problem, mode=mode)
    record = made(config=toy.SETTINGS | {"fault": "nan"}).train()
    assert record["done"]
    assert "became nan" in record["failure"]
    assert record["select_loss"] == record["error"] == worst


# Whole runs.


def test_an_ordinary_tuner_with_failing_trials(tmp_path: Path) -> None:
    searcher = ImplicitOptunaSearch(toy.faulty("none", "nan"), seed=0)
    results = run_tuner(tmp_path, searcher, num_samples=6)
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


def test_a_trial_that_asha_stops_is_pruned_at_its_last_value(tmp_path: Path) -> None:
    points = [{"k": 3, "ll_learning_rate": rate} for rate in (0.1, 0.05, 0.002, 0.001)]
    searcher = ImplicitOptunaSearch(toy.SPACE, points_to_evaluate=points)
    asha = ASHAScheduler(time_attr="ul_step", grace_period=2, max_t=6, reduction_factor=2)
    run_tuner(tmp_path, searcher, scheduler=asha)
    pruned = [trial for trial in searcher.study.trials if trial.state is TrialState.PRUNED]
    assert pruned
    assert set(states(searcher.study)) == {"COMPLETE", "PRUNED"}
    for trial in pruned:
        last = trial.user_attrs["metrics"]["ul_step"]
        assert last < 6
        assert trial.value == on_optuna(trial.params).intermediate_values[last]


def test_tunes_own_search_space_and_variant_generator(tmp_path: Path) -> None:
    space = {"k": tune.grid_search([1, 3]), "ll_learning_rate": tune.loguniform(0.01, 0.02)}
    results = run_tuner(tmp_path, space=space, num_samples=1)
    assert not results.errors
    assert sorted(result.config["k"] for result in results) == [1, 3]
    assert all(result.metrics["completed"] for result in results)


def test_population_based_training_ends_without_errors(tmp_path: Path) -> None:
    pbt = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=2,
        hyperparam_mutations={"ll_learning_rate": tune.loguniform(1e-3, 1e-1), "k": [1, 3, 8]},
        quantile_fraction=0.5,
        synch=True,
    )
    space = {"ul_steps": 12, "k": 3, "ll_learning_rate": tune.grid_search([1e-4, 0.05])}
    results = run_tuner(tmp_path, space=space, scheduler=pbt, num_samples=1)
    assert not results.errors
    assert pbt._num_perturbations > 0
    assert all(result.metrics["ul_step"] == 12 for result in results)


def test_search_ends_with_the_mistake_of_a_trial(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(toy.MistakeError) as caught:
        search(toy.problem, toy.faulty("mistake at once"), settings=toy.SETTINGS, n_trials=4, output=tmp_path / "s")
    # As the trial raised it: no remote traceback in its text.
    assert str(caught.value) == "the factory is wrong"
    assert not caplog.records
    # Nothing finished, so that the next call may begin afresh.
    found = search(
        toy.problem,
        {"fault": CategoricalDistribution(["none"]), **toy.SPACE},
        settings=toy.SETTINGS,
        n_trials=3,
        output=tmp_path / "s",
    )
    assert [trial.state for trial in found.trials] == ["complete"] * 3
    assert [trial.number for trial in found.trials] == [0, 1, 2]
    problem = toy.problem({"fault": "none"})
    problem.ul_model.load_state_dict(found.best.ul_state)
    assert found.best.history[-1]["select_loss"] == found.best.value


def test_search_goes_on_after_a_trial_whose_worker_dies_each_time(tmp_path: Path) -> None:
    def problem(config: Any) -> Any:
        if config["fault"] == "death":
            os._exit(1)
        return toy.problem(config)

    sampler = optuna.samplers.GridSampler({"fault": ["death", "none"]}, seed=0)
    space = {"fault": CategoricalDistribution(["death", "none"])}
    found = search(problem, space, settings=toy.SETTINGS, n_trials=2, output=tmp_path / "s", sampler=sampler)
    assert {trial.config["fault"]: trial.state for trial in found.trials} == {"death": "failed", "none": "complete"}
    assert not found.interrupted
    (failed,) = (trial for trial in found.trials if trial.state == "failed")
    assert "lost its worker" in failed.failure


def test_a_search_tells_once_that_select_data_is_missing(tmp_path: Path) -> None:
    # The workers say it too, but a search keeps their output off the terminal.
    with pytest.warns(UserWarning, match=r"Without `select_data`.*Hold out a third split") as told:
        search(toy.two_splits, toy.SPACE, settings=toy.SETTINGS, n_trials=2, output=tmp_path / "s")
    assert len(told) == 1
