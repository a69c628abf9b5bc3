"""A whole search on Ray Tune: n trials of an ImplicitTrainable in one Tuner."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler

from tune_implicit.errors import InvalidValueError
from tune_implicit.searches.engines.ray_tune.searcher import ImplicitOptunaSearch
from tune_implicit.searches.engines.ray_tune.trainable import ImplicitTrainable
from tune_implicit.trials.problem import NO_SELECT_DATA
from tune_implicit.trials.record import Record
from tune_implicit.trials.trial import ProblemFactory

__all__ = ["PatientSearch", "TrialScheduler", "run_tuner"]

# How often a trial is started again after its worker or node died. What a trial itself raises ends the search.
MAX_WORKER_FAILURES = 3


def run_tuner(
    problem: ProblemFactory,
    searcher: "PatientSearch",
    *,
    data: Any,
    settings: Mapping[str, Any],
    n_trials: int,
    output: Path,
    time_budget_s: float | None,
    scheduler: TrialScheduler | None,
    max_concurrent_trials: int | None,
    cpus_per_trial: float,
    gpus_per_trial: float,
    on_trial_end: Callable[[], None],
) -> None:
    """Run ``n_trials`` trials on the Ray cluster at hand, or on one started for this call on this machine.

    Parameters are those of :func:`tune_implicit.search`. Tune's own files go to ``output``.

    Raises
    ------
    InvalidValueError
        If a trial needs more than this machine has.
    Exception
        What a trial raised, if one did: a mistake in the problem or the space.
    """
    watcher = _Watcher(on_trial_end, searcher)
    with _quiet(), _ray(cpus_per_trial, gpus_per_trial):
        trainable = tune.with_resources(
            tune.with_parameters(ImplicitTrainable, problem=problem, data=data, mode=searcher.mode),
            {"cpu": cpus_per_trial, "gpu": gpus_per_trial},
        )
        tuner = tune.Tuner(
            trainable,
            param_space=dict(settings),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=n_trials,
                metric=searcher.metric,
                mode=searcher.mode,
                time_budget_s=time_budget_s,
                max_concurrent_trials=max_concurrent_trials or _places(cpus_per_trial, gpus_per_trial),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=output.name,
                storage_path=str(output.parent.absolute()),
                callbacks=[watcher],
                stop=_StopWhen(watcher),
                failure_config=tune.FailureConfig(max_failures=MAX_WORKER_FAILURES),
                verbose=0,
            ),
        )
        tuner.fit()
    if isinstance(watcher.error, RayTaskError):
        # As the trial raised it; the worker's traceback is what it comes from.
        raise watcher.error.cause from watcher.error
    if watcher.error is not None:
        raise watcher.error


class PatientSearch(ImplicitOptunaSearch):
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

    def __init__(self, on_trial_end: Callable[[], None], searcher: PatientSearch) -> None:
        self._on_trial_end = on_trial_end
        self._searcher = searcher
        self._warned = False
        self.error: Exception | None = None

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Pass it on, and say once what the worker says where its output is hidden."""
        if (trial.last_result or {}).get("selected_on") == "validate_data" and not self._warned:
            warnings.warn(NO_SELECT_DATA, stacklevel=2)
            self._warned = True
        self._on_trial_end()

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Keep the error, or pass on that the trial lost its worker too often."""
        self._keep_error(trial)
        if self.error is None:
            self._searcher.on_worker_lost(trial.trial_id)
        self._on_trial_end()

    def on_trial_recover(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Keep the error: starting the trial again would only repeat it."""
        self._keep_error(trial)

    def _keep_error(self, trial: RayTrial) -> None:
        # Where Tune has just written it; `trial.get_pickled_error` looks where it is copied to some time later.
        file = trial.pickled_error_file
        error = None if file is None else cloudpickle.loads(Path(file).read_bytes())
        # A worker that cannot even begin, e.g. for a module it lacks, would fail the same way for every trial.
        raised = isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed)
        if raised and self.error is None:
            self.error = error

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks next to the trials; a listener on this process has no place there.
        return {"_on_trial_end": _ignore, "_searcher": None, "_warned": True, "error": None}


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


def _places(cpus_per_trial: float, gpus_per_trial: float) -> int:
    """Return how many trials fit into the cluster at once."""
    cluster = ray.cluster_resources()
    needs = (("CPU", cpus_per_trial), ("GPU", gpus_per_trial))
    return max(1, min(int(cluster.get(kind, 0) // need) for kind, need in needs if need > 0))


@contextmanager
def _ray(cpus_per_trial: float, gpus_per_trial: float) -> Iterator[None]:
    """Use the Ray that is there; where there is none, start one and shut it down afterwards.

    Raises
    ------
    InvalidValueError
        If a trial needs more than the machine of a Ray started here has.
    """
    if ray.is_initialized():
        yield
        return
    # Its workers can import what this process can, such as a module next to the script or the task file.
    with _environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        # A cluster may grow; this machine will not, and the search would wait for ever.
        has = ray.cluster_resources()
        for name, kind, needed in (("cpus", "CPU", cpus_per_trial), ("gpus", "GPU", gpus_per_trial)):
            if needed > has.get(kind, 0):
                raise InvalidValueError(
                    f"`{name}_per_trial` must be at most the {has.get(kind, 0):g} {kind} that Ray found on this "
                    f"machine, got {needed:g}. Ask for less, or connect to a cluster first, by ray.init(address=...)."
                )
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the terminal to the search's own progress, and its records to the checkpoints, which hold them all.

    Tune's tables go by ``verbose=0`` only in its old output, its loggers to CSV, JSON and TensorBoard by a variable.
    It logs a traceback for each failure, which this search raises, or records and survives; and Ray one for each that
    no one fetched, since the search had ended.
    """
    variables = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    }
    levels = {"ray.tune": logging.CRITICAL, "ray.tune.execution.insufficient_resources_manager": logging.WARNING}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with _environment(**variables):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
