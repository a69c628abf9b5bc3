"""The study of a search: opened, resumed, queued."""

import json
import numbers
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import check_distribution_compatibility
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from tune_implicit.errors import InvalidValueError, StorageError
from tune_implicit.searches.borrowed import contains, end, running_trial
from tune_implicit.searches.journal import WholeLines
from tune_implicit.searches.leases import LEASE_ATTR, Watch, lease_of, put_back_abandoned
from tune_implicit.searches.outcome import CHECKPOINT_ATTR, CUT_OFF, is_interrupted, was_raised, write_failure
from tune_implicit.searches.patience import patient, patiently
from tune_implicit.searches.queue import has_ended
from tune_implicit.searches.results import number_or_text, read_trials
from tune_implicit.searches.space import Space
from tune_implicit.trials.record import check_metric

__all__ = ["direction_of", "open_storage", "open_study", "queue_interrupted", "requeue", "search_seed"]

JOURNAL_FILE = "study.journal"

# The attributes that the search itself keeps: of a trial, which one it repeats; of the study, what it compares by,
# what is the same in every trial, and the seed of them all.
RERUN_ATTR = "rerun_of"
METRIC_ATTR = "metric"
SETTINGS_ATTR = "settings"
SEED_ATTR = "seed"

# Seconds for which opening a database is tried.
OPENING_S = 3.0


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
            return _open_database(storage)
        return JournalStorage(WholeLines(str(Path(storage).expanduser().absolute())))
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, OSError, ValueError) as error:
        reason = _masked(str(error).strip().splitlines()[0].rstrip("."), storage)
        raise StorageError(
            f"`storage` {_masked(storage, storage)!r} cannot be opened: {reason}. Pass the path of a journal file, or "
            "a database URL such as sqlite:///study.db, in a folder that exists, and install the database's driver."
        ) from None if "@" in storage else error  # whose text may hold the password


def _open_database(url: str) -> BaseStorage:
    # Writers of SQLite wait for each other.
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    # Workers that begin at once may both create its tables; all but one fail, and then find them.
    races = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError)
    storage: BaseStorage = patiently(lambda _: RDBStorage(url, engine_kwargs=options), OPENING_S, races)
    return storage


def _masked(text: str, url: str) -> str:
    """Return ``text`` without the password of ``url``."""
    try:
        password = sqlalchemy.engine.make_url(url).password
    except sqlalchemy.exc.ArgumentError:
        return text
    return text.replace(str(password), "***") if password else text


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
    opened = patient(open_storage(str(folder.absolute() / JOURNAL_FILE) if storage is None else storage))
    name = folder.absolute().name
    begun = name in optuna.get_all_study_names(opened)
    if not begun and read_trials(folder):
        raise InvalidValueError(
            f"`output` {str(folder)!r} holds the trials of a search that is not in this `storage`. Pass the storage "
            "it began with, or another folder."
        )
    study = optuna.create_study(storage=opened, study_name=name, direction=direction, load_if_exists=True)
    if begun and not resume:
        _check_nothing_lost(study, folder)
    # Another seed draws other trials of the same search.
    fixed = json.loads(json.dumps({k: v for k, v in settings.items() if k != "seed"}, default=_comparable))
    _check_same_search(study, folder, space, fixed, direction, metric)
    for name, value in ((METRIC_ATTR, metric), (SETTINGS_ATTR, fixed)):
        if study.user_attrs.get(name) != value:
            study.set_user_attr(name, value)
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
    trials = study.get_trials(deepcopy=False)
    # What only a mistake has left binds no one.
    begun = any(not is_interrupted(trial) and not was_raised(trial) for trial in trials)
    held = study.user_attrs.get(SETTINGS_ATTR, settings) if begun else settings
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
    for trial in trials:
        for name in set(space).intersection(trial.distributions):
            try:
                check_distribution_compatibility(trial.distributions[name], space[name])
            except ValueError as error:
                raise InvalidValueError(
                    f"The search in `output` {str(folder)!r} varied {name!r} over {trial.distributions[name]}, this "
                    f"`space` over {space[name]}: Optuna does not mix the two. Pass the same, or another folder, "
                    "or delete this one if nothing in it is of use."
                ) from error


