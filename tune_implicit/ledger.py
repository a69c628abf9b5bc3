"""A search's study as its ledger: opened, resumed, counted, and written out for people."""

import json
import numbers
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import check_distribution_compatibility
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tune_implicit.errors import InvalidValueError
from tune_implicit.results import Summary, append_trials, earlier_seconds, number_or_text, read_trials
from tune_implicit.study import (
    CHECKPOINT_ATTR,
    CONFIG_ATTR,
    FAILURE_ATTR,
    INTERRUPTED,
    METRICS_ATTR,
    RAY_TRIAL_ATTR,
    Space,
    open_storage,
)
from tune_implicit.trial import CHECKPOINT_FILE

__all__ = ["ARTIFACTS", "RAY_FOLDER", "Ledger", "Progress", "end_running", "open_study", "queue_interrupted"]

JOURNAL_FILE = "study.journal"
# Where the engines put checkpoints, below the folder.
ARTIFACTS = "artifacts"
RAY_FOLDER = "ray"

# The attributes that the search itself keeps: of a trial, which one it repeats; of the study, what it compares by, and
# what is the same in every trial.
RERUN_ATTR = "rerun_of"
METRIC_ATTR = "metric"
SETTINGS_ATTR = "settings"


@dataclass(frozen=True)
class Progress:
    """How far a search is.

    Parameters
    ----------
    finished, n_trials : int
        Trials that ended, and those asked for.
    best : float, optional
        The best value so far.
    elapsed_s, remaining_s : float
        Seconds since the call, and an estimate of those left; ``None`` before there is one.
    """

    finished: int
    n_trials: int
    best: float | None
    elapsed_s: float
    remaining_s: float | None


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
    if not all(_interrupted(trial) or trial.state is TrialState.WAITING for trial in trials):
        raise InvalidValueError(
            f"`output` {str(folder)!r} already holds a search, or `storage` one of the name {name!r}. Pass resume=True "
            "(--resume) to go on with it, or another folder."
        )
    optuna.delete_study(storage=storage, study_name=name)


def end_running(study: optuna.Study) -> None:
    """Record the trials that still run as interrupted."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        optuna.Trial(study, trial._trial_id).set_user_attr(FAILURE_ATTR, INTERRUPTED)
        # Not by `study.tell`, which asks the sampler as well, as if the trial had run to an end.
        study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)


def queue_interrupted(study: optuna.Study, space: Space) -> None:
    """Queue the trials that an earlier call left unfinished to run again, where the space still has them."""
    end_running(study)
    trials = study.trials
    rerun = {trial.user_attrs.get(RERUN_ATTR) for trial in trials}
    for trial in trials:
        if _interrupted(trial) and trial.number not in rerun and trial.params and _fits(trial.params, space):
            study.enqueue_trial(trial.params, user_attrs={RERUN_ATTR: trial.number})


def _fits(params: Mapping[str, Any], space: Space) -> bool:
    if callable(space):
        return True
    try:
        return set(params) == set(space) and all(
            distribution._contains(distribution.to_internal_repr(params[name])) for name, distribution in space.items()
        )
    except ValueError:  # it is of another type
        return False


def _interrupted(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.FAIL and str(trial.user_attrs.get(FAILURE_ATTR)).startswith(INTERRUPTED)


class Ledger:
    """Count a study's finished trials, write each to the folder once, and tell the progress."""

    def __init__(
        self,
        study: optuna.Study,
        folder: Path,
        settings: Mapping[str, Any],
        n_trials: int,
        time_budget_s: float | None,
        on_progress: Callable[[Progress], object] | None,
    ) -> None:
        self._study = study
        self._folder = folder
        self._settings = settings
        self._n_trials = n_trials
        self._time_budget_s = time_budget_s
        self._on_progress = on_progress
        self._start = time.monotonic()
        self._earlier_s = earlier_seconds(folder)
        self._written = {trial.number for trial in read_trials(folder)}
        self._before = len(self._finished())

    @property
    def missing(self) -> int:
        """Trials still to finish."""
        return max(0, self._n_trials - len(self._finished()))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the search began or was resumed."""
        return time.monotonic() - self._start

    def update(self) -> None:
        """Take in the trials that finished since the last call."""
        finished = self._finished()
        new = [trial for trial in finished if trial.number not in self._written]
        if not new:
            return
        start = min(trial.datetime_start for trial in finished if trial.datetime_start is not None)
        append_trials(self._folder, [_row(trial, self._settings, start) for trial in new])
        self._written |= {trial.number for trial in new}
        if self._on_progress is not None:
            self._on_progress(self._progress(finished))

    def summary(self, backend: str, metric: str, mode: str) -> Summary:
        """Return the search in a few words, as it stands."""
        in_time = self._time_budget_s is None or self.elapsed_s < self._time_budget_s
        seconds = self._earlier_s + self.elapsed_s
        return Summary(backend, metric, mode, self._n_trials, seconds, interrupted=in_time and self.missing > 0)

    def _progress(self, finished: list[FrozenTrial]) -> Progress:
        values = [trial.value for trial in finished if trial.state is TrialState.COMPLETE and trial.value is not None]
        best = None
        if values:
            best = min(values) if self._study.direction is StudyDirection.MINIMIZE else max(values)
        done = len(finished) - self._before
        remaining = self.elapsed_s / done * max(0, self._n_trials - len(finished)) if done else None
        if remaining is not None and self._time_budget_s is not None:
            remaining = min(remaining, max(0.0, self._time_budget_s - self.elapsed_s))
        return Progress(len(finished), self._n_trials, best, self.elapsed_s, remaining)

    def _finished(self) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.state.is_finished() and not _interrupted(trial)]


def _row(trial: FrozenTrial, settings: Mapping[str, Any], start: datetime) -> dict[str, Any]:
    """Return the fields of the trial's :class:`TrialResult`."""
    attrs = trial.user_attrs
    checkpoint = None
    if CHECKPOINT_ATTR in attrs:
        checkpoint = f"{ARTIFACTS}/{attrs[CHECKPOINT_ATTR]}"
    elif RAY_TRIAL_ATTR in attrs:
        checkpoint = f"{RAY_FOLDER}/*_{attrs[RAY_TRIAL_ATTR]}_*/checkpoint_*/{CHECKPOINT_FILE}"
    return {
        "number": trial.number,
        "state": {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(trial.state, "failed"),
        "value": trial.value if trial.state is not TrialState.FAIL else None,
        "config": {**settings, **attrs.get(CONFIG_ATTR, trial.params)},
        "metrics": attrs.get(METRICS_ATTR, {}),
        "failure": attrs.get(FAILURE_ATTR),
        "started_s": (trial.datetime_start - start).total_seconds() if trial.datetime_start else 0.0,
        "ended_s": (trial.datetime_complete - start).total_seconds() if trial.datetime_complete else 0.0,
        "checkpoint": checkpoint,
    }
