"""Optuna: an ordinary objective in an ordinary study."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, download_artifact, get_all_artifact_meta, upload_artifact
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.rng import preserved_rng
from tune_implicit.searches.engines.base import Work
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
from tune_implicit.trials.checkpoint import CHECKPOINT_FILE
from tune_implicit.trials.config import merged
from tune_implicit.trials.problem import NO_SELECT_DATA
from tune_implicit.trials.record import Record
from tune_implicit.trials.trial import TRIAL_FAILURES, ProblemFactory, Trial, run_trial
from tune_implicit.trials.troubles import TroubleTeller

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

__all__ = ["ImplicitObjective", "OptunaEngine", "saved_at"]

# Where a search saves its trials, in its folder.
FOLDER = "artifacts"


def saved_at(trial: FrozenTrial) -> str | None:
    """Return the file that a trial was saved to, below the search's folder; ``None`` for another engine's."""
    artifact = trial.user_attrs.get(CHECKPOINT_ATTR)
    return None if artifact is None else f"{FOLDER}/{artifact}"


class ImplicitObjective:
    """The objective of ``study.optimize``: one trial with hypergradients for each Optuna trial.

    Records are reported to the study at their ``ul_step``, so that its pruner decides. A trial that diverges ends as
    FAIL, with its reason in the user attribute ``"failure"``, and the study goes on; a mistake in the space or the
    problem raises and ends ``optimize``. The last record is the user attribute ``"metrics"``; of a completed trial, its
    losses and metrics are those of the report that is kept. What it says of a trial that did not learn is the user
    attribute ``"troubles"``, and a :class:`LearningWarning`, once of each kind.

    The global random state is left as it was. Threads share that state: run several workers as processes on one
    storage, not with ``n_jobs``.

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
    artifact_store : optuna.artifacts store, optional
        Where trials are saved, their ul values and ll model included; the user attribute ``"checkpoint"`` holds the
        artifact's id. A trial that starts with that attribute, as one retried by Optuna's
        ``RetryHeartbeatStaleTrialCallback`` does, goes on from there.
    checkpoint_frequency : int, default 0
        Save every so many reports; 0 saves only at the end.

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
        artifact_store: ArtifactStore | None = None,
        checkpoint_frequency: int = 0,
    ) -> None:
        check_space(space)
        self.problem = problem
        self.space = space
        self.data = data
        self.settings = dict(settings or {})
        self.metric = metric
        self.artifact_store = artifact_store
        self.checkpoint_frequency = checkpoint_frequency
        self._warned = False
        self._troubles = TroubleTeller()

    def __call__(self, optuna_trial: optuna.Trial) -> float:
        """Run one trial and return its value, NaN where it failed, which Optuna records as FAIL.

        Parameters
        ----------
        optuna_trial : optuna.Trial
            Where settings come from and records go.

        Returns
        -------
        float

        Raises
        ------
        optuna.TrialPruned
            If the study's pruner stops the trial.
        InvalidValueError
            If the study looks for the largest loss, or has several objectives.
        """
        try:
            config = suggest(optuna_trial, self.space)
            write_config(optuna_trial, config)
            with preserved_rng():
                record, outcome = self._run(merged(self.settings, config), optuna_trial)
            write_outcome(optuna_trial, record, outcome)
        except BaseException as error:
            # Ctrl-C or a mistake: the trial ends with the search, and not by its own numbers.
            raised = "" if isinstance(error, KeyboardInterrupt) else f" It raised {type(error).__name__}: {error}"
            write_failure(optuna_trial, replace(CUT_OFF, failure=f"{CUT_OFF.failure}{raised}"))
            raise
        self._troubles.tell(record, f"Trial {optuna_trial.number}")  # all of it is saved, should that be an error
        if outcome.state is TrialState.FAIL:
            return math.nan
        if outcome.state is TrialState.PRUNED:
            raise optuna.TrialPruned(f"Pruned at ul step {record['ul_step']}.")
        return float(record[self.metric])

    def _run(self, config: dict[str, Any], optuna_trial: optuna.Trial) -> tuple[Record, Outcome]:
        """Run and save the trial of ``config``, and return its last record and how it ended."""
        trial = Trial(self.problem, config, self.data, self.metric, _mode_of(optuna_trial))
        if trial.problem.selected_on != "select_data" and not self._warned:
            warnings.warn(NO_SELECT_DATA, stacklevel=2)
            self._warned = True
        self._resume(trial, optuna_trial)
        try:
            record = run_trial(trial, _StudyReporter(self, trial, optuna_trial))
        except TRIAL_FAILURES as error:
            record = trial.failure_record(str(error))
        outcome = outcome_of(record, self.metric)
        self.save(trial, optuna_trial)
        return record, outcome

    def save(self, trial: Trial, optuna_trial: optuna.Trial) -> None:
        """Put the trial into the artifact store, if there is one, in place of what was saved of it before."""
        if self.artifact_store is None:
            return
        # What the trial began from is another's if it is not linked to this one.
        own = {artifact.artifact_id for artifact in get_all_artifact_meta(optuna_trial)}
        previous = optuna_trial.user_attrs.get(CHECKPOINT_ATTR)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / CHECKPOINT_FILE
            trial.save(path)
            artifact = upload_artifact(
                artifact_store=self.artifact_store, file_path=str(path), study_or_trial=optuna_trial
            )
        optuna_trial.set_user_attr(CHECKPOINT_ATTR, artifact)
        if previous in own:
            self.artifact_store.remove(previous)

    def _resume(self, trial: Trial, optuna_trial: optuna.Trial) -> None:
        artifact = optuna_trial.user_attrs.get(CHECKPOINT_ATTR)
        if artifact is None or self.artifact_store is None:
            return
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / CHECKPOINT_FILE
            download_artifact(artifact_store=self.artifact_store, file_path=str(path), artifact_id=artifact)
            trial.load(path)


