"""n trials on a named backend, and their result, which stays on disk."""

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from torch import Tensor

from tune_implicit.errors import InvalidValueError, LearningWarning
from tune_implicit.searches.engines.base import Engine, Work
from tune_implicit.searches.engines.optuna_study import worker
from tune_implicit.searches.engines.optuna_study.worker import OptunaEngine
from tune_implicit.searches.engines.ray_tune import folder as ray_folder
from tune_implicit.searches.engines.ray_tune.folder import pattern_of
from tune_implicit.searches.failures import Failures
from tune_implicit.searches.leases import LEASE_S, Leases, lease_of
from tune_implicit.searches.ledger import Ledger, Progress
from tune_implicit.searches.outcome import RAY_TRIAL_ATTR, TROUBLES_ATTR
from tune_implicit.searches.queue import TrialQueue
from tune_implicit.searches.quiet import quiet_optuna
from tune_implicit.searches.results import SearchResult
from tune_implicit.searches.sampling import NumberedTPESampler
from tune_implicit.searches.signals import ending_in_order
from tune_implicit.searches.space import Space, check_space
from tune_implicit.searches.study import direction_of, open_study, queue_interrupted, search_seed
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
    on_error: str | None = None,
    trial_timeout_s: float | None = None,
    initial_ul_state: Mapping[str, Tensor] | None = None,
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
    scheduler: "Scheduler | None" = None,
    max_concurrent_trials: int | None = None,
    cpus_per_trial: float = 1,
    gpus_per_trial: float = 0,
    address: str | None = None,
    lease_s: float = LEASE_S,
    on_progress: Callable[[Progress], object] | None = None,
) -> SearchResult:
    """Run a search of ``n_trials`` trials, and return what it found.

    The study is the ledger of a search. Calls on one ``storage`` and ``output`` with ``resume=True``, in as many
    processes and machines as there are, at once or later, are its workers. Each trial that runs holds a lease in the
    study, which its worker renews; a trial whose worker has ended, or let the lease expire, goes on from its last save
    in whichever worker asks next, with the same params and reports, and ends in the same bits.

    A trial that fails with numbers (it diverged, or ran out of memory) is recorded and the search goes on; for other
    exceptions see ``on_error``. Ctrl-C ends the search without an exception: what finished is kept, what ran is put
    back, and the result says that it was interrupted. SIGTERM does the same, and then ends the process, by
    ``SystemExit``. Of trials that did not learn as they should have a
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
        object. By default a journal in the folder. One that cannot be reached is waited for, two minutes.
    resume : bool
        Continue the search in ``output``, or join it: its finished trials count, and those that were cut off go on.
    seed : int, optional
        What a trial draws, the default sampler's params and (unless settings or space say otherwise) its own ``seed``,
        comes from this and from the trial's number: a search that was cut off and resumed is the one that was not. By
        default a new one, which the study keeps.
    on_error : {"record", "raise"}, optional
        What an exception in a trial does: fail the trial, with the exception's text in the study and its traceback in
        the folder ``errors``, or end the search, which raises it. By default "raise" until a trial has completed, then
        "record". With "record" the third trial that raises before any has completed ends the search.
    trial_timeout_s : float, optional
        Seconds after which a trial that still runs is ended, as failed, e.g. one that hangs. Where it does not even
        notice, its worker is ended as well: Ray starts another, and a process on Optuna exits with code 124, so that
        whoever started it may start it again, with ``resume=True``.
    initial_ul_state : mapping of str to Tensor, optional
        The ul values that each trial starts from, such as ``load_search(folder).best.ul_state``.
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
    address : str, optional
        For the Ray backend; the cluster to join. Without it, without ``ray.init`` before and without the environment
        variable RAY_ADDRESS, the search starts a Ray of its own on this machine.
    lease_s : float, default 60
        Seconds without a sign of life of a worker after which others may take over its trial; those of a process known
        to have ended are taken over at once.
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
    SystemExit
        After SIGTERM, with what it has found in the folder.
    """
    _check(backend, n_trials, time_budget_s, trial_timeout_s, pruner, scheduler, (cpus_per_trial, gpus_per_trial))
    check_space(space)
    direction = direction_of(metric, mode)
    folder = Path(output or f"tune_implicit_results/{time.strftime('%Y-%m-%d_%H%M%S')}").expanduser()
    settings, failures = dict(settings or {}), Failures(on_error, folder)
    with quiet_optuna(), ending_in_order() as ended:
        study = open_study(folder, storage, resume, space, settings, direction, metric)
        queue_interrupted(study, space)
        drawn_by = search_seed(study, seed)
        study.sampler = sampler or NumberedTPESampler(drawn_by)
        study.pruner = pruner or optuna.pruners.NopPruner()
        made_of = (problem, space, data, settings, metric, mode, folder, drawn_by, failures)
        work = Work(*made_of, partial(_saved, folder), initial_ul_state, trial_timeout_s)
        saved_at = partial(_saved_at, study)
        ledger = Ledger(study, folder, work.settings_of, n_trials, time_budget_s, on_progress, saved_at)
        # A search that is killed leaves this one, and a report can be made of it.
        SearchResult.write(folder, ledger.summary(backend, metric, mode))
        missing = ledger.missing
        on_ray = (scheduler, max_concurrent_trials, cpus_per_trial, gpus_per_trial, address)
        if missing:
            engine = OptunaEngine(work) if backend == "optuna" else _ray_engine(work, *on_ray)
            _run(engine, study, n_trials, lease_s, time_budget_s, ledger)
        ledger.update()
    result = SearchResult.write(folder, ledger.summary(backend, metric, mode))
    if ended.by_signal is not None:
        raise SystemExit(128 + ended.by_signal)
    if missing:
        _tell_troubles(study, result)
    return result


