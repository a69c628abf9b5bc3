"""n trials on a named backend, and their result, which stays on disk."""

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from tune_implicit.errors import InvalidValueError, LearningWarning
from tune_implicit.searches.engines import optuna_study
from tune_implicit.searches.engines.base import Engine, Work
from tune_implicit.searches.engines.optuna_study import OptunaEngine
from tune_implicit.searches.engines.ray_tune import folder as ray_folder
from tune_implicit.searches.ledger import Ledger, Progress
from tune_implicit.searches.outcome import TROUBLES_ATTR
from tune_implicit.searches.quiet import quiet_optuna
from tune_implicit.searches.results import SearchResult
from tune_implicit.searches.space import Space, check_space
from tune_implicit.searches.study import direction_of, end_running, open_study, queue_interrupted
from tune_implicit.trials.config import merged
from tune_implicit.trials.trial import ProblemFactory

if TYPE_CHECKING:
    from tune_implicit.searches.engines.ray_tune.tuner import Scheduler

__all__ = ["BACKENDS", "search"]

BACKENDS = ("ray", "optuna")


def search(
    problem: ProblemFactory,
    space: Space,
    *,
    data: Any = None,
    settings: Mapping[str, Any] | None = None,
    backend: str = "ray",
    n_trials: int = 50,
    metric: str = "select_loss",
    mode: str = "min",
    time_budget_s: float | None = None,
    output: str | Path | None = None,
    storage: str | BaseStorage | None = None,
    resume: bool = False,
    seed: int | None = None,
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
    scheduler: "Scheduler | None" = None,
    max_concurrent_trials: int | None = None,
    cpus_per_trial: float = 1,
    gpus_per_trial: float = 0,
    on_progress: Callable[[Progress], object] | None = None,
) -> SearchResult:
    """Run a search of ``n_trials`` trials, and return what it found.

    A trial that fails with numbers (it diverged, or ran out of memory) is recorded and the search goes on; any other
    exception of a trial ends the search and is raised. Ctrl-C ends it as well, without an exception: what finished is
    kept, and the result says that it was interrupted. Of trials that did not learn as they should have a
    :class:`LearningWarning` tells: once of each kind as they end, and of all of them at the end of the search.

    Parameters
    ----------
    problem : callable(config) or callable(config, data) -> BilevelProblem
        Called in the worker, once per trial.
    space : dict of Optuna distributions, or callable(trial) -> dict or None
        What is searched.
    data : object, optional
        The second argument of ``problem``; shipped to each Ray worker once.
    settings : mapping, optional
        Config keys that are the same in every trial, such as ``ul_steps``; the space overrides them.
    backend : {"ray", "optuna"}
        Ray Tune on all cores or the cluster at hand, or Optuna in this process, one trial after the other.
    n_trials : int
        Trials in all, those of a search that is resumed included.
    metric, mode : str
        What trials are compared by, and whether ``"min"`` or ``"max"`` of it is better. By it each trial keeps its best
        report.
    time_budget_s : float, optional
        Start no trial after so many seconds. Ray also ends those that run, Optuna lets the one that runs finish.
    output : path, optional
        A folder for everything the search writes; by default a new one under ``tune_implicit_results``.
    storage : str or BaseStorage, optional
        Where the Optuna study lies, which is named after the folder: a database URL, the path of a journal file or an
        object. By default a journal in the folder. One call at a time may run on a study.
    resume : bool
        Continue the search in ``output``: its finished trials count, and interrupted ones run again.
    seed : int, optional
        The seed of the default sampler and, unless settings or space say otherwise, of every trial.
    sampler : optuna sampler, optional
        TPE by default.
    pruner : optuna pruner, optional
        For the Optuna backend.
    scheduler : Ray Tune scheduler, optional
        For the Ray backend; without ``metric`` and ``mode`` of its own.
    max_concurrent_trials : int, optional
        For the Ray backend; as many as fit by default.
    cpus_per_trial, gpus_per_trial : float
        For the Ray backend; what a trial occupies, of which 0.5 is half a one.
    on_progress : callable(Progress), optional
        Called after each trial.

    Returns
    -------
    SearchResult

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If an argument is not as described, a trial finds its config or problem wrong, ``output`` already holds a
        search and ``resume`` is False, or the search to resume is another.
    StorageError
        If the storage cannot be opened.
    """
    _check(backend, n_trials, time_budget_s, pruner, scheduler, (cpus_per_trial, gpus_per_trial))
    check_space(space)
    direction = direction_of(metric, mode)
    folder = Path(output) if output is not None else Path("tune_implicit_results") / time.strftime("%Y-%m-%d_%H%M%S")
    settings = merged({} if seed is None else {"seed": seed}, settings or {})
    with quiet_optuna():
        study = open_study(folder, storage, resume, space, settings, direction, metric)
        queue_interrupted(study, space)
        # A resumed search must not propose its first trials again.
        study.sampler = sampler or TPESampler(seed=None if seed is None else seed + len(study.trials))
        study.pruner = pruner or optuna.pruners.NopPruner()
        ledger = Ledger(study, folder, settings, n_trials, time_budget_s, on_progress, _saved_at)
        work = Work(problem, space, data, settings, metric, mode, folder)
        # A search that is killed leaves this one, and a report can be made of it.
        SearchResult.write(folder, ledger.summary(backend, metric, mode))
        missing = ledger.missing
        try:
            if missing:
                engine: Engine = OptunaEngine(work)
                if backend == "ray":
                    from tune_implicit.searches.engines.ray_tune.tuner import RayEngine

                    engine = RayEngine(work, scheduler, max_concurrent_trials, cpus_per_trial, gpus_per_trial)
                engine.run(study, missing, time_budget_s, ledger.update)
        except KeyboardInterrupt:
            pass
        finally:
            end_running(study)
            ledger.update()
    result = SearchResult.write(folder, ledger.summary(backend, metric, mode))
    if missing:
        _tell_troubles(study, result)
    return result