def _mode_of(optuna_trial: optuna.Trial) -> str:
    """Return Ray's ``mode`` for the study of a trial; a FixedTrial has none, and is taken to minimise.

    Raises
    ------
    InvalidValueError
        If the study has several objectives.
    """
    study = getattr(optuna_trial, "study", None)
    directions = [StudyDirection.MINIMIZE] if study is None else study.directions
    if len(directions) != 1:
        raise InvalidValueError(
            f"The study must have one direction, got {len(directions)}: a trial has one value. Create it with "
            "`direction`, and put other numbers into `metrics` of the BilevelProblem."
        )
    return "max" if directions[0] is StudyDirection.MAXIMIZE else "min"


class _StudyReporter:
    """Tell a study of a trial's records, and save the trial as often as the objective wants."""

    def __init__(self, objective: ImplicitObjective, trial: Trial, optuna_trial: optuna.Trial) -> None:
        self._objective = objective
        self._trial = trial
        self._optuna_trial = optuna_trial

    def report(self, record: Record) -> None:
        """Report the objective's metric at the record's ul step."""
        failed = failure_of(record, self._objective.metric) is not None
        # A trial that diverged has measured nothing since its last report.
        if not failed and record["ended_by"] != "divergence":
            self._optuna_trial.report(record[self._objective.metric], record["ul_step"])
        frequency = self._objective.checkpoint_frequency
        if frequency and len(self._trial.history) % frequency == 0 and not self._trial.completed:
            self._objective.save(self._trial, self._optuna_trial)

    def should_stop(self) -> bool:
        """Return whether the study's pruner ends the trial."""
        return self._optuna_trial.should_prune()


@dataclass(frozen=True)
class OptunaEngine:
    """Run trials in this process, one after the other.

    Parameters
    ----------
    work : Work
        What the trials are made of.
    """

    work: Work

    def run(
        self, study: optuna.Study, n_trials: int, time_budget_s: float | None, on_trial_end: Callable[[], None]
    ) -> None:
        """Run ``n_trials`` trials more in ``study``; the one that runs when the time is over may finish."""
        work, artifacts = self.work, self.work.folder / FOLDER
        artifacts.mkdir(exist_ok=True)
        objective = ImplicitObjective(
            work.problem,
            work.space,
            work.data,
            settings=work.settings,
            metric=work.metric,
            artifact_store=FileSystemArtifactStore(artifacts),
        )
        study.optimize(
            objective, n_trials=n_trials, timeout=time_budget_s, callbacks=[lambda _study, _trial: on_trial_end()]
        )
