"""ImplicitTrainable: by itself, and in an ordinary Tuner."""

import errno
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search import Repeater
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor

from tests.support import toy
from tests.support.noisy import assert_same_bits
from tests.support.problems import F64
from tests.support.toy import on_optuna
from tests.support.working import finish
from tune_implicit import (
    BilevelProblem,
    ImplicitTrainable,
    InvalidTypeError,
    InvalidValueError,
    LearningWarning,
    State,
    StorageError,
)
from tune_implicit.searches.engines.ray_tune.borrowed import REPEAT, SAVE_NOW
from tune_implicit.trials.checkpoint import CHECKPOINT_FILE, read_checkpoint
from tune_implicit.trials.trial import Trial

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:This API is deprecated:DeprecationWarning"),  # Ray 2.52's own loggers
]


Make = Callable[..., ImplicitTrainable]


@pytest.fixture
def trainable() -> Iterator[Make]:
    """Make a trainable of a config, and of what `setup` may have besides, which is ``passed``."""
    made = []

    def make(
        problem: Any = toy.problem,
        metric: str = "select_loss",
        mode: str = "min",
        passed: dict[str, Any] | None = None,
        **config: Any,
    ) -> ImplicitTrainable:
        passed = tune.with_parameters(ImplicitTrainable, problem=problem, metric=metric, mode=mode, **(passed or {}))
        made.append(passed(config=toy.SETTINGS | toy.PARAMS | config))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def test_a_trainable_reports_what_optuna_gets(trainable: Make) -> None:
    expected = on_optuna(toy.PARAMS)
    one = trainable()
    records = [one.train() for _ in range(3)]
    assert {record["ul_step"]: record["select_loss"] for record in records} == expected.intermediate_values
    assert [record["done"] for record in records] == [False, False, True]


def test_a_checkpoint_restores_exactly(trainable: Make, tmp_path: Path) -> None:
    one = trainable()
    one.train()
    one.save(str(tmp_path))
    other = trainable()
    other.restore(str(tmp_path))
    assert [one.train()["select_loss"] for _ in range(2)] == [other.train()["select_loss"] for _ in range(2)]


@pytest.mark.filterwarnings("ignore:A trial did not learn as it should:tune_implicit.LearningWarning")
@pytest.mark.parametrize("reports", [1, 2, 3, 4])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_trial_that_is_restored_keeps_what_it_would_have_kept(
    trainable: Make, tmp_path: Path, keep: str, reports: int
) -> None:
    # Its second report is its best; two later its patience ends.
    config = {"fault": "past", "patience": 2, "ul_steps": 40, "ll_steps": 10, "keep": keep}
    one, records = trainable(**config), []
    while not (records and records[-1]["done"]):
        records.append(one.train())
        if len(records) == reports:
            one.save(str(tmp_path / "half"))
    losses = [record["select_loss"] for record in one._trial.history]
    assert (len(records), losses.index(min(losses))) == (4, 1)
    assert records[-1]["select_loss"] == (min(losses) if keep == "best" else losses[-1])
    one.save(str(tmp_path / "one"))

    other = trainable(**config)
    other.restore(str(tmp_path / "half"))
    assert other._trial.completed is (reports == 4)
    more = [other.train() for _ in range(4 - reports)]
    told = ("select_loss", "error", "ul_step", "completed", "ended_by", "kept_value", "last_value", "troubles", "done")
    assert [[record[name] for name in told] for record in more] == [
        [record[name] for name in told] for record in records[reports:]
    ]
    other.save(str(tmp_path / "other"))
    saved = (read_checkpoint(tmp_path / name / CHECKPOINT_FILE)["kept"] for name in ("one", "other"))
    assert_same_bits(*saved)


def test_a_reused_worker_begins_a_fresh_trial(trainable: Make) -> None:
    one = trainable()
    one.train()
    config = toy.SETTINGS | {"k": 1, "ll_learning_rate": 0.05}
    assert one.reset(config)
    assert one.train()["select_loss"] == trainable(k=1, ll_learning_rate=0.05).train()["select_loss"]


