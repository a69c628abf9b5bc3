"""ImplicitTrainable: by itself, and in an ordinary Tuner."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from tests.support import toy
from tests.support.toy import on_optuna
from tune_implicit import ImplicitTrainable

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:This API is deprecated:DeprecationWarning"),  # Ray 2.52's own loggers
]


Make = Callable[..., ImplicitTrainable]


@pytest.fixture
def trainable() -> Iterator[Make]:
    """Make a trainable of a config, and of what `setup` may have besides."""
    made = []

    def make(problem: Any = toy.problem, mode: str = "min", **config: Any) -> ImplicitTrainable:
        passed = tune.with_parameters(ImplicitTrainable, problem=problem, mode=mode)
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
def test_a_failed_trial_is_the_worst_by_its_mode(trainable: Make, mode: str, worst: float) -> None:
    # A scheduler that saw +inf as the best accuracy would stop every other trial.
    record = trainable(mode=mode, fault="nan").train()
    assert record["done"]
    assert "became nan" in record["failure"]
    assert record["select_loss"] == record["error"] == worst


def test_a_solve_that_failed_ends_the_trial_and_raises_nothing(trainable: Make) -> None:
    record = trainable(fault="indefinite", on_failure="raise").train()
    assert record["done"]
    assert not record["completed"]
    assert "negative_curvature" in record["failure"]


@pytest.mark.parametrize("fault", ["mistake", "mistake at once"])
def test_a_mistake_is_raised_by_the_first_step_and_not_by_the_worker_that_begins(trainable: Make, fault: str) -> None:
    # In an actor's constructor it would only kill the actor, and Tune would start it again.
    one = trainable(fault=fault)
    with pytest.raises(toy.MistakeError, match="is wrong"):
        one.train()


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
