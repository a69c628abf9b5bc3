"""Optuna: an ordinary objective in an ordinary study."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
from torch import Tensor

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.rng import preserved_rng
from tune_implicit.searches.borrowed import stored
from tune_implicit.searches.engines.optuna_study.artifacts import ArtifactSaves
from tune_implicit.searches.leases import LeaseLostError, Leases, lease_of
from tune_implicit.searches.outcome import (
    CHECKPOINT_ATTR,
    CUT_OFF,
    Outcome,
    failure_of,
    outcome_of,
    write_config,
    write_failure,
    write_outcome,
)
from tune_implicit.searches.space import Space, check_space, suggest
from tune_implicit.trials.config import merged
from tune_implicit.trials.problem import NO_SELECT_DATA
from tune_implicit.trials.record import Record, check_metric
from tune_implicit.trials.saving import SaveClock
from tune_implicit.trials.trial import TRIAL_FAILURES, ProblemFactory, Trial, run_trial
from tune_implicit.trials.troubles import TroubleTeller

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

__all__ = ["ImplicitObjective", "alone"]


def _last_quantiles(trial: Trial) -> dict[str, list[float]]:
    """Return the quantiles of a trial's ul values at its last report."""
    quantiles: dict[str, list[float]] = trial.history[-1]["ul_quantiles"] if trial.history else {}
    return quantiles


def _no_files(run: str) -> Iterable[Path]:
    return ()


