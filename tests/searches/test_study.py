"""Spaces, storages and outcomes, which both engines share."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from tune_implicit import InvalidTypeError, InvalidValueError, StorageError
from tune_implicit.searches.outcome import Outcome, failure_of, write_config, write_outcome
from tune_implicit.searches.space import check_space, suggest
from tune_implicit.searches.study import direction_of, open_storage

SPACE = {
    "lr": FloatDistribution(1e-4, 1.0, log=True),
    "rate": FloatDistribution(0.0, 1.0, step=0.25),
    "k": IntDistribution(1, 32, log=True),
    "width": IntDistribution(16, 64, step=16),
    "solver": CategoricalDistribution(["cg", "neumann"]),
}


def ask(**arguments: Any) -> optuna.Trial:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), **arguments).ask()


def test_a_dict_is_suggested_as_it_is() -> None:
    trial = ask()
    assert suggest(trial, SPACE) == trial.params
    assert trial.distributions == SPACE


@pytest.mark.parametrize("returned", [None, {"a": 1}])
def test_a_callable_returns_the_config_or_nothing(returned: dict[str, int] | None) -> None:
    def space(trial: optuna.Trial) -> dict[str, Any] | None:
        trial.suggest_int("k", 1, 4)
        return returned

    trial = ask()
    assert suggest(trial, space) == (trial.params if returned is None else returned)


def test_what_is_no_space_is_told() -> None:
    check_space(SPACE)
    check_space(lambda trial: None)
    with pytest.raises(InvalidTypeError, match=r"or a callable\(trial\) that returns a config, got list"):
        check_space([1])  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="must name at least one setting"):
        check_space({})
    with pytest.raises(InvalidTypeError, match="what does not vary belongs in `settings`"):
        check_space({"k": 5})  # type: ignore[dict-item]
    with pytest.raises(InvalidTypeError, match=r"must return the config as a dict, or None .* got 5"):
        suggest(ask(), lambda trial: 5)  # type: ignore[arg-type, return-value]


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


def test_a_file_that_is_no_storage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary,\nnothing today.\n")
    for storage in (str(path), f"sqlite:///{path}"):
        with pytest.raises(StorageError, match="cannot be opened"):
            open_storage(storage)
    assert path.read_text().startswith("Dear diary")


def test_mode_is_a_direction() -> None:
    assert direction_of("min") is StudyDirection.MINIMIZE
    assert direction_of("max") is StudyDirection.MAXIMIZE
    with pytest.raises(InvalidValueError, match='must be "min" or "max", got \'minimize\''):
        direction_of("minimize")


def test_a_config_that_is_not_the_params_is_written() -> None:
    trial = ask()
    write_config(trial, suggest(trial, SPACE))
    assert trial.user_attrs == {}
    write_config(trial, {"width": np.int64(64), "lr": np.float32(0.5), "layers": [1, 2], "model": object})
    config = trial.user_attrs["config"]
    assert {**config, "model": None} == {"width": 64, "lr": 0.5, "layers": [1, 2], "model": None}
    assert config["model"] == "<class 'object'>"


def test_why_a_record_has_no_value() -> None:
    record = {"select_loss": 0.5, "hvps": 3, "completed": True, "solver_status": "converged", "half": np.float32(0.5)}
    assert failure_of(record, "select_loss") is None
    assert failure_of(record, "half") is None
    assert failure_of({**record, "failure": "diverged"}, "unknown") == "diverged"
    assert failure_of({**record, "select_loss": math.inf}, "select_loss") == "`select_loss` became inf."
    with pytest.raises(InvalidValueError, match=r"The trial reports half, hvps, select_loss\."):
        failure_of(record, "solver_status")


def test_an_outcome_is_what_json_can_hold() -> None:
    trial = ask()
    record = {"loss": 0.5, "nan": math.nan, "inf": math.inf, "nested": {"a": 1}, "status": "cg", "k": 3, "done": True}
    write_outcome(trial, record, Outcome(TrialState.FAIL, "diverged"))
    assert trial.user_attrs == {
        "metrics": {"loss": 0.5, "status": "cg", "k": 3, "done": True},
        "failure": "diverged",
    }
    json.dumps(trial.user_attrs, allow_nan=False)
