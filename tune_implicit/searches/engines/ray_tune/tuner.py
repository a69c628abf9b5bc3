"""A whole search on Ray Tune: n trials of an ImplicitTrainable in one Tuner."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler

from tune_implicit.searches.borrowed import storage_of
from tune_implicit.searches.engines.base import Work
from tune_implicit.searches.engines.ray_tune.borrowed import completed_trials, raised_by, trials_of
from tune_implicit.searches.engines.ray_tune.cluster import connected, places, probe
from tune_implicit.searches.engines.ray_tune.folder import FOLDER, timeouts_in
from tune_implicit.searches.engines.ray_tune.searcher import ImplicitOptunaSearch
from tune_implicit.searches.engines.ray_tune.trainable import RESUME_FROM, ImplicitTrainable
from tune_implicit.searches.outcome import Outcome
from tune_implicit.searches.queue import TrialQueue
from tune_implicit.searches.quiet import quiet_ray
from tune_implicit.searches.timeout import reason_of
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
    address : str, optional
        Of a cluster to join.
    """

    work: Work
    scheduler: TrialScheduler | None = None
    max_concurrent_trials: int | None = None
    cpus_per_trial: float = 1
    gpus_per_trial: float = 0
    address: str | None = None

    def run(self, queue: TrialQueue, time_budget_s: float | None, on_trial_end: Callable[[], None]) -> None:
        """Run trials of ``queue`` until it is over; those that run when the time is over are put back.

        Raises
        ------
        InvalidValueError
            If a trial needs more than this machine has.
        Exception
            What a trial raised, if that ends the search: a mistake in the problem or the space.
        """
        searcher = _WorkSearch(self.work, queue)
        watcher = _Watcher(on_trial_end, searcher)
        asked = signal.getsignal(signal.SIGTERM)
        try:
            with quiet_ray(), connected(self.cpus_per_trial, self.gpus_per_trial, self.address), _own_ctrl_c():
                if asked is not None and threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, asked)  # `ray.init` has put its own there
                probe(self.work.folder)
                self._tuner(searcher, watcher, time_budget_s).fit()
        finally:
            searcher.give_back()
        if isinstance(watcher.error, RayTaskError):
            # As the trial raised it; the worker's traceback is what it comes from.
            raise watcher.error.cause from watcher.error
        if watcher.error is not None:
            raise watcher.error

    def _tuner(self, searcher: "_WorkSearch", watcher: "_Watcher", time_budget_s: float | None) -> tune.Tuner:
        work, cpus, gpus = self.work, self.cpus_per_trial, self.gpus_per_trial
        trainable = tune.with_parameters(
            ImplicitTrainable,
            problem=work.problem,
            data=work.data,
            metric=work.metric,
            mode=work.mode,
            initial_ul_state=work.initial_ul_state,
            trial_timeout_s=work.trial_timeout_s,
            timeouts=None if work.trial_timeout_s is None else timeouts_in(work.folder),
        )
        return tune.Tuner(
            tune.with_resources(trainable, {"cpu": cpus, "gpu": gpus}),
            param_space=dict(work.settings),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=self.scheduler,
                num_samples=-1,  # the queue knows when it is over
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
                # Schedulers that let a trial go on from another's need that one's last few.
                checkpoint_config=tune.CheckpointConfig(num_to_keep=3),
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


class _WorkSearch(ImplicitOptunaSearch):
    """The searcher of a search: it gives out the trials of a queue, and hears of errors from a watcher alone.

    Tune tells a searcher only that there was an error.
    """

    def __init__(self, work: Work, queue: TrialQueue) -> None:
        study = queue.study
        super().__init__(
            work.space,
            work.metric,
            work.mode,
            storage=storage_of(study),
            study_name=study.study_name,
            sampler=study.sampler,
        )
        self._work = work
        self._queue = queue

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the config of the trial ``trial_id``, its seed and the files that it may go on from included."""
        config = super().suggest(trial_id)
        if not isinstance(config, dict):
            return config
        trial = trials_of(self)[trial_id]
        files = [file for run in self.queue.leases.runs(trial) for file in self._work.saved(run)]
        resume = {RESUME_FROM: [str(file) for file in files]} if files else {}
        return {**self._work.settings_of(trial.number), **config, **resume}

    def on_trial_complete(self, trial_id: str, result: Record | None = None, error: bool = False) -> None:
        """Tell the study how the trial ended, unless by an error."""
        if not error:
            super().on_trial_complete(trial_id, result)

    def on_worker_lost(self, trial_id: str) -> None:
        """Tell the study that the trial failed."""
        super().on_trial_complete(trial_id, error=True)

    def _end_of(self, trial: optuna.Trial, result: Record | None, error: bool) -> Outcome:
        run = self.queue.leases.runs(trial)[-1]
        if error and (timeouts_in(self._work.folder) / run).exists():
            return Outcome(TrialState.FAIL, reason_of(self._work.trial_timeout_s or 0.0))
        return super()._end_of(trial, result, error)

    def on_error(self, trial_id: str, error: BaseException) -> bool:
        """Record what a trial raised, and return whether the search goes on."""
        trial = trials_of(self)[trial_id]
        goes_on = self._work.failures.may_go_on(self.study)
        failure = self._work.failures.keep(trial.number, error)
        completed_trials(self).add(trial_id)
        if goes_on:
            self.queue.fail(trial, failure, type(error).__name__)
        else:
            self.queue.give_back(trial, failure, type(error).__name__)
        return goes_on

    def goes_on(self) -> bool:
        """Return whether the search would go on after an error."""
        return self._work.failures.may_go_on(self.study)

    def give_back(self) -> None:
        """Put back the trials that have not ended."""
        for trial_id, trial in trials_of(self).items():
            if trial_id not in completed_trials(self):
                self.queue.give_back(trial)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: a search goes on by its study, in a new Tuner."""
        Path(checkpoint_path).touch()


class _Watcher(tune.Callback):  # type: ignore[misc]
    """Hear of each trial's end, and of the first error that a trial itself raised."""

    def __init__(self, on_trial_end: Callable[[], None], searcher: _WorkSearch) -> None:
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
        """Record the error or keep it, or pass on that the trial lost its worker too often."""
        raised = raised_by(trial)
        if raised is None:
            self._searcher.on_worker_lost(trial.trial_id)
        elif self.error is None and not self._searcher.on_error(trial.trial_id, _cause_of(raised)):
            self.error = raised
        self._on_trial_end()

    def on_trial_recover(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Keep the error of a trial, where that ends the search: starting the trial again would only repeat it."""
        raised = raised_by(trial)
        if raised is not None and self.error is None and not self._searcher.goes_on():
            self._searcher.on_error(trial.trial_id, _cause_of(raised))
            self.error = raised

    def is_lost(self, trial_id: str) -> bool:
        """Return whether another worker has taken a trial over."""
        return trial_id in self._searcher.lost

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks next to the trials; a listener on this process has no place there.
        return self.__dict__ | {"_on_trial_end": _ignore, "_searcher": None, "_warned": True, "error": None}


class _StopWhen(tune.Stopper):  # type: ignore[misc]
    """End the search once its watcher has seen an error."""

    def __init__(self, watcher: _Watcher) -> None:
        self._watcher = watcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether another worker has taken the trial over; no trial is stopped by its results."""
        return self._watcher.is_lost(trial_id)

    def stop_all(self) -> bool:
        """Return whether to end the search."""
        return self._watcher.error is not None


def _cause_of(error: Exception) -> BaseException:
    """Return what a trial raised in its worker, as it raised it."""
    return error.cause if isinstance(error, RayTaskError) else error


def _ignore() -> None:
    """Do nothing."""
