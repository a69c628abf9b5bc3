"""The study of a search: opened, resumed, queued."""

import json
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import check_distribution_compatibility
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from tune_implicit.errors import InvalidValueError, StorageError
from tune_implicit.searches.borrowed import contains, end, running_trial
from tune_implicit.searches.outcome import CUT_OFF, is_interrupted, write_failure
from tune_implicit.searches.results import number_or_text, read_trials
from tune_implicit.searches.space import Space
from tune_implicit.trials.record import check_metric

__all__ = ["direction_of", "end_running", "open_storage", "open_study", "queue_interrupted"]

JOURNAL_FILE = "study.journal"

# The attributes that the search itself keeps: of a trial, which one it repeats; of the study, what it compares by, and
# what is the same in every trial.
RERUN_ATTR = "rerun_of"
METRIC_ATTR = "metric"
SETTINGS_ATTR = "settings"


def open_storage(storage: str | BaseStorage) -> BaseStorage:
    """Return the storage behind a database URL or the path of a journal file; a storage object is returned as it is.

    Parameters
    ----------
    storage : str or BaseStorage
        An SQLAlchemy URL such as ``sqlite:///study.db``, or a file path, which becomes a journal.

    Raises
    ------
    StorageError
        If it cannot be opened.
    """
    if isinstance(storage, BaseStorage):
        return storage
    try:
        if "://" in storage:
            return RDBStorage(storage)
        return JournalStorage(JournalFileBackend(str(Path(storage).expanduser().absolute())))
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise StorageError(
            f"`storage` {storage!r} cannot be opened: {reason}. Pass the path of a journal file, or a database URL "
            "such as sqlite:///study.db, in a folder that exists, and install the database's driver."
        ) from error


def direction_of(metric: str, mode: str) -> StudyDirection:
    """Return Optuna's direction for Ray's ``mode``.

    Raises
    ------
    InvalidValueError
        If ``mode`` is neither ``"min"`` nor ``"max"``, or ``"max"`` of a loss.
    """
    check_metric(metric, mode)
    return StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE


def open_study(
    folder: Path,
    storage: str | BaseStorage | None,
    resume: bool,
    space: Space,
    settings: Mapping[str, Any],
    direction: StudyDirection,
    metric: str,
) -> optuna.Study:
    """Return the study of the search in ``folder``.

    Raises
    ------
    InvalidValueError
        If there is a search already and ``resume`` is False, or the search to resume is another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValueError(f"`output` {str(folder)!r} must be a folder that can be written to: {error}") from error
    opened = open_storage(str(folder.absolute() / JOURNAL_FILE) if storage is None else storage)
    name = folder.absolute().name
    begun = name in optuna.get_all_study_names(opened)
    if not begun and read_trials(folder):
        raise InvalidValueError(
            f"`output` {str(folder)!r} holds the trials of a search that is not in this `storage`. Pass the storage "
            "it began with, or another folder."
        )
    if begun and not resume:
        _drop_if_nothing_finished(opened, name, folder)
    study = optuna.create_study(storage=opened, study_name=name, direction=direction, load_if_exists=True)
    # Another seed draws other trials of the same search.
    fixed = json.loads(json.dumps({k: v for k, v in settings.items() if k != "seed"}, default=_comparable))
    _check_same_search(study, folder, space, fixed, direction, metric)
    study.set_user_attr(METRIC_ATTR, metric)
    study.set_user_attr(SETTINGS_ATTR, fixed)
    return study


def _comparable(value: Any) -> Any:
    """Return a number as it is, and of other objects the type: their text may hold an address."""
    return number_or_text(value) if isinstance(value, numbers.Number) else type(value).__qualname__


def _check_same_search(
    study: optuna.Study,
    folder: Path,
    space: Space,
    settings: Mapping[str, Any],
    direction: StudyDirection,
    metric: str,
) -> None:
    """Check that ``study`` can go on with the arguments of this call.

    Raises
    ------
    InvalidValueError
        If not.
    """
    compared_by = study.user_attrs.get(METRIC_ATTR, metric)
    if (compared_by, study.direction) != (metric, direction):
        raise InvalidValueError(
            f"The search in `output` {str(folder)!r} compares trials by {compared_by!r} "
            f"({study.direction.name.lower()}), this call by {metric!r} ({direction.name.lower()}). "
            "Pass the same `metric` and `mode`, or another folder."
        )
    held = study.user_attrs.get(SETTINGS_ATTR, settings)
    if changed := sorted(
        key for key in {*held, *settings} if json.dumps(held.get(key)) != json.dumps(settings.get(key))
    ):
        raise InvalidValueError(
            f"The search in `output` {str(folder)!r} holds other `settings`: {', '.join(changed)} would change, from "
            f"{[held.get(key) for key in changed]} to {[settings.get(key) for key in changed]}. Pass the same, or "
            "another folder."
        )
    if callable(space):
        return
    for trial in study.get_trials(deepcopy=False):
        for name in set(space).intersection(trial.distributions):
            try:
                check_distribution_compatibility(trial.distributions[name], space[name])
            except ValueError as error:
                raise InvalidValueError(
                    f"The search in `output` {str(folder)!r} varied {name!r} over {trial.distributions[name]}, this "
                    f"`space` over {space[name]}: Optuna does not mix the two. Pass the same, or another folder."
                ) from error


def _drop_if_nothing_finished(storage: BaseStorage, name: str, folder: Path) -> None:
    """Delete a study that a mistake or Ctrl-C ended before any trial.

    Raises
    ------
    InvalidValueError
        If the study holds more than that, or may still be running.
    """
    trials = optuna.load_study(storage=storage, study_name=name).trials
    if not all(is_interrupted(trial) or trial.state is TrialState.WAITING for trial in trials):
        raise InvalidValueError(
            f"`output` {str(folder)!r} already holds a search, or `storage` one of the name {name!r}. Pass resume=True "
            "(--resume) to go on with it, or another folder."
        )
    optuna.delete_study(storage=storage, study_name=name)


def end_running(study: optuna.Study) -> None:
    """Record the trials that still run as interrupted."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        running = running_trial(study, trial)
        write_failure(running, CUT_OFF)
        end(study, running, CUT_OFF.state)


def queue_interrupted(study: optuna.Study, space: Space) -> None:
    """Queue the trials that an earlier call left unfinished to run again, where the space still has them."""
    end_running(study)
    trials = study.trials
    rerun = {trial.user_attrs.get(RERUN_ATTR) for trial in trials}
    for trial in trials:
        if is_interrupted(trial) and trial.number not in rerun and trial.params and _fits(trial.params, space):
            study.enqueue_trial(trial.params, user_attrs={RERUN_ATTR: trial.number})


def _fits(params: Mapping[str, Any], space: Space) -> bool:
    if callable(space):
        return True
    try:
        return set(params) == set(space) and all(
            contains(distribution, params[name]) for name, distribution in space.items()
        )
    except ValueError:  # it is of another type
        return False
