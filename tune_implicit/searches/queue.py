"""Which trial a worker runs next, of a study that several may share; and how it is told of its end."""

from collections.abc import Sequence
from contextlib import suppress

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from tune_implicit.searches.borrowed import put_back, running_trial, stored
from tune_implicit.searches.leases import LEASE_ATTR, LeaseLostError, Leases, Watch, lease_of, put_back_abandoned
from tune_implicit.searches.outcome import Outcome, is_interrupted, write_failure

__all__ = ["TrialQueue"]


class TrialQueue:
    """The trials of a search, as one of its workers sees them.

    It gives out those that were put back first, such as trials of a worker that died, and new ones until there are as
    many as asked for, those that run elsewhere included. Two workers that ask at the same moment may begin one more.

    Parameters
    ----------
    study : optuna.Study
        The ledger of the search.
    n_trials : int, optional
        Trials in all; without it there is always another.
    leases : Leases
        Those of this worker.
    """

    def __init__(self, study: optuna.Study, n_trials: int | None, leases: Leases) -> None:
        self.study = study
        self.leases = leases
        self._n_trials = n_trials
        self._watch = Watch()
        self._exhausted = False

    @property
    def over(self) -> bool:
        """Whether as many trials have finished as were asked for, or the sampler has no more to propose."""
        finished = sum(has_ended(trial) for trial in self.study.get_trials(deepcopy=False))
        return self._exhausted or (self._n_trials is not None and finished >= self._n_trials)

    def take(self, run: str | None = None) -> optuna.Trial | None:
        """Return the next trial, held by this worker; ``None`` while others run all that are missing.

        Parameters
        ----------
        run : str, optional
            The name that it will be saved under; by default that of its earlier runs, or a new one.
        """
        trials = self.study.get_trials(deepcopy=False)
        if abandoned := self._watch.abandoned(trials):
            put_back_abandoned(self.study, abandoned)
            trials = self.study.get_trials(deepcopy=False)
        taken = sum(has_ended(trial) or trial.state is TrialState.RUNNING for trial in trials)
        if self._exhausted or (self._n_trials is not None and taken >= self._n_trials):
            return None
        if not any(trial.state is TrialState.WAITING for trial in trials):
            return self._begin(run)
        trial = self.study.ask()
        earlier = lease_of(stored(self.study, trial))
        runs = [*(earlier.runs if earlier is not None else ()), *([run] if run is not None else [])]
        try:
            self.leases.take(trial, self.leases.new(*dict.fromkeys(runs)))
        except UpdateFinishedTrialError:  # this worker was stopped here, and another has ended the trial since
            return None
        return trial

    def _begin(self, run: str | None) -> optuna.Trial | None:
        """Return a new trial, which comes into its study with its lease, in one write.

        ``None`` where another worker has it by now, as this one was stopped past the lease before it could look.
        """
        lease = self.leases.new(*([] if run is None else [run]))
        self.study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={LEASE_ATTR: lease.plain}))
        running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        begun = next((trial for trial in running if lease_of(trial) == lease), None)
        if begun is None:
            return None
        trial = running_trial(self.study, begun)
        self.leases.hold(trial, lease)
        return trial

    def tell(self, trial: optuna.Trial, values: float | Sequence[float] | None, state: TrialState) -> None:
        """Tell the study how a trial ended that this worker holds; what another has taken over is left to that one.

        Raises
        ------
        RuntimeError
            Where the study does not take it.
        """
        try:
            self.leases.check(trial, surely=True)
            self.study.tell(trial, values, state=state)
        except (LeaseLostError, UpdateFinishedTrialError):
            pass
        except RuntimeError:
            # A sampler with no more to propose, such as GridSampler, stops the study, which Optuna allows inside
            # `optimize` alone; by then the trial is told.
            if not stored(self.study, trial).state.is_finished():
                raise
            self._exhausted = True
        finally:
            self.leases.drop(trial)

    def holds(self, trial: optuna.Trial) -> bool:
        """Return whether this worker has ``trial``, surely."""
        try:
            self.leases.check(trial, surely=True)
        except LeaseLostError:
            return False
        return True

    def fail(self, trial: optuna.Trial, failure: str, error: str | None = None) -> None:
        """Tell the study that a trial failed, and why; ``error`` is the type of the exception, where it raised one."""
        if self.holds(trial):
            with suppress(UpdateFinishedTrialError):
                write_failure(trial, Outcome(TrialState.FAIL, failure, error))
            self.tell(trial, None, TrialState.FAIL)

    def give_back(self, trial: optuna.Trial, failure: str | None = None, error: str | None = None) -> None:
        """Put a trial back that this worker will not end, for whichever takes it up; and say why, if there is a why."""
        try:
            self.leases.check(trial, surely=True)
            if failure is not None:
                write_failure(trial, Outcome(TrialState.FAIL, failure, error))
            put_back(self.study, trial)
        except (LeaseLostError, UpdateFinishedTrialError):
            pass
        finally:
            self.leases.drop(trial)


def has_ended(trial: FrozenTrial) -> bool:
    """Return whether a trial has come to an end that counts."""
    return trial.state.is_finished() and not is_interrupted(trial)