def _run(
    engine: Engine, study: optuna.Study, n_trials: int, lease_s: float, time_budget_s: float | None, ledger: Ledger
) -> None:
    """Run the trials that are missing, until Ctrl-C."""
    try:
        with Leases(study, lease_s) as leases:
            engine.run(TrialQueue(study, n_trials, leases), time_budget_s, ledger.update)
    except KeyboardInterrupt:
        pass
    except BaseException:
        ledger.update()
        raise


def _ray_engine(work: Work, *on_ray: Any) -> Engine:
    from tune_implicit.searches.engines.ray_tune.tuner import RayEngine

    return RayEngine(work, *on_ray)


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


def _saved(folder: Path, run: str) -> list[Path]:
    """Return the files in which either engine has saved a run of a trial."""
    turns = [folder / pattern for pattern in worker.patterns_of(run)]
    return [path for path in turns if path.exists()] + ray_folder.saved(folder, run)


def _saved_at(study: optuna.Study, trial: FrozenTrial) -> list[str]:
    """Return the patterns of the files that a trial was saved to, by whichever engine has run it, the last one last."""
    lease = lease_of(trial)
    runs = list(lease.runs) if lease is not None else [trial.user_attrs.get(RAY_TRIAL_ATTR, "")]
    while_it_ran = [pattern for run in runs if run for pattern in (*worker.patterns_of(run), pattern_of(run))]
    return while_it_ran + worker.linked(study, trial)


def _check(
    backend: str,
    n_trials: int,
    time_budget_s: float | None,
    trial_timeout_s: float | None,
    pruner: BasePruner | None,
    scheduler: "Scheduler | None",
    per_trial: tuple[float, float],
) -> None:
    if backend not in BACKENDS:
        raise InvalidValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if n_trials < 1:
        raise InvalidValueError(f"`n_trials` must be 1 or more, got {n_trials}.")
    for name, seconds in (("time_budget_s", time_budget_s), ("trial_timeout_s", trial_timeout_s)):
        if seconds is not None and not seconds > 0:
            raise InvalidValueError(f"`{name}` must be positive, got {seconds}.")
    if not (min(per_trial) >= 0 and max(per_trial) > 0):
        cpus, gpus = per_trial
        raise InvalidValueError(
            f"`cpus_per_trial` and `gpus_per_trial` must be 0 or more, and one of them more, got {cpus:g} and {gpus:g}."
        )
    if backend == "ray" and pruner is not None:
        raise InvalidValueError('`pruner` is for backend="optuna": Ray Tune stops trials by a `scheduler`.')
    if backend == "optuna" and scheduler is not None:
        raise InvalidValueError('`scheduler` is for backend="ray": Optuna stops trials by a `pruner`.')