def _check_nothing_lost(study: optuna.Study, folder: Path) -> None:
    """Check that a study holds no more than a mistake or Ctrl-C before any trial's end has left.

    Raises
    ------
    InvalidValueError
        If it does, or may still be running.
    """
    watch = Watch()
    trials = study.get_trials(deepcopy=False)
    running = [trial for trial in trials if trial.state is TrialState.RUNNING]
    if any(has_ended(trial) for trial in trials) or len(watch.abandoned(running)) < len(running):
        raise InvalidValueError(
            f"`output` {str(folder)!r} already holds a search, or `storage` one of the name {study.study_name!r}. Pass "
            "resume=True (--resume) to go on with it, or to join it, or another folder."
        )


def queue_interrupted(study: optuna.Study, space: Space) -> None:
    """Queue copies of the trials that were recorded as interrupted, where the space still has them.

    :class:`ImplicitObjective` in a study's own ``optimize`` records them so, and versions before 0.6 did.
    """
    trials = study.get_trials(deepcopy=False)
    rerun = {trial.user_attrs.get(RERUN_ATTR) for trial in trials}
    for trial in trials:
        if was_raised(trial) and not _fits(trial.params, space, wholly=False):
            # A mistake in the space, which has been mended since.
            write_failure(running_trial(study, trial), CUT_OFF)
            end(study, running_trial(study, trial), CUT_OFF.state)
        if is_interrupted(trial) and trial.number not in rerun and trial.params and _fits(trial.params, space):
            kept = {name: trial.user_attrs[name] for name in (LEASE_ATTR, CHECKPOINT_ATTR) if name in trial.user_attrs}
            study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    intermediate_values=trial.intermediate_values,
                    user_attrs={**kept, RERUN_ATTR: trial.number},
                )
            )


def requeue(study: optuna.Study, watch_s: float = 0.0) -> int:
    """Put the trials of ``study`` that were cut off back into its queue, and return how many.

    For a study that :class:`ImplicitObjective` runs in Optuna's own ``optimize``: call it before, and the next trials
    of ``optimize`` go on from their last saves. :func:`tune_implicit.search` does so by itself.

    Parameters
    ----------
    study : optuna.Study
        Whose trials.
    watch_s : float, default 0
        Seconds to watch the leases of workers on other machines, of which is not known whether they have ended; more
        than a lease lasts (60) tells. The others are put back at once.
    """
    watch, until = Watch(), time.monotonic() + watch_s
    before = len(study.get_trials(deepcopy=False, states=[TrialState.WAITING]))
    while True:
        running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        put_back_abandoned(study, watch.abandoned(trial for trial in running if lease_of(trial) is not None))
        if time.monotonic() >= until:
            break
        time.sleep(min(1.0, watch_s))
    queue_interrupted(study, lambda trial: None)
    return len(study.get_trials(deepcopy=False, states=[TrialState.WAITING])) - before


def search_seed(study: optuna.Study, seed: int | None) -> int:
    """Return the seed of a search: the one given, or else that of its earlier calls, or else a new one."""
    if seed is None:
        seed = study.user_attrs.get(SEED_ATTR, secrets.randbelow(2**31))
    if study.user_attrs.get(SEED_ATTR) != seed:
        study.set_user_attr(SEED_ATTR, seed)
    return int(seed)


def _fits(params: Mapping[str, Any], space: Space, *, wholly: bool = True) -> bool:
    """Return whether ``params`` can come from ``space``: ``wholly``, or as far as it has them."""
    if callable(space):
        return True
    try:
        return (not wholly or set(params) == set(space)) and all(
            contains(space[name], params[name]) for name in set(params).intersection(space)
        )
    except ValueError:  # it is of another type
        return False