class ImplicitObjective:
    """The objective of ``study.optimize``: one trial with hypergradients for each Optuna trial.

    Records are reported to the study at their ``ul_step``, so that its pruner decides. A trial that diverges ends as
    FAIL, with its reason in the user attribute ``"failure"``, and the study goes on; a mistake in the space or the
    problem raises and ends ``optimize``. The last record is the user attribute ``"metrics"``; of a completed trial, its
    losses and metrics are those of the report that is kept. What it says of a trial that did not learn is the user
    attribute ``"troubles"``, and a :class:`LearningWarning`, once of each kind.

    Each entry of the last record is a user attribute of its own as well, and so are the least, the median and the
    largest of each ul parameter's values.

    While a trial runs it is saved by time, and holds a lease in the study: a trial of a process that died is known as
    such, and :func:`requeue` queues it to go on from its last save. The global random state is left as it was. Threads
    share that state: run several workers as processes on one storage, not with ``n_jobs``.

    Parameters
    ----------
    problem : callable(config) or callable(config, data) -> BilevelProblem
        Called once per trial.
    space : dict of Optuna distributions, or callable(trial) -> dict or None
        The settings to search; a callable returns the config itself.
    data : object, optional
        The second argument of ``problem``.
    settings : mapping, optional
        Config keys that are the same in every trial, such as ``ul_steps``; the space overrides them.
    metric : str, default "select_loss"
        The record's entry that is the trial's value.
    metrics : sequence of str, optional
        Several of them instead, one for each direction of the study. The first is that by which a trial keeps its best
        report; nothing is reported while it runs, since Optuna prunes by one value alone.
    artifact_store : optuna.artifacts store, optional
        Where trials are saved, their ul values and ll model included; at its end a trial is linked to its artifact,
        whose id is the user attribute ``"checkpoint"``. A trial that starts with that attribute, or that was retried by
        Optuna's ``RetryHeartbeatStaleTrialCallback``, goes on from there.
    save_every_s : float, default 30
        Seconds between two saves of a trial that runs; more where saving would take over 2% of its time.
    checkpoint_frequency : int, default 0
        Save every so many reports as well.
    initial_ul_state : mapping of str to Tensor, optional
        The ul values that each trial starts from, as ``ul_model.state_dict()`` has them.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        If the space is not one, or empty.
    """

    def __init__(
        self,
        problem: ProblemFactory,
        space: Space,
        data: Any = None,
        *,
        settings: Mapping[str, Any] | None = None,
        metric: str = "select_loss",
        metrics: Sequence[str] | None = None,
        artifact_store: ArtifactStore | None = None,
        save_every_s: float = 30.0,
        checkpoint_frequency: int = 0,
        initial_ul_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_space(space)
        self.problem = problem
        self.space = space
        self.data = data
        self.settings = dict(settings or {})
        self.metrics = [metric] if metrics is None else list(metrics)
        self.metric = self.metrics[0]
        self.artifact_store = artifact_store
        self.save_every_s = save_every_s
        self.checkpoint_frequency = checkpoint_frequency
        self.initial_ul_state = initial_ul_state
        self._warned = False
        self._troubles = TroubleTeller()

    def __call__(self, optuna_trial: optuna.Trial) -> float | list[float]:
        """Run one trial and return its value, NaN where it failed, which Optuna records as FAIL.

        Parameters
        ----------
        optuna_trial : optuna.Trial
            Where settings come from and records go.

        Returns
        -------
        float, or list of float for several ``metrics``

        Raises
        ------
        optuna.TrialPruned
            If the study's pruner stops the trial, or another worker has taken it over.
        InvalidValueError
            If the study looks for the largest loss, has another number of objectives than there are ``metrics``, or
            runs trials in several threads.
        """
        study = getattr(optuna_trial, "study", None)
        with alone(), contextlib.nullcontext() if study is None else Leases(study) as leases:
            earlier = lease_of(stored(study, optuna_trial)) if study is not None else None
            if leases is not None:
                leases.take(optuna_trial, leases.new(*(earlier.runs if earlier is not None else ())))
            try:
                record, outcome = self.run(optuna_trial, leases, flat=True)
            except LeaseLostError as lost:
                raise optuna.TrialPruned(str(lost)) from lost
            except BaseException as error:
                # Ctrl-C or a mistake: the trial ends with the search, and not by its own numbers.
                raised = "" if isinstance(error, KeyboardInterrupt) else f" It raised {type(error).__name__}: {error}"
                write_failure(optuna_trial, replace(CUT_OFF, failure=f"{CUT_OFF.failure}{raised}"))
                raise
        if outcome.state is TrialState.FAIL:
            return math.nan if len(self.metrics) == 1 else [math.nan] * len(self.metrics)
        if outcome.state is TrialState.PRUNED:
            raise optuna.TrialPruned(f"Pruned at ul step {record['ul_step']}.")
        values = self.values(record)
        return values[0] if len(values) == 1 else values

    def values(self, record: Record) -> list[float]:
        """Return the numbers of ``record`` that trials are compared by."""
        return [float(record[name]) for name in self.metrics]

    def run(
        self,
        optuna_trial: optuna.Trial,
        leases: Leases | None,
        *,
        flat: bool,
        extra: Mapping[str, Any] | None = None,
        others: Callable[[str], Iterable[Path]] = _no_files,
    ) -> tuple[Record, Outcome]:
        """Run one trial, or the rest of it, and write what it came to into its study, whose tell is left to the caller.

        Parameters
        ----------
        optuna_trial : optuna.Trial
            Where settings come from and records go.
        leases : Leases, optional
            Those of the worker, which holds the trial.
        flat : bool
            Whether each metric becomes an attribute of its own, or all of them one.
        extra : mapping, optional
            Settings of this trial alone, under its others.
        others : callable(str) -> iterable of path
            Where another engine may have saved a run of the trial.

        Raises
        ------
        LeaseLostError
            If another worker has taken it over.
        """
        config = suggest(optuna_trial, self.space)
        write_config(optuna_trial, config)
        with preserved_rng():
            whole = merged(merged(extra, self.settings), config)
            trial = Trial(
                self.problem,
                whole,
                self.data,
                self.metric,
                _mode_of(optuna_trial, self.metrics),
                initial_ul_state=self.initial_ul_state,
            )
            if trial.problem.selected_on != "select_data" and not self._warned:
                warnings.warn(NO_SELECT_DATA, stacklevel=2)
                self._warned = True
            runs = (uuid.uuid4().hex,) if leases is None else leases.runs(optuna_trial)
            saves = ArtifactSaves(self.artifact_store, optuna_trial, runs)
            saves.load(trial, (path for run in runs for path in others(run)))
            reporter = _StudyReporter(self, trial, optuna_trial, saves, leases)
            try:
                reporter.report_earlier()
                ends = trial.completed or (bool(trial.history) and reporter.should_stop())
                record = trial.record if ends else run_trial(trial, reporter)
            except TRIAL_FAILURES as error:
                record = trial.failure_record(str(error))
        for name in self.metrics[1:]:
            failure_of(record, name)  # each is reported
        outcome = outcome_of(record, self.metric)
        if leases is not None:
            leases.check(optuna_trial)
        saves.finish(trial)
        if flat and saves.linked is not None:
            optuna_trial.set_user_attr(CHECKPOINT_ATTR, saves.linked)
        write_outcome(optuna_trial, record, outcome, flat=flat, ul_quantiles=_last_quantiles(trial))
        self._troubles.tell(record, f"Trial {optuna_trial.number}")  # all of it is saved, should that be an error
        return record, outcome


def _mode_of(optuna_trial: optuna.Trial, metrics: Sequence[str]) -> str:
    """Return Ray's ``mode`` for the study of a trial; a FixedTrial has none, and is taken to minimise.

    Raises
    ------
    InvalidValueError
        If the study has another number of objectives than there are ``metrics``, or one takes the largest loss.
    """
    study = getattr(optuna_trial, "study", None)
    directions = [StudyDirection.MINIMIZE] * len(metrics) if study is None else study.directions
    if len(directions) != len(metrics):
        raise InvalidValueError(
            f"The study must have as many directions as there are `metrics`, got {len(directions)} for "
            f"{', '.join(metrics)}. Create it with `direction`, or with `directions` and pass `metrics` to "
            "ImplicitObjective; other numbers belong into `metrics` of the BilevelProblem."
        )
    modes = ["max" if direction is StudyDirection.MAXIMIZE else "min" for direction in directions]
    for metric, mode in zip(metrics, modes, strict=True):
        check_metric(metric, mode)
    return modes[0]


_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Run nothing else that uses the global random state of this process.

    Raises
    ------
    InvalidValueError
        If another thread does.
    """
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise InvalidValueError(
            "`n_jobs` of study.optimize must be 1, as threads share one random state, and so would change each "
            "other's trials. Start several processes on one storage, e.g. by `tune-implicit run TASK --workers 2`."
        )
    try:
        yield
    finally:
        _ONE_AT_A_TIME.release()


class _StudyReporter:
    """Tell a study of a trial's records, and save the trial as often as the objective wants."""

    def __init__(
        self,
        objective: ImplicitObjective,
        trial: Trial,
        optuna_trial: optuna.Trial,
        saves: ArtifactSaves,
        leases: Leases | None,
    ) -> None:
        self._objective = objective
        self._trial = trial
        self._optuna_trial = optuna_trial
        self._saves = saves
        self._leases = leases
        self._clock = SaveClock(objective.save_every_s)
        study = getattr(optuna_trial, "study", None)
        known = {} if study is None else stored(study, optuna_trial).intermediate_values
        self._last_step = max(known, default=-1)

    def report_earlier(self) -> None:
        """Report what a trial that goes on has measured before, where the study has not got it."""
        for record in self._trial.history:
            self._tell(record)

    def report(self, record: Record) -> None:
        """Report the objective's metric at the record's ul step.

        Raises
        ------
        LeaseLostError
            If another worker has taken the trial over.
        """
        if self._leases is not None:
            self._leases.check(self._optuna_trial)
        failed = failure_of(record, self._objective.metric) is not None
        # A trial that diverged has measured nothing since its last report.
        if not failed and record["ended_by"] != "divergence":
            self._tell(record)
        frequency = self._objective.checkpoint_frequency
        often = frequency > 0 and len(self._trial.history) % frequency == 0
        if not self._trial.completed and (often or self._clock.due()):
            start = time.monotonic()
            self._saves.save(self._trial)
            self._clock.saved(time.monotonic() - start)

    def _tell(self, record: Record) -> None:
        # Optuna takes no reports for several objectives, and each step once.
        if len(self._objective.metrics) == 1 and record["ul_step"] > self._last_step:
            self._optuna_trial.report(record[self._objective.metric], record["ul_step"])
            self._last_step = record["ul_step"]

    def should_stop(self) -> bool:
        """Return whether the study's pruner ends the trial, which it is not asked once more before what it has seen."""
        new = self._trial.history[-1]["ul_step"] >= self._last_step
        return new and len(self._objective.metrics) == 1 and self._optuna_trial.should_prune()
