"""What Ray keeps private and nothing public replaces, each name behind a function of ours.

A test sees to it that they are there, under the oldest and the newest Ray that is promised.
"""

from pathlib import Path
from typing import Any

import optuna
from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError
from ray.train._internal.storage import _list_at_fs_path, get_fs_and_path
from ray.tune.experiment import Trial as RayTrial
from ray.tune.result import AUTO_RESULT_KEYS, DEFAULT_EXPERIMENT_INFO_KEYS, SHOULD_CHECKPOINT
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.repeater import TRIAL_INDEX
from ray.util import client

__all__ = [
    "REPEAT",
    "RESULT_KEYS",
    "SAVE_NOW",
    "completed_trials",
    "files_in",
    "filesystem_of",
    "is_client",
    "raised_by",
    "study_of",
    "trials_of",
]

# The entry of a result that asks Tune for a checkpoint.
SAVE_NOW: str = SHOULD_CHECKPOINT

# The key that Tune's Repeater adds to a config: which repeat of it this is, from 0.
REPEAT: str = TRIAL_INDEX

# What Tune adds to every result, besides the config, and what it is asked for there.
RESULT_KEYS = frozenset({*AUTO_RESULT_KEYS, *DEFAULT_EXPERIMENT_INFO_KEYS, "done", SAVE_NOW})


def is_client() -> bool:
    """Return whether this process is no part of its Ray, but talks to it by ``ray://``."""
    connected: bool = client.ray.is_connected()
    return connected


def filesystem_of(path: str, filesystem: Any = None) -> tuple[Any, str]:
    """Return the file system of a path or URI, and the path on it; with ``filesystem`` given, both as they are."""
    found: tuple[Any, str] = get_fs_and_path(path, filesystem)
    return found


def files_in(filesystem: Any, folder: str) -> list[str]:
    """Return the names of what lies in a folder; none where there is no such folder."""
    names: list[str] = _list_at_fs_path(fs=filesystem, fs_path=folder)
    return names


def study_of(searcher: OptunaSearch) -> optuna.Study:
    """Return the study behind a searcher."""
    study: optuna.Study = searcher._ot_study
    return study


def trials_of(searcher: OptunaSearch) -> dict[str, optuna.Trial]:
    """Return a searcher's trials in its study, by Ray's id."""
    trials: dict[str, optuna.Trial] = searcher._ot_trials
    return trials


def completed_trials(searcher: OptunaSearch) -> set[str]:
    """Return the ids of those that a searcher has told its study of."""
    completed: set[str] = searcher._completed_trials
    return completed


def raised_by(trial: RayTrial) -> Exception | None:
    """Return what the code of a trial that failed has raised, ``None`` where it has only lost its worker."""
    # Where Tune has just written it; `trial.get_pickled_error` looks where it is copied to some time later.
    file = trial.pickled_error_file
    error: Any = None if file is None else cloudpickle.loads(Path(file).read_bytes())
    # A worker that cannot even begin, e.g. for a module it lacks, would fail the same way for every trial.
    raised = isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed)
    return error if raised else None
