"""The study of a search: opened, resumed, queued."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from tests.support import toy
from tests.support.toy import Interrupting, run, study_in
from tune_implicit import InvalidValueError, StorageError
from tune_implicit.searches.leases import Leases
from tune_implicit.searches.outcome import CUT_OFF
from tune_implicit.searches.study import direction_of, open_storage, queue_interrupted

# As each version marks a trial that was cut off.
INTERRUPTED = {"failure": CUT_OFF.failure, "interrupted": True}
INTERRUPTED_0_2 = {"failure": CUT_OFF.failure}


def study_with(**attributes: Any) -> optuna.Study:
    """Return a study of one failed trial of `k` = 3."""
    study = optuna.create_study()
    params, distributions = {"k": 3}, {"k": IntDistribution(1, 8)}
    study.add_trial(
        create_trial(state=TrialState.FAIL, params=params, distributions=distributions, user_attrs=attributes)
    )
    return study


def queued(study: optuna.Study) -> list[int]:
    """Return which trials those repeat that are to run."""
    return [trial.user_attrs["rerun_of"] for trial in study.trials if trial.state is TrialState.WAITING]


# ---- storages and directions


def test_a_url_a_path_or_an_object_is_a_storage(tmp_path: Path) -> None:
    assert isinstance(open_storage(f"sqlite:///{tmp_path}/study.db"), RDBStorage)
    assert isinstance(open_storage(str(tmp_path / "study.journal")), JournalStorage)
    storage = InMemoryStorage()
    assert open_storage(storage) is storage


@pytest.mark.parametrize(
    "storage",
    [
        "nowhere://study.db",  # no such kind of database
        "sqlite://study.db",  # one slash too few
        "sqlite:////no/such/folder/study.db",
        "/no/such/folder/study.journal",
        "postgresql+pg8000://localhost/study",  # a driver that is not installed
        "",
    ],
)
def test_a_storage_that_cannot_be_opened_is_told(storage: str) -> None:
    with pytest.raises(StorageError, match=r"cannot be opened: .*Pass the path of a journal file, or a database URL"):
        open_storage(storage)


def test_a_password_is_not_told() -> None:
    with pytest.raises(StorageError, match=r"sqlite://user:\*\*\*@host") as told:
        open_storage("sqlite://user:secret@host/study")
    assert "secret" not in str(told.value)
    assert told.value.__cause__ is None


def test_a_file_that_is_no_storage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary,\nnothing today.\n")
    for storage in (str(path), f"sqlite:///{path}"):
        with pytest.raises(StorageError, match="cannot be opened"):
            open_storage(storage)
    assert path.read_text().startswith("Dear diary")


def test_mode_is_a_direction() -> None:
    assert direction_of("select_loss", "min") is StudyDirection.MINIMIZE
    assert direction_of("error", "min") is StudyDirection.MINIMIZE
    assert direction_of("error", "max") is StudyDirection.MAXIMIZE
    with pytest.raises(InvalidValueError, match='must be "min" or "max", got \'minimize\''):
        direction_of("error", "minimize")
    with pytest.raises(InvalidValueError, match="`metric` 'train_loss' is a loss, of which the least is best"):
        direction_of("train_loss", "max")


# ---- opened


def test_an_output_already_used_is_an_error(output: Path) -> None:
    run(output, 1)
    with pytest.raises(InvalidValueError, match=r"already holds a search.*--resume"):
        run(output)


def test_an_output_at_home_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(Path("~/found"), 1).output == tmp_path / "found"


def test_an_output_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidValueError, match="must be a folder that can be written to"):
        run(tmp_path / "file")


def test_another_storage_for_the_same_folder_is_an_error(output: Path) -> None:
    run(output, 1)
    for resume in (False, True):
        with pytest.raises(InvalidValueError, match="a search that is not in this `storage`"):
            run(output, storage=InMemoryStorage(), resume=resume)


def test_two_folders_of_one_name_in_one_storage_are_an_error(tmp_path: Path) -> None:
    storage = InMemoryStorage()
    run(tmp_path / "a" / "found", 1, storage=storage)
    with pytest.raises(InvalidValueError, match="or `storage` one of the name 'found'"):
        run(tmp_path / "b" / "found", 1, storage=storage)


@pytest.mark.parametrize("changes", [{"mode": "max"}, {"metric": "select_loss"}])
def test_a_resumed_search_compares_as_it_did(output: Path, changes: dict[str, str]) -> None:
    run(output, 1, metric="error")
    with pytest.raises(InvalidValueError, match="Pass the same `metric` and `mode`, or another folder"):
        run(output, 2, resume=True, **{"metric": "error"} | changes)


def test_a_resumed_search_has_the_same_settings(output: Path) -> None:
    run(output, n_trials=1)
    with pytest.raises(InvalidValueError, match=r"holds other `settings`: k, ul_steps would change, from \[None, 5\]"):
        run(output, resume=True, settings=toy.SETTINGS | {"ul_steps": 8, "k": 2})
    assert len(run(output, resume=True, settings=toy.SETTINGS | {"seed": 3}).trials) == 3


@pytest.mark.parametrize("setting", [lambda x: x, float("nan")], ids=["function", "NaN"])
def test_a_setting_without_a_value_to_compare_is_no_other_search(output: Path, setting: Any) -> None:
    def problem(config: Any, data: Any = None) -> Any:
        return toy.problem({name: config[name] for name in ("activation", "penalties")})

    settings = toy.SETTINGS | {"activation": setting}
    run(output, n_trials=1, problem=problem, settings=settings)
    assert len(run(output, n_trials=2, problem=problem, settings=settings, resume=True).trials) == 2


def test_a_resumed_search_has_the_same_choices(output: Path) -> None:
    run(output, 1, space={**toy.SPACE, "fault": CategoricalDistribution(["none", "no fault"])})
    with pytest.raises(InvalidValueError, match=r"Optuna does not mix the two\. Pass the same, or another folder"):
        run(output, 2, resume=True, space=toy.faulty("none"))
    # What Optuna can mix may change.
    assert len(run(output, 2, resume=True, space={"k": IntDistribution(1, 99)}).trials) == 2


# ---- resumed


@pytest.mark.parametrize("storage", [None, "sqlite:///{}/s.db"])
def test_a_trial_left_running_by_a_kill_goes_on(output: Path, storage: str | None) -> None:
    storage = storage and storage.format(output.parent)
    run(output, 1, storage=storage)
    study = study_in(output, storage)
    with Leases(study) as leases:
        killed = study.ask(toy.SPACE)  # no one will ever tell how it ended
        leases.take(killed, leases.new())
    resumed = run(output, 2, resume=True, storage=storage)
    assert [trial.number for trial in resumed.trials] == [0, 1]
    assert {key: resumed.trials[1].config[key] for key in killed.params} == killed.params
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2


def test_a_trial_interrupted_twice_goes_on_each_time(output: Path) -> None:
    factory = Interrupting(at=1)
    for at in (1, 2, 3):
        factory.at = at
        assert run(output, 1, resume=True, problem=factory).interrupted
        assert [trial.state for trial in study_in(output).trials] == [TrialState.WAITING]
    assert len(run(output, 1, resume=True, problem=factory).trials) == 1
    assert all(config == factory.configs[0] for config in factory.configs)
    assert factory.calls == 4


def test_an_interrupted_search_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole" / "found", 14, seed=3)
    for at in (1, 4, 12):
        run(tmp_path / "found", 14, seed=3, problem=Interrupting(at=at), resume=True)
    resumed = run(tmp_path / "found", 14, resume=True)  # it knows its seed
    for before, after in zip(whole.trials, resumed.trials, strict=True):
        assert (before.number, before.value, before.config) == (after.number, after.value, after.config)


@pytest.mark.parametrize("attributes", [INTERRUPTED, INTERRUPTED_0_2])
@pytest.mark.parametrize("space", [{"k": IntDistribution(1, 99)}, lambda trial: None], ids=["dict", "callable"])
def test_an_interrupted_trial_is_queued_once(attributes: dict[str, Any], space: Any) -> None:
    study = study_with(**attributes)
    for _ in range(2):
        queue_interrupted(study, space)
    assert queued(study) == [0]
    assert study.ask({"k": IntDistribution(1, 99)}).params == {"k": 3}


def test_a_trial_that_failed_by_itself_is_not_queued() -> None:
    study = study_with(failure="diverged")
    queue_interrupted(study, {"k": IntDistribution(1, 8)})
    assert queued(study) == []


@pytest.mark.parametrize(
    "space",
    [
        {"k": IntDistribution(4, 8)},
        {"k": CategoricalDistribution(["few", "many"])},
        {"k": IntDistribution(1, 8), "width": IntDistribution(1, 8)},
        {"width": IntDistribution(1, 8)},
    ],
)
def test_an_interrupted_trial_is_not_queued_that_the_space_does_not_have(space: Any) -> None:
    study = study_with(**INTERRUPTED)
    queue_interrupted(study, space)
    assert queued(study) == []


def test_a_trial_interrupted_before_it_had_a_config_is_not_queued() -> None:
    study = optuna.create_study()
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=INTERRUPTED))
    queue_interrupted(study, lambda trial: None)
    assert queued(study) == []
