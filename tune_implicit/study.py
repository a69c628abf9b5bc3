"""What both engines share of Optuna: spaces, storages, and what a finished trial writes into its study."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from tune_implicit.errors import InvalidTypeError, InvalidValueError, StorageError
from tune_implicit.results import number_or_text
from tune_implicit.trial import Record

__all__ = [
    "CHECKPOINT_ATTR",
    "CONFIG_ATTR",
    "FAILURE_ATTR",
    "INTERRUPTED",
    "METRICS_ATTR",
    "RAY_TRIAL_ATTR",
    "Space",
    "call_space",
    "check_space",
    "direction_of",
    "failure_of",
    "middle_config",
    "open_storage",
    "quiet_optuna",
    "suggest",
    "write_config",
    "write_outcome",
]

Space = Mapping[str, BaseDistribution] | Callable[[optuna.Trial], dict[str, Any] | None]

# The user attributes of a trial in its study: its last record; why it failed; its config, where that is not its params;
# the artifact, or the trial of Ray's, that holds its checkpoint.
METRICS_ATTR = "metrics"
FAILURE_ATTR = "failure"
CONFIG_ATTR = "config"
CHECKPOINT_ATTR = "checkpoint"
RAY_TRIAL_ATTR = "ray_trial_id"

# How the failure begins of a trial that neither ended nor was ended by a decision about it: a resumed search runs it
# again.
INTERRUPTED = "The search ended before the trial did."


def check_space(space: Space) -> None:
    """Check that ``space`` is a dict of Optuna distributions or a callable.

    Raises
    ------
    InvalidTypeError
        If it is not.
    InvalidValueError
        If it is empty.
    """
    if callable(space):
        return
    if not isinstance(space, Mapping):
        raise InvalidTypeError(
            "`space` must be a dict of Optuna distributions or a callable(trial) that returns a config, "
            f"got {type(space).__name__}."
        )
    if not space:
        raise InvalidValueError('`space` must name at least one setting, e.g. {"k": IntDistribution(1, 32, log=True)}.')
    for key, distribution in space.items():
        if not isinstance(distribution, FloatDistribution | IntDistribution | CategoricalDistribution):
            raise InvalidTypeError(
                f"`space`[{key!r}] must be an Optuna distribution, got {distribution!r}. "
                "Of a few values make a CategoricalDistribution([...]); what does not vary belongs in `settings`."
            )


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Return the config of ``trial``: its params, or what a define-by-run ``space`` makes of them."""
    if not callable(space):
        return {name: _suggest_one(trial, name, distribution) for name, distribution in space.items()}
    config = call_space(space, trial)
    return dict(trial.params) if config is None else config


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's lines per trial, and its tracebacks of those that failed, off the terminal.

    The search shows its own progress there, keeps why a trial failed, and raises a mistake.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def middle_config(space: Space) -> dict[str, Any]:
    """Return the config in the middle of ``space``: of ranges the middle, of choices the first."""
    with quiet_optuna():
        return suggest(optuna.create_study(sampler=_MiddleSampler()).ask(), space)


class _MiddleSampler(optuna.samplers.BaseSampler):
    """Take the middle of each distribution, the geometric one on a logarithmic scale."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution) -> Any:
        match param_distribution:
            case FloatDistribution(low=low, high=high, step=step, log=log):
                middle = math.sqrt(low * high) if log else (low + high) / 2
                return middle if step is None else low + step * round((middle - low) / step)
            case IntDistribution(low=low, high=high, step=step, log=log):
                middle = math.sqrt(low * high) if log else (low + high) / 2
                return low + step * round((middle - low) / step)
            case CategoricalDistribution(choices=choices):
                return choices[0]
        raise AssertionError("Optuna has three kinds of distributions")


def call_space(space: Callable[[optuna.Trial], dict[str, Any] | None], trial: optuna.Trial) -> dict[str, Any] | None:
    """Return what a define-by-run ``space`` returns for ``trial``.

    Raises
    ------
    InvalidTypeError
        If that is neither a dict nor ``None``.
    """
    config = space(trial)
    if config is not None and not isinstance(config, dict):
        raise InvalidTypeError(
            f"`space(trial)` must return the config as a dict, or None for the trial's params, got {config!r}."
        )
    return config


def _suggest_one(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_float(name, low, high, step=step, log=log)
        case IntDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_int(name, low, high, step=step, log=log)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise AssertionError("check_space lets no other distribution pass")


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


def direction_of(mode: str) -> StudyDirection:
    """Return Optuna's direction for Ray's ``mode``.

    Raises
    ------
    InvalidValueError
        If ``mode`` is neither ``"min"`` nor ``"max"``.
    """
    if mode not in ("min", "max"):
        raise InvalidValueError(f'`mode` must be "min" or "max", got {mode!r}.')
    return StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE


def write_config(trial: optuna.Trial, config: dict[str, Any]) -> None:
    """Write the config of a trial into its study where it is not its params, in what JSON can hold."""
    if config != trial.params:
        trial.set_user_attr(CONFIG_ATTR, json.loads(json.dumps(config, default=number_or_text)))


def failure_of(record: Record, metric: str) -> str | None:
    """Return why a trial that ended with ``record`` has no value to compare, or ``None`` where it has.

    Raises
    ------
    InvalidValueError
        If the record has no such number.
    """
    if failure := record.get("failure"):
        return str(failure)
    reported = [name for name, value in record.items() if not isinstance(value, bool) and isinstance(value, Real)]
    if metric not in reported:
        raise InvalidValueError(
            f"`metric` {metric!r} is reported by no one as a number. The trial reports {', '.join(sorted(reported))}."
        )
    return None if math.isfinite(record[metric]) else f"`{metric}` became {record[metric]}."


def write_outcome(trial: optuna.Trial, record: Record, failure: str | None) -> None:
    """Write a trial's last record, and why it failed if it did, into its study, before the trial is told.

    What JSON cannot hold, such as an engine's own objects and numbers that are not finite, is left out.
    """
    plain = {
        name: value
        for name, value in record.items()
        if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    }
    trial.set_user_attr(METRICS_ATTR, plain)
    if failure is not None:
        trial.set_user_attr(FAILURE_ATTR, failure)
