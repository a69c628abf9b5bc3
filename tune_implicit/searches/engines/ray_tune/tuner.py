"""A whole search on Ray Tune: n trials of an ImplicitTrainable in one Tuner."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler

from tune_implicit.searches.borrowed import storage_of
from tune_implicit.searches.engines.base import Work
from tune_implicit.searches.engines.ray_tune.borrowed import raised_by
from tune_implicit.searches.engines.ray_tune.cluster import connected, places
from tune_implicit.searches.engines.ray_tune.folder import FOLDER
from tune_implicit.searches.engines.ray_tune.searcher import ImplicitOptunaSearch
from tune_implicit.searches.engines.ray_tune.trainable import ImplicitTrainable
from tune_implicit.searches.quiet import quiet_ray
from tune_implicit.trials.problem import NO_SELECT_DATA
from tune_implicit.trials.record import Record
from tune_implicit.trials.troubles import TroubleTeller

__all__ = ["RayEngine", "Scheduler"]

Scheduler = TrialScheduler

# How often a trial is started again after its worker or node died. What a trial itself raises ends the search.
MAX_WORKER_FAILURES = 3


@dataclass(frozen=True)
class RayEngine:
    """Run trials on the Ray cluster at hand, or on one started for the run on this machine.

    Parameters
    ----------
    work : Work
        What the trials are made of.
    scheduler : Ray Tune scheduler, optional
        What stops trials.
    max_concurrent_trials : int, optional
        As many as fit by default.
    cpus_per_trial, gpus_per_trial : float
        What a trial occupies.
    """

    work: Work
    scheduler: TrialScheduler | None = None
    max_concurrent_trials: int | None = None
    cpus_per_trial: float = 1
    gpus_per_trial: float = 0

    def run(
        self, study: optuna.Study, n_trials: int, time_budget_s: float | None, on_trial_end: Callable[[], None]
    ) -> None:
        """Run ``n_trials`` trials more in ``study``; those that run when the time is over are ended.

        Raises
        ------
        InvalidValueError
            If a trial needs more than this machine has.
        Exception
            What a trial raised, if one did: a mistake in the problem or the space.
        """
        work = self.work
        searcher = _PatientSearch(
            work.space,
            work.metric,
            work.mode,
            storage=storage_of(study),
            study_name=study.study_name,
            sampler=study.sampler,
        )
        watcher = _Watcher(on_trial_end, searcher)
        with quiet_ray(), _own_ctrl_c(), connected(self.cpus_per_trial, self.gpus_per_trial):
            self._tuner(searcher, watcher, n_trials, time_budget_s).fit()
        if isinstance(watcher.error, RayTaskError):
            # As the trial raised it; the worker's traceback is what it comes from.
            raise watcher.error.cause from watcher.error
        if watcher.error is not None:
            raise watcher.error

    def _tuner(
        self, searcher: "_PatientSearch", watcher: "_Watcher", n_trials: int, time_budget_s: float | None
    ) -> tune.Tuner:
        work, cpus, gpus = self.work, self.cpus_per_trial, self.gpus_per_trial
        trainable = tune.with_parameters(
            ImplicitTrainable, problem=work.problem, data=work.data, metric=work.metric, mode=work.mode
        )
        return tune.Tuner(
            tune.with_resources(trainable, {"cpu": cpus, "gpu": gpus}),
            param_space=dict(work.settings),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=self.scheduler,
                num_samples=n_trials,
                metric=work.metric,
                mode=work.mode,
                time_budget_s=time_budget_s,
                max_concurrent_trials=self.max_concurrent_trials or places(cpus, gpus),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=FOLDER,
                storage_path=str(work.folder.absolute()),
                callbacks=[watcher],
                stop=_StopWhen(watcher),
                failure_config=tune.FailureConfig(max_failures=MAX_WORKER_FAILURES),
                verbose=0,
            ),
        )


@contextmanager
def _own_ctrl_c() -> Iterator[None]:
    """Put back what Ctrl-C did before Tune, whose handler stays after its run and only notes that it came."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Tune sets none there
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if before is not None:  # what Python did not set cannot be put back
            signal.signal(signal.SIGINT, before)


class _PatientSearch(ImplicitOptunaSearch):
    """A searcher that waits to be told what a trial's error was: Tune tells it only that there was one."""

    def on_trial_complete(self, trial_id: str, result: Record | None = None, error: bool = False) -> None:
        """Tell the study how the trial ended, unless by an error."""
        if not error:
            super().on_trial_complete(trial_id, result)

    def on_worker_lost(self, trial_id: str) -> None:
        """Tell the study that the trial failed."""
        super().on_trial_complete(trial_id, error=True)


class _Watcher(tune.Callback):  # type: ignore[misc]
    """Hear of each trial's end, and of the first error that a trial itself raised."""

    def __init__(self, on_trial_end: Callable[[], None], searcher: _PatientSearch) -> None:
        self._on_trial_end = on_trial_end
        self._searcher = searcher
        self._warned = False
        self._troubles = TroubleTeller()
        self.error: Exception | None = None

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Pass it on, and say once what the worker says where its output is hidden."""
        record = trial.last_result or {}
        self._troubles.tell(record)
        if record.get("selected_on") == "validate_data" and not self._warned:
            warnings.warn(NO_SELECT_DATA, stacklevel=2)
            self._warned = True
        self._on_trial_end()

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Keep the error, or pass on that the trial lost its worker too often."""
        self.error = self.error or raised_by(trial)
        if self.error is None:
            self._searcher.on_worker_lost(trial.trial_id)
        self._on_trial_end()

    def on_trial_recover(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Keep the error: starting the trial again would only repeat it."""
        self.error = self.error or raised_by(trial)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks next to the trials; a listener on this process has no place there.
        return self.__dict__ | {"_on_trial_end": _ignore, "_searcher": None, "_warned": True, "error": None}


class _StopWhen(tune.Stopper):  # type: ignore[misc]
    """End the search once its watcher has seen an error."""

    def __init__(self, watcher: _Watcher) -> None:
        self._watcher = watcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: no trial is stopped by its results."""
        return False

    def stop_all(self) -> bool:
        """Return whether to end the search."""
        return self._watcher.error is not None


def _ignore() -> None:
    """Do nothing."""