@pytest.mark.parametrize("reused", [False, True])
def test_a_trial_that_loads_a_donors_checkpoint_keeps_its_own_settings(
    trainable: Make, tmp_path: Path, reused: bool
) -> None:
    donor = trainable(tolerance=1e-3)
    donor.train()
    donor.save(str(tmp_path))
    factor = donor._trial.trainer.ul_rate / 0.01
    assert factor > 1
    own = {"k": 7, "ll_learning_rate": 0.05, "ul_learning_rate": 0.5, "tolerance": 1e-6}
    heir = donor if reused else trainable(**own)
    if reused:
        assert heir.reset(toy.SETTINGS | own)
    heir.restore(str(tmp_path))
    trainer = heir._trial.trainer
    assert (trainer.ul_step, len(heir._trial.history)) == (2, 1)
    assert trainer.levels[0]._scheduled.optimizer.param_groups[0]["lr"] == 0.05
    # It starts from its own rate, times what the donor's has been adapted by.
    assert trainer.ul_rate == pytest.approx(0.5 * factor, rel=1e-12)
    solver = trainer.levels[0]._implicit._inverse_hvp._settings.make_solver(0.05).solvers["cg"]
    assert (solver.k, solver.tolerance) == (7, 1e-6)
    heir.train()
    assert trainer.levels[0]._scheduled.optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize(("mode", "worst"), [("min", math.inf), ("max", -math.inf)])
def test_a_failed_trial_is_the_worst_by_its_mode(trainable: Make, mode: str, worst: float) -> None:
    # A scheduler that saw +inf as the best accuracy would stop every other trial.
    with pytest.warns(LearningWarning, match="The ll loss became nan"):
        record = trainable(metric="error", mode=mode, fault="nan").train()
    assert record["done"]
    assert "became nan" in record["failure"]
    assert record["select_loss"] == record["error"] == worst


def test_a_solve_that_failed_ends_the_trial_and_raises_nothing(trainable: Make) -> None:
    with pytest.warns(LearningWarning, match="The solve at ul step 1 ended as negative_curvature"):
        record = trainable(fault="indefinite", on_failure="raise").train()
    assert record["done"]
    assert not record["completed"]
    assert "negative_curvature" in record["failure"]


@pytest.mark.parametrize("trouble", toy.TROUBLED)
def test_a_trial_that_did_not_learn_is_told_once_of_all_in_a_worker(trainable: Make, trouble: str) -> None:
    one = trainable(**toy.TROUBLED[trouble])

    def finish() -> str:
        while not (record := one.train())["done"]:
            pass
        one.reset(toy.SETTINGS | toy.PARAMS | toy.TROUBLED[trouble])
        return str(record["troubles"])

    with pytest.warns(LearningWarning) as warned:
        troubles = [finish(), finish()]
    assert trouble in troubles[0].split()
    assert troubles[0] == troubles[1]
    (told,) = (str(warning.message) for warning in warned if f"({trouble})" in str(warning.message))
    assert told.startswith(f"A trial did not learn as it should ({trouble}). ")


@pytest.mark.parametrize("metric", ["select_loss", "validate_loss", "train_loss"])
def test_a_trainable_for_the_largest_loss_is_an_error(trainable: Make, metric: str) -> None:
    with pytest.raises(InvalidValueError, match=rf"`metric` '{metric}' is a loss, .* the largest: take mode=\"min\""):
        trainable(metric=metric, mode="max").train()


def test_a_trainable_for_the_largest_of_a_users_metric_keeps_it(trainable: Make) -> None:
    one = trainable(metric="error", mode="max", patience=2)
    records = [one.train() for _ in range(3)]  # the error falls from report to report
    assert records[-1]["error"] == records[0]["error"] > one._trial.history[-1]["error"]
    assert records[-1]["ended_by"] == "steps"


@pytest.mark.parametrize("fault", ["mistake", "mistake at once"])
def test_a_mistake_is_raised_by_the_first_step_and_not_by_the_worker_that_begins(trainable: Make, fault: str) -> None:
    # In an actor's constructor it would only kill the actor, and Tune would start it again.
    one = trainable(fault=fault)
    with pytest.raises(toy.MistakeError, match="is wrong"):
        one.train()


