"""Finished trials counted, written to the folder, told."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tune_implicit.searches.outcome import CONFIG_ATTR, FAILURE_ATTR, METRICS_ATTR
from tune_implicit.searches.queue import has_ended
from tune_implicit.searches.results import Summary, TrialsFile, earlier_seconds
from tune_implicit.trials.config import merged

__all__ = ["Ledger", "Progress"]


@dataclass(frozen=True)
class Progress:
    """How far a search is.

    Parameters
    ----------
    finished, n_trials : int
        Trials that ended, and those asked for.
    best : float, optional
        The best value so far.
    skipped, fallback : float
        The shares of the finished trials' ul steps that were skipped, and that another solver than theirs answered.
    troubled : int
        Finished trials that did not learn as they should have; each says why in :attr:`TrialResult.troubles`.
    elapsed_s, remaining_s : float
        Seconds since the call, and an estimate of those left; ``None`` before there is one.
    """

    finished: int
    n_trials: int
    best: float | None
    skipped: float
    fallback: float
    troubled: int
    elapsed_s: float
    remaining_s: float | None


class Ledger:
    """Count a study's finished trials, write each to the folder once, and tell the progress."""

    def __init__(
        self,
        study: optuna.Study,
        folder: Path,
        settings_of: Callable[[int], Mapping[str, Any]],
        n_trials: int,
        time_budget_s: float | None,
        on_progress: Callable[[Progress], object] | None,
        saved_at: Callable[[FrozenTrial], list[str]],
    ) -> None:
        self._study = study
        self._folder = folder
        self._settings_of = settings_of
        self._n_trials = n_trials
        self._time_budget_s = time_budget_s
        self._on_progress = on_progress
        self._saved_at = saved_at
        self._start = time.monotonic()
        self._earlier_s = earlier_seconds(folder)
        self._list = TrialsFile(folder)
        self._told = 0
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
        if len(finished) == self._told:
            return
        self._told = len(finished)
        # Other workers write the list as well.
        listed = self._list.numbers()
        start = min((trial.datetime_start for trial in finished if trial.datetime_start is not None), default=None)
        self._list.append(self._row(trial, start) for trial in finished if trial.number not in listed)
        if self._on_progress is not None and finished:
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
        records = [trial.user_attrs.get(METRICS_ATTR, {}) for trial in finished]
        taken = max(1, sum(record.get("ul_step", 0) for record in records))
        skipped, fallback = (
            sum(record.get(name, 0) for record in records) / taken for name in ("skipped_ul_steps", "fallback_ul_steps")
        )
        troubled = sum(bool(record.get("troubles")) for record in records)
        return Progress(len(finished), self._n_trials, best, skipped, fallback, troubled, self.elapsed_s, remaining)

    def _finished(self) -> list[FrozenTrial]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if has_ended(trial)]

    def _row(self, trial: FrozenTrial, start: datetime | None) -> dict[str, Any]:
        """Return the fields of the trial's :class:`TrialResult`."""
        attrs, began, ended = trial.user_attrs, trial.datetime_start, trial.datetime_complete
        return {
            "number": trial.number,
            "state": {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(trial.state, "failed"),
            "value": trial.values[0] if trial.values and trial.state is not TrialState.FAIL else None,
            "config": merged(self._settings_of(trial.number), attrs.get(CONFIG_ATTR, trial.params)),
            "metrics": attrs.get(METRICS_ATTR, {}),
            "failure": attrs.get(FAILURE_ATTR),
            "started_s": (began - start).total_seconds() if began and start else 0.0,
            "ended_s": (ended - start).total_seconds() if ended and start else 0.0,
            "checkpoint": self._saved_at(trial),
        }
