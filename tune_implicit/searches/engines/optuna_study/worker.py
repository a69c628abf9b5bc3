"""A search on Optuna: one worker of a study, in this process."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from tune_implicit.searches.borrowed import storage_of
from tune_implicit.searches.engines.base import Work
from tune_implicit.searches.engines.optuna_study.artifacts import turns_of
from tune_implicit.searches.engines.optuna_study.objective import ImplicitObjective, alone
from tune_implicit.searches.leases import LeaseLostError
from tune_implicit.searches.outcome import CHECKPOINT_ATTR
from tune_implicit.searches.queue import TrialQueue
from tune_implicit.searches.timeout import TrialTimeoutError, ended_after, reason_of

__all__ = ["OptunaEngine", "linked", "patterns_of"]

# Where a search saves its trials, in its folder.
FOLDER = "artifacts"

# Between two looks at trials that run elsewhere.
POLL_S = 0.5


def patterns_of(run: str) -> list[str]:
    """Return the patterns of the files that a run of a trial is saved to while it lasts, below the search's folder."""
    return [f"{FOLDER}/{turn}" for turn in turns_of(run)]


def linked(study: optuna.Study, trial: FrozenTrial) -> list[str]:
    """Return the files that a trial was saved to at its end, below the search's folder."""
    links = [link.artifact_id for link in get_all_artifact_meta(trial, storage=storage_of(study))]
    if CHECKPOINT_ATTR in trial.user_attrs:  # of versions before 0.6
        links.append(trial.user_attrs[CHECKPOINT_ATTR])
    return [f"{FOLDER}/{artifact}" for artifact in links]


@dataclass(frozen=True)
class OptunaEngine:
    """Run trials in this process, one after the other.

    Parameters
    ----------
    work : Work
        What the trials are made of.
    """

    work: Work

    def run(self, queue: TrialQueue, time_budget_s: float | None, on_trial_end: Callable[[], None]) -> None:
        """Run trials of ``queue`` until it is over; the one that runs when the time is over may finish."""
        work, start = self.work, time.monotonic()
        artifacts = work.folder / FOLDER
        artifacts.mkdir(exist_ok=True)
        objective = ImplicitObjective(
            work.problem,
            work.space,
            work.data,
            settings=work.settings,
            metric=work.metric,
            artifact_store=FileSystemArtifactStore(artifacts),
            initial_ul_state=work.initial_ul_state,
        )
        while not queue.over and (time_budget_s is None or time.monotonic() - start < time_budget_s):
            trial = queue.take()
            if trial is None:
                time.sleep(POLL_S)
            else:
                self._run_one(objective, queue, trial)
            on_trial_end()

    def _run_one(self, objective: ImplicitObjective, queue: TrialQueue, trial: optuna.Trial) -> None:
        work = self.work
        try:
            with alone(), ended_after(work.trial_timeout_s, lambda: self._end_hanging(queue, trial)):
                record, outcome = objective.run(
                    trial,
                    queue.leases,
                    flat=False,
                    extra=work.settings_of(trial.number),
                    others=work.saved,
                )
        except (LeaseLostError, UpdateFinishedTrialError):
            # Another worker has taken it over, and may have ended it.
            queue.leases.drop(trial)
        except TrialTimeoutError:
            self._end_hanging(queue, trial)
        except Exception as error:
            # Before it is written, or this error would count as one of those before.
            goes_on = work.failures.may_go_on(queue.study)
            failure = work.failures.keep(trial.number, error)
            if not goes_on:
                queue.give_back(trial, failure, type(error).__name__)
                raise
            queue.fail(trial, failure, type(error).__name__)
        except BaseException:  # Ctrl-C
            queue.give_back(trial)
            raise
        else:
            values = objective.values(record) if outcome.state is TrialState.COMPLETE else None
            queue.tell(trial, values, outcome.state)

    def _end_hanging(self, queue: TrialQueue, trial: optuna.Trial) -> None:
        queue.fail(trial, reason_of(self.work.trial_timeout_s or 0.0))