# ---- a trial that is completed


def test_a_completed_trial_that_is_restored_reports_its_last_record_again(trainable: Make, tmp_path: Path) -> None:
    one = trainable()
    last = [one.train() for _ in range(3)][-1]
    one.save(str(tmp_path))
    other = trainable()
    other.restore(str(tmp_path))
    again = other.train()
    assert again["done"]
    assert again["completed"]
    for name in ("select_loss", "ul_step", "ended_by", "kept_value", "gradient_evaluations"):
        assert again[name] == last[name]


@pytest.mark.parametrize("own_steps", [1, 3, 4])
def test_a_trial_that_loads_a_donor_beyond_its_own_ul_steps_is_completed(
    trainable: Make, tmp_path: Path, own_steps: int
) -> None:
    donor = trainable()
    records = [donor.train() for _ in range(2)]
    donor.save(str(tmp_path))
    heir = trainable(ul_steps=own_steps)
    heir.restore(str(tmp_path))
    record = heir.train()
    assert (record["done"], record["completed"], record["ended_by"], record["ul_step"]) == (True, True, "steps", 4)
    assert record["select_loss"] == min(record["select_loss"] for record in records)


# ---- known ul values


def test_a_trial_starts_from_the_ul_values_it_is_given(trainable: Make) -> None:
    start = {"log_l2": torch.full((toy.SETTINGS["penalties"],), -2.0, dtype=F64)}
    one = trainable(passed={"initial_ul_state": start}, ul_learning_rate=0.0)
    one.train()
    assert_same_bits(dict(one._trial.problem.ul_model.state_dict()), start)


# ---- repeats


def test_a_repeat_differs_by_its_seed_alone(trainable: Make) -> None:
    ends = {
        (seed, repeat): trainable(seed=seed, **({} if repeat is None else {REPEAT: repeat})).train()["select_loss"]
        for seed, repeat in [(0, None), (0, 0), (0, 2), (2, None), (1, 1)]
    }
    assert ends[0, None] == ends[0, 0] != ends[0, 2]
    assert ends[0, 2] == ends[2, None] == ends[1, 1]


def test_a_repeat_without_a_seed_counts_from_the_default(trainable: Make) -> None:
    assert trainable(**{REPEAT: 1}).train()["select_loss"] == trainable(seed=1).train()["select_loss"]


def test_a_seed_that_is_none_is_told_by_name_in_a_repeat_as_well(trainable: Make) -> None:
    with pytest.raises(InvalidTypeError, match="`seed` must be an integer, got 'one'"):
        trainable(seed="one", **{REPEAT: 1}).train()


# ---- saves while a trial runs


def test_a_trial_that_runs_asks_for_a_save_when_one_is_due(trainable: Make, tmp_path: Path) -> None:
    one = trainable(passed={"save_every_s": 0})
    assert one.train()[SAVE_NOW]
    one.save(str(tmp_path))
    assert 0 < one._saves._wait_s < 60  # it has heard how long that took
    one._saves.saved(1000)
    assert SAVE_NOW not in one.train()
    one._saves.saved(0)
    # Tune saves a trial that ends without being asked.
    last = one.train()
    assert last["done"]
    assert SAVE_NOW not in last


@pytest.mark.parametrize("passed", [{}, {"save_every_s": math.inf}])
def test_a_short_trial_asks_for_no_save(trainable: Make, passed: dict[str, Any]) -> None:
    one = trainable(passed=passed)
    assert not any(SAVE_NOW in one.train() for _ in range(3))


def test_a_reused_worker_counts_from_the_start_of_its_next_trial(trainable: Make) -> None:
    one = trainable(passed={"save_every_s": 0})
    one.train()
    one._saves.saved(1000)
    one.reset(toy.SETTINGS | toy.PARAMS)
    assert one.train()[SAVE_NOW]


def test_a_time_between_saves_that_is_none_is_raised_by_the_first_step(trainable: Make) -> None:
    one = trainable(passed={"save_every_s": -1})
    with pytest.raises(InvalidValueError, match="`save_every_s` must be 0 or more, got -1"):
        one.train()


