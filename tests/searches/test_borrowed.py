"""The names we borrow of Optuna are there, on each storage that a search may have."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from tune_implicit.searches.borrowed import cached, contains, end, put_back, running_trial, storage_of, stored
from tune_implicit.searches.study import open_storage


class Told(RandomSampler):
    """A sampler that keeps which trials it has heard of."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.numbers: list[int] = []

    def after_trial(self, study: optuna.Study, trial: Any, state: TrialState, values: Any) -> None:
        self.numbers.append(trial.number)


@pytest.fixture(params=["memory", "sqlite", "journal"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> optuna.Study:
    places = {"memory": None, "sqlite": f"sqlite:///{tmp_path}/study.db", "journal": str(tmp_path / "study.journal")}
    place = places[request.param]
    return optuna.create_study(storage=place and open_storage(place), study_name="found", sampler=Told())


def test_a_study_is_opened_again_by_its_storage(study: optuna.Study) -> None:
    study.tell(study.ask(), 1.0)
    again = optuna.load_study(storage=storage_of(study), study_name="found")
    assert [trial.value for trial in again.trials] == [1.0]


def test_a_trial_is_seen_as_its_study_has_it_now(study: optuna.Study) -> None:
    trial = study.ask()
    assert stored(study, trial).state is TrialState.RUNNING
    trial.report(0.5, 2)
    assert stored(study, trial).intermediate_values == {2: 0.5}
    study.tell(trial, 0.5)
    assert stored(study, trial).state is TrialState.COMPLETE


def test_a_trial_is_ended_without_the_samplers_hearing_of_it(study: optuna.Study) -> None:
    first, second = study.ask(), study.ask()
    end(study, first, TrialState.FAIL)
    study.tell(second, 1.0)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.sampler.numbers == [second.number]


def test_a_trial_that_runs_goes_back_to_the_queue_as_it_is(study: optuna.Study) -> None:
    trial = study.ask({"k": IntDistribution(1, 8)})
    trial.report(0.5, 2)
    put_back(study, trial)
    assert [trial.state for trial in study.trials] == [TrialState.WAITING]
    again = study.ask()
    assert (again.number, again.params) == (trial.number, trial.params)
    assert stored(study, again).intermediate_values == {2: 0.5}
    study.tell(again, 0.5)
    assert study.sampler.numbers == [0]


def test_a_database_is_cached_and_nothing_else(tmp_path: Path) -> None:
    assert cached(open_storage(f"sqlite:///{tmp_path}/study.db")) is not None
    journal = open_storage(str(tmp_path / "study.journal"))
    assert cached(journal) is journal


def test_a_trial_that_still_runs_is_written_to_by_another_handle(study: optuna.Study) -> None:
    study.ask({"k": IntDistribution(1, 8)})
    (frozen,) = study.trials
    handle = running_trial(study, frozen)
    assert (handle.number, handle.params) == (frozen.number, frozen.params)
    handle.set_user_attr("failure", "cut off")
    assert study.trials[0].user_attrs == {"failure": "cut off"}


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (IntDistribution(1, 8), 8, 9),
        (IntDistribution(1, 9, step=2), 3, 4),
        (FloatDistribution(1e-3, 1.0, log=True), 1e-3, 2.0),
    ],
    ids=repr,
)
def test_a_value_can_come_from_a_distribution_or_not(
    distribution: BaseDistribution, inside: float, outside: float
) -> None:
    assert contains(distribution, inside)
    assert not contains(distribution, outside)


def test_a_choice_can_come_from_a_categorical_distribution() -> None:
    distribution = CategoricalDistribution(["cg", None, 3])
    assert all(contains(distribution, choice) for choice in distribution.choices)


@pytest.mark.parametrize(
    "distribution", [IntDistribution(1, 8), FloatDistribution(0.0, 1.0), CategoricalDistribution(["cg"])], ids=repr
)
def test_a_value_of_another_type_is_an_error(distribution: BaseDistribution) -> None:
    with pytest.raises(ValueError, match="neumann"):
        contains(distribution, "neumann")


def test_artifact_stores_have_a_type(tmp_path: Path) -> None:
    from optuna.artifacts._protocol import ArtifactStore  # in the package for type checking only

    methods = {name for name in vars(ArtifactStore) if not name.startswith("_")}
    assert {"open_reader", "write", "remove"} <= methods <= set(dir(FileSystemArtifactStore(tmp_path)))
