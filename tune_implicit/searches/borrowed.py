"""What Optuna keeps private and nothing public replaces, each name behind a function of ours.

A test sees to it that they are there, under the oldest and the newest Optuna that is promised.
"""

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, get_storage
from optuna.trial import FrozenTrial, TrialState

__all__ = ["cached", "contains", "end", "put_back", "running_trial", "storage_of", "stored"]


def storage_of(study: optuna.Study) -> BaseStorage:
    """Return the storage that holds ``study``."""
    return study._storage


def stored(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial:
    """Return ``trial`` as its study has it now."""
    return study._storage.get_trial(trial._trial_id)


def cached(storage: BaseStorage) -> BaseStorage:
    """Return a storage that reads finished trials once, as Optuna wraps a database; others as they are."""
    return get_storage(storage)


def end(study: optuna.Study, trial: optuna.Trial, state: TrialState) -> None:
    """Set the state of ``trial``, without the sampler's hearing of it as of a trial that ran to an end."""
    study._storage.set_trial_state_values(trial._trial_id, state=state)


def put_back(study: optuna.Study, trial: optuna.Trial) -> None:
    """Put a trial that runs back into its study's queue, its params and reports with it."""
    study._storage.set_trial_state_values(trial._trial_id, state=TrialState.WAITING)


def running_trial(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """Return a handle to a trial that still runs, to write to."""
    return optuna.Trial(study, trial._trial_id)


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether ``value`` can come from ``distribution``.

    Raises
    ------
    ValueError
        If it is of another type, or none of a categorical distribution's choices.
    """
    return distribution._contains(distribution.to_internal_repr(value))