@pytest.mark.parametrize("where", ["writing", "copying"])
def test_a_checkpoint_that_cannot_be_written_says_what_to_free(
    trainable: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    one = trainable()
    one.train()
    if where == "writing":
        monkeypatch.setattr(Trial, "save", full)
    else:
        monkeypatch.setattr(tune.Trainable, "save", full)
    place = rf"'{tmp_path}'" if where == "writing" else "where its Tuner keeps them"
    with pytest.raises(StorageError, match=rf"cannot be written to {place}: .*No space left.*Free space.*`output`"):
        one.save(str(tmp_path))


def test_a_missing_select_data_is_told(trainable: Make) -> None:
    one = trainable(problem=toy.two_splits)
    with pytest.warns(UserWarning, match=r"Without `select_data`.*Hold out a third split"):
        one.train()


# ---- in an ordinary Tuner


def test_tunes_own_search_space_and_variant_generator(tuned: Callable[..., Any]) -> None:
    space = {"k": tune.grid_search([1, 3]), "ll_learning_rate": tune.loguniform(0.01, 0.02)}
    results = tuned(space=space, num_samples=1)
    assert not results.errors
    assert sorted(result.config["k"] for result in results) == [1, 3]
    assert all(result.metrics["completed"] for result in results)


def test_repeats_of_tunes_repeater_run_to_their_end(tuned: Callable[..., Any]) -> None:
    search_alg = Repeater(OptunaSearch(toy.SPACE, metric="select_loss", mode="min"), repeat=2)
    results = tuned(search_alg=search_alg, num_samples=2)
    assert not results.errors
    assert sorted(result.config[REPEAT] for result in results) == [0, 1]
    assert len({result.metrics["select_loss"] for result in results}) == 2


def test_a_trial_that_asks_is_saved_while_it_runs(ray_session: None, tmp_path: Path) -> None:
    (result,) = tune.Tuner(
        tune.with_parameters(ImplicitTrainable, problem=toy.problem, save_every_s=0),
        param_space=toy.SETTINGS | toy.PARAMS,
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="ray", verbose=0),
    ).fit()
    saved = [metrics["ul_step"] for _, metrics in result.best_checkpoints]
    assert saved[0] == 2
    assert saved[-1] == 5


def test_a_trial_whose_worker_died_after_its_best_report_keeps_that(ray_session: None, tmp_path: Path) -> None:
    config = toy.SETTINGS | toy.PARAMS | {"fault": "past", "patience": 2, "ul_steps": 40, "ll_steps": 10}

    def problem(config: Any) -> BilevelProblem:
        made, reports = toy.problem(config), iter(range(1, 99))

        def error(state: State) -> Tensor:
            if next(reports) == 4 and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os._exit(1)
            return toy.error(state)

        return replace(made, metrics={"error": error})

    (result,) = tune.Tuner(
        tune.with_parameters(ImplicitTrainable, problem=problem),
        param_space=config,
        run_config=tune.RunConfig(
            storage_path=str(tmp_path),
            name="ray",
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    ).fit()
    expected = finish(Trial(toy.problem, config))
    assert (tmp_path / "died").exists()
    assert (result.metrics["ended_by"], result.metrics["ul_step"], result.metrics["kept_ul_step"]) == ("patience", 8, 4)
    assert result.metrics["select_loss"] == expected["kept_value"]
    assert result.metrics["last_value"] == expected["last_value"]


def test_population_based_training_ends_without_errors(tuned: Callable[..., Any]) -> None:
    pbt = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=2,
        hyperparam_mutations={"ll_learning_rate": tune.loguniform(1e-3, 1e-1), "k": [1, 3, 8]},
        quantile_fraction=0.5,
        synch=True,
    )
    space = {"ul_steps": 12, "k": 3, "ll_learning_rate": tune.grid_search([1e-4, 0.05])}
    results = tuned(space=space, scheduler=pbt, num_samples=1)
    assert not results.errors
    assert pbt._num_perturbations > 0
    assert all(result.metrics["ul_step"] == 12 for result in results)
