"""Ray Tune's OptunaSearch, with each trial's true end in its Optuna study."""

from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from ray import cloudpickle
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tune_implicit.errors import InvalidValueError
from tune_implicit.searches.borrowed import stored
from tune_implicit.searches.engines.ray_tune.borrowed import RESULT_KEYS, completed_trials, study_of, trials_of
from tune_implicit.searches.leases import LEASE_S, LeaseLostError, Leases, lease_of
from tune_implicit.searches.outcome import (
    CUT_OFF,
    Outcome,
    failure_of,
    outcome_of,
    write_config,
    write_outcome,
)
from tune_implicit.searches.queue import TrialQueue
from tune_implicit.searches.space import Space, check_space, suggest
from tune_implicit.searches.study import open_storage
from tune_implicit.trials.record import Record, check_metric

__all__ = ["ImplicitOptunaSearch"]


class ImplicitOptunaSearch(OptunaSearch):  # type: ignore[misc]
    """Ray Tune's ``OptunaSearch`` for :class:`ImplicitTrainable`.

    It mends what the base class leaves wrong in the study: a trial whose metric is NaN stays RUNNING for ever, and one
    that a scheduler stopped counts as COMPLETE at its unfinished value. Here a trial ends as COMPLETE when it reports
    ``completed``, as PRUNED when a scheduler stopped it, and as FAIL, with its reason in the user attribute
    ``"failure"``, when it has no finite value. The last record is the user attribute ``"metrics"``.

    Parameters
    ----------
    space : dict of Optuna distributions, or callable(trial) -> dict or None
        The settings to search; a callable returns the config itself.
    metric : str, default "select_loss"
        What to compare trials by.
    mode : {"min", "max"}, default "min"
        Which end of it is better.
    storage : str or BaseStorage, optional
        A database URL, the path of a journal file, or a storage object; in memory by default.
    study_name : str, default "tune_implicit"
        In the storage. A study of this name is continued.
    sampler : BaseSampler, optional
        TPE by default.
    seed : int, optional
        The seed of the default sampler.
    points_to_evaluate : list of dict, optional
        Complete params to try first.
    lease_s : float, default 60
        Seconds without a sign of life after which other workers of the study may take over this one's trials.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        If the space is not one, ``mode`` is neither of the two, or it is ``"max"`` of a loss.
    StorageError
        If the storage cannot be opened.
    """

    def __init__(
        self,
        space: Space,
        metric: str = "select_loss",
        mode: str = "min",
        *,
        storage: str | BaseStorage | None = None,
        study_name: str = "tune_implicit",
        sampler: BaseSampler | None = None,
        seed: int | None = None,
        points_to_evaluate: list[dict[str, Any]] | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        check_space(space)
        check_metric(metric, mode)
        self._last_steps: dict[str, int] = {}
        self._lease_s = lease_s
        self._queue: TrialQueue | None = None
        # Trials that another worker has taken over.
        self.lost: set[str] = set()
        super().__init__(
            space,
            metric=metric,
            mode=mode,
            points_to_evaluate=points_to_evaluate,
            sampler=sampler,
            study_name=study_name,
            storage=None if storage is None else open_storage(storage),
            seed=seed,
        )

    @property
    def study(self) -> optuna.Study:
        """The study behind the search."""
        return study_of(self)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Check that ``TuneConfig`` compares trials as this searcher does.

        Raises
        ------
        InvalidValueError
            If its ``metric`` or ``mode`` is another.
        """
        if (metric or self.metric, mode or self.mode) != (self.metric, self.mode):
            raise InvalidValueError(
                f"TuneConfig compares trials by {metric!r} ({mode}), ImplicitOptunaSearch by {self.metric!r} "
                f"({self.mode}). Pass the same `metric` and `mode` to both."
            )
        return bool(super().set_search_properties(metric, mode, config, **spec))

    @property
    def queue(self) -> TrialQueue:
        """Where trials come from, and are told of."""
        if self._queue is None:
            leases = Leases(self.study, self._lease_s).__enter__()  # until the process ends
            self._queue = TrialQueue(self.study, None, leases)
        return self._queue

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the config of the trial ``trial_id``; ``None`` for none yet, and Ray's FINISHED for none any more."""
        if trial_id not in trials_of(self):
            trial = self.queue.take(trial_id)
            if trial is None:
                return str(Searcher.FINISHED) if self.queue.over else None
            trials_of(self)[trial_id] = trial
        trial = trials_of(self)[trial_id]
        config = suggest(trial, self._space)
        write_config(trial, config)
        return config

    def on_trial_result(self, trial_id: str, result: Record) -> None:
        """Report a running trial's value to the study, at its ul step."""
        if trial_id in completed_trials(self):
            return
        try:
            self.queue.leases.check(trials_of(self)[trial_id])
        except LeaseLostError:
            completed_trials(self).add(trial_id)
            self.lost.add(trial_id)
            return
        if failure_of(result, self.metric) is None:
            self._report(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Record | None = None, error: bool = False) -> None:
        """Tell the study how the trial ended."""
        if trial_id in completed_trials(self):
            return
        completed_trials(self).add(trial_id)
        trial = trials_of(self)[trial_id]
        if not self.queue.holds(trial):
            return  # it is another worker's by now
        outcome = self._end_of(trial, result, error)
        if outcome is CUT_OFF:
            self.queue.give_back(trial)
            return
        record = {name: value for name, value in (result or {}).items() if not name.startswith("config/")}
        write_outcome(trial, {name: value for name, value in record.items() if name not in RESULT_KEYS}, outcome)
        if outcome.failure is None and result:
            # Tune does not pass a trial's last result to `on_trial_result`.
            self._report(trial_id, result)
        value = result[self.metric] if result and outcome.state is TrialState.COMPLETE else None
        self.queue.tell(trial, value, outcome.state)

    def _end_of(self, trial: optuna.Trial, result: Record | None, error: bool) -> Outcome:
        if error:
            run = self.queue.leases.runs(trial)[-1]
            return Outcome(
                TrialState.FAIL, f"The trial raised an error or lost its worker: see Ray Tune's folder of trial {run}."
            )
        if result is None:
            # A paused trial that its scheduler gives up has no last result to hand over.
            return Outcome(TrialState.PRUNED) if stored(self.study, trial).intermediate_values else CUT_OFF
        outcome = outcome_of(result, self.metric)
        # A scheduler's decision sets `done`; a search that ends under a running trial does not.
        return CUT_OFF if outcome.state is TrialState.PRUNED and not result.get("done") else outcome

    def _report(self, trial_id: str, result: Record) -> None:
        step = int(result.get("ul_step") or result["training_iteration"])
        # A trial that lost its worker takes the steps since its last checkpoint once more.
        if trial_id not in self._last_steps:
            known = stored(self.study, trials_of(self)[trial_id]).intermediate_values
            self._last_steps[trial_id] = max(known, default=-1)
        if step > self._last_steps[trial_id]:
            value: float = result[self.metric]
            # The last record of a completed trial has the value that is kept, and what was measured last beside it.
            measured = result.get("last_value", value) if value == result.get("kept_value") else value
            trials_of(self)[trial_id].report(measured, step)
            self._last_steps[trial_id] = step

    def on_pause(self, trial_id: str) -> None:
        """Do nothing; schedulers that pause trials call it on every searcher."""

    def on_unpause(self, trial_id: str) -> None:
        """Do nothing; schedulers that pause trials call it on every searcher."""

    def save(self, checkpoint_path: str) -> None:
        """Write the searcher to a file, a space defined in a script included."""
        with Path(checkpoint_path).open("wb") as file:
            cloudpickle.dump(self.__getstate__(), file)

    def __getstate__(self) -> dict[str, Any]:
        # The leases are this process's; another takes its own.
        return self.__dict__ | {"_queue": None}

    def restore(self, checkpoint_path: str) -> None:
        """Read the searcher from a file; its study may be ahead of it, and knows what has ended since."""
        super().restore(checkpoint_path)
        for trial_id, trial in trials_of(self).items():
            now = stored(self.study, trial)
            if now.state is TrialState.RUNNING:
                lease = lease_of(now)
                runs = lease.runs if lease is not None else (trial_id,)
                self.queue.leases.take(trial, self.queue.leases.new(*runs))
                self._last_steps[trial_id] = max(now.intermediate_values, default=-1)
            else:
                completed_trials(self).add(trial_id)
