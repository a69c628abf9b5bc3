"""Ray Tune: an ordinary class Trainable in an ordinary Tuner."""

import math
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

from ray import tune

from tune_implicit.trials.checkpoint import CHECKPOINT_FILE
from tune_implicit.trials.problem import NO_SELECT_DATA
from tune_implicit.trials.record import Record
from tune_implicit.trials.trial import TRIAL_FAILURES, ProblemFactory, Trial
from tune_implicit.trials.troubles import TroubleTeller

__all__ = ["ImplicitTrainable"]


class ImplicitTrainable(tune.Trainable):  # type: ignore[misc]
    """A trial with hypergradients; each ``step`` takes ``ul_steps_per_report`` ul steps and reports one record.

    Pass the problem's factory, and its data once for all workers, with ``tune.with_parameters``. For a search by a
    ``metric`` other than ``"select_loss"``, or with ``mode="max"``, pass that as well: by it a trial keeps its best
    report. The usual config is that of one trial: reserved settings and the user's own keys.

    The record's ``completed`` tells a finished trial from one that a scheduler stopped; Tune's ``done`` is set for
    both. The last record of a completed trial has the losses and metrics of the report that is kept; what it says of a
    trial that did not learn is a :class:`LearningWarning`, once of each kind. A trial that diverges or runs out of
    memory ends with a record that has a ``failure``, the reason, and infinitely bad metrics; it is not raised, so that
    ``max_failures`` does not repeat it and the worker is reused. Checkpoints hold the whole trial, its ul values and ll
    model included, and restore it exactly; a trial that loads another's, as in population-based training, keeps its own
    settings.

    Examples
    --------
    >>> trainable = tune.with_parameters(ImplicitTrainable, problem=problem, data=arrays)
    >>> tune.Tuner(trainable, param_space={"k": tune.choice([1, 5, 20])}).fit()
    """

    def setup(
        self,
        config: dict[str, Any],
        problem: ProblemFactory,
        data: Any = None,
        metric: str = "select_loss",
        mode: str = "min",
    ) -> None:
        """Keep what makes a trial."""
        # `tune.with_parameters` passes these to `setup` alone, and a reused actor sees only `reset_config`.
        self._problem = problem
        self._data = data
        self._metric, self._mode = metric, mode
        self._troubles = TroubleTeller()
        self._worst = math.inf if mode == "min" else -math.inf
        self._own_config = config

    @cached_property
    def _trial(self) -> Trial:
        # Built by the call that first needs it. A mistake then reaches the search as itself, where one in an actor's
        # constructor only kills the actor; and the trial before it is gone from memory.
        trial = Trial(self._problem, self._own_config, self._data, self._metric, self._mode)
        if trial.problem.selected_on != "select_data":
            warnings.warn(NO_SELECT_DATA, stacklevel=2)
        return trial

    def step(self) -> Record:
        """Advance the trial to its next report."""
        try:
            record = self._trial.advance()
            if self._trial.completed:
                record = self._trial.record
                self._troubles.tell(record)
            return record | {"done": self._trial.completed}
        except TRIAL_FAILURES as error:
            record = self._trial.failure_record(str(error))
            self._troubles.tell(record)
            return {name: self._worst if value == math.inf else value for name, value in record.items()} | {
                "done": True
            }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save the whole trial."""
        self._trial.save(Path(checkpoint_dir) / CHECKPOINT_FILE)

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on from a checkpoint, with this trial's own settings."""
        self._trial.load(Path(checkpoint) / CHECKPOINT_FILE)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Make this worker ready for the next trial, which shares nothing with the one before."""
        self.__dict__.pop("_trial", None)
        self._own_config = new_config
        return True
