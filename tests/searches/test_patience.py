"""A storage that waits where another would fail."""

import inspect
import pickle
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState

from tune_implicit.searches import patience as room
from tune_implicit.searches.patience import PatientStorage, patient, patiently
from tune_implicit.searches.study import open_storage

FAILURES = [
    OSError("away"),
    StorageInternalError("away"),
    sqlalchemy.exc.OperationalError("select", {}, Exception("refused")),
]


class Failing(InMemoryStorage):
    """A storage whose next operations fail: before they are done, or after."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[Exception] = []
        self.after = False

    def set_trial_state_values(self, *args: Any, **kwargs: Any) -> bool:
        if self.after:
            done = super().set_trial_state_values(*args, **kwargs)
        if self.failures:
            raise self.failures.pop()
        return done if self.after else super().set_trial_state_values(*args, **kwargs)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_write_that_fails_is_tried_again(failure: Exception, after: bool) -> None:
    # Where it had arrived all the same, the trial is finished by then.
    storage = Failing()
    study = optuna.create_study(storage=PatientStorage(storage))
    trial = study.ask()
    storage.failures, storage.after = [failure, failure], after
    study.tell(trial, 1.0)
    assert (study.trials[0].state, study.trials[0].value) == (TrialState.COMPLETE, 1.0)


def test_a_failure_that_stays_is_raised() -> None:
    def refuse(failed: int) -> None:
        raise OSError(f"refused after {failed}")

    with pytest.raises(OSError, match="refused"):
        patiently(refuse, patience_s=0.0)


def test_what_is_no_failure_is_raised_at_once() -> None:
    storage = PatientStorage(InMemoryStorage())
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    study.tell(trial, 1.0)
    with pytest.raises(UpdateFinishedTrialError):
        trial.set_user_attr("late", 1)


def test_every_operation_of_a_storage_is_there() -> None:
    operations = {name for name, _ in inspect.getmembers(BaseStorage, callable) if not name.startswith("_")}
    own = {name for name in vars(PatientStorage) if not name.startswith("_")}
    assert own == operations


@pytest.mark.parametrize("url", ["study.journal", "sqlite:///{}/study.db"])
def test_it_can_be_sent_to_another_process(tmp_path: Path, url: str) -> None:
    storage = patient(open_storage(url.format(tmp_path) if "://" in url else str(tmp_path / url)))
    optuna.create_study(storage=storage, study_name="one")
    assert optuna.get_all_study_names(pickle.loads(pickle.dumps(storage))) == ["one"]


def test_a_storage_in_memory_needs_no_patience() -> None:
    storage = InMemoryStorage()
    assert patient(storage) is storage
    wrapped = PatientStorage(storage)
    assert patient(wrapped) is wrapped