def _tell_troubles(study: optuna.Study, result: SearchResult) -> None:
    """Say which trials did not learn, in the study and by a warning."""
    study.set_user_attr(TROUBLES_ATTR, result.troubles)
    if result.troubles:
        trials = sorted({number for numbers in result.troubles.values() for number in numbers})
        told = "; ".join(f"{name}: {', '.join(map(str, numbers))}" for name, numbers in result.troubles.items())
        warnings.warn(
            f"{len(trials)} of {len(result.trials)} trials did not learn as they should ({told}). What was seen, and "
            "which setting to change, is in `troubles` of each trial, and in the report.",
            LearningWarning,
            stacklevel=3,
        )


def _saved_at(trial: FrozenTrial) -> str | None:
    """Return where a trial was saved, by whichever engine has run it."""
    return optuna_study.saved_at(trial) or ray_folder.saved_at(trial)


def _check(
    backend: str,
    n_trials: int,
    time_budget_s: float | None,
    pruner: BasePruner | None,
    scheduler: "Scheduler | None",
    per_trial: tuple[float, float],
) -> None:
    if backend not in BACKENDS:
        raise InvalidValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if n_trials < 1:
        raise InvalidValueError(f"`n_trials` must be 1 or more, got {n_trials}.")
    if time_budget_s is not None and not time_budget_s > 0:
        raise InvalidValueError(f"`time_budget_s` must be positive, got {time_budget_s}.")
    if not (min(per_trial) >= 0 and max(per_trial) > 0):
        cpus, gpus = per_trial
        raise InvalidValueError(
            f"`cpus_per_trial` and `gpus_per_trial` must be 0 or more, and one of them more, got {cpus:g} and {gpus:g}."
        )
    if backend == "ray" and pruner is not None:
        raise InvalidValueError('`pruner` is for backend="optuna": Ray Tune stops trials by a `scheduler`.')
    if backend == "optuna" and scheduler is not None:
        raise InvalidValueError('`scheduler` is for backend="ray": Optuna stops trials by a `pruner`.')
