"""Ray Tune's OptunaSearch, with each trial's true end in its Optuna study."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from ray import cloudpickle
from ray.tune.search.optuna import OptunaSearch

from tune_implicit.errors import InvalidValueError
from tune_implicit.searches.borrowed import stored
from tune_implicit.searches.engines.ray_tune.borrowed import RESULT_KEYS, completed_trials, study_of, trials_of
from tune_implicit.searches.outcome import (
    CUT_OFF,
    RAY_TRIAL_ATTR,
    Outcome,
    failure_of,
    outcome_of,
    write_config,
    write_outcome,
)
from tune_implicit.searches.space import Space, call_space, check_space
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
    ) -> None:
        check_space(space)
        check_metric(metric, mode)
        self._configs = _DefineByRun(space) if callable(space) else None
        self._last_steps: dict[str, int] = {}
        super().__init__(
            self._configs or space,
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

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the config of the trial ``trial_id``."""
        config: dict[str, Any] | None = super().suggest(trial_id)
        trial = trials_of(self)[trial_id]
        trial.set_user_attr(RAY_TRIAL_ATTR, trial_id)
        if self._configs is not None and self._configs.returned is not None:
            config = self._configs.returned
            write_config(trial, config)
        return config

    def on_trial_result(self, trial_id: str, result: Record) -> None:
        """Report a running trial's value to the study, at its ul step."""
        if trial_id not in completed_trials(self) and failure_of(result, self.metric) is None:
            self._report(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Record | None = None, error: bool = False) -> None:
        """Tell the study how the trial ended."""
        if trial_id in completed_trials(self):
            return
        completed_trials(self).add(trial_id)
        trial = trials_of(self)[trial_id]
        outcome = self._end_of(trial, result, error)
        record = {name: value for name, value in (result or {}).items() if not name.startswith("config/")}
        write_outcome(trial, {name: value for name, value in record.items() if name not in RESULT_KEYS}, outcome)
        if outcome.failure is None and result:
            # Tune does not pass a trial's last result to `on_trial_result`.
            self._report(trial_id, result)
        value = result[self.metric] if result and outcome.state is TrialState.COMPLETE else None
        self._tell(trial, value, outcome.state)

    def _end_of(self, trial: optuna.Trial, result: Record | None, error: bool) -> Outcome:
        if error:
            ray_trial = trial.user_attrs.get(RAY_TRIAL_ATTR)
            return Outcome(
                TrialState.FAIL,
                f"The trial raised an error or lost its worker: see Ray Tune's folder of trial {ray_trial}.",
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
        if step > self._last_steps.get(trial_id, -1):
            value: float = result[self.metric]
            # The last record of a completed trial has the value that is kept, and what was measured last beside it.
            measured = result.get("last_value", value) if value == result.get("kept_value") else value
            trials_of(self)[trial_id].report(measured, step)
            self._last_steps[trial_id] = step

    def _tell(self, trial: optuna.Trial, value: float | None, state: TrialState) -> None:
        try:
            self.study.tell(trial, value, state=state)
        except RuntimeError:
            # A sampler with no more to propose, such as GridSampler, stops the study, which Optuna allows inside
            # `optimize` alone; by then the trial is told.
            if not stored(self.study, trial).state.is_finished():
                raise

    def on_pause(self, trial_id: str) -> None:
        """Do nothing; schedulers that pause trials call it on every searcher."""

    def on_unpause(self, trial_id: str) -> None:
        """Do nothing; schedulers that pause trials call it on every searcher."""

    def save(self, checkpoint_path: str) -> None:
        """Write the searcher to a file, a space defined in a script included."""
        with Path(checkpoint_path).open("wb") as file:
            cloudpickle.dump(self.__dict__, file)


class _DefineByRun:
    """A define-by-run space whose returned dict is the whole config, as it is for :class:`ImplicitObjective`.

    ``OptunaSearch`` would add every suggested param to it, those that the space only computes with included.
    """

    def __init__(self, space: Callable[[optuna.Trial], dict[str, Any] | None]) -> None:
        self._space = space
        self.returned: dict[str, Any] | None = None

    def __call__(self, trial: optuna.Trial) -> dict[str, Any] | None:
        self.returned = call_space(self._space, trial)
        return self.returned
