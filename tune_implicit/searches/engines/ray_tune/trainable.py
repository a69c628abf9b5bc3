"""Ray Tune: an ordinary class Trainable in an ordinary Tuner."""

import math
import os
import threading
import time
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

from ray import tune

from tune_implicit.errors import StorageError
from tune_implicit.searches.engines.ray_tune.borrowed import REPEAT, SAVE_NOW
from tune_implicit.searches.timeout import EXIT_CODE, reason_of
from tune_implicit.trials.checkpoint import CHECKPOINT_FILE, read_newest
from tune_implicit.trials.problem import NO_SELECT_DATA
from tune_implicit.trials.record import Record
from tune_implicit.trials.saving import SaveClock
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.trial import TRIAL_FAILURES, ProblemFactory, Trial
from tune_implicit.trials.troubles import TroubleTeller

__all__ = ["RESUME_FROM", "ImplicitTrainable"]

# The key of a config under which a search names the files that a trial may go on from.
RESUME_FROM = "__resume_from__"


class ImplicitTrainable(tune.Trainable):  # type: ignore[misc]
    """A trial with hypergradients; each ``step`` takes ``ul_steps_per_report`` ul steps and reports one record.

    Pass the problem's factory, and its data once for all workers, with ``tune.with_parameters``. For a search by a
    ``metric`` other than ``"select_loss"``, or with ``mode="max"``, pass that as well: by it a trial keeps its best
    report. The usual config is that of one trial: reserved settings and the user's own keys. Of a config that Ray's
    ``Repeater`` repeats, the repeat ``i``, counted from 0, runs with the config's ``seed`` plus ``i``, whoever has
    chosen the seed: with the same one it would only be the same trial again.

    While a trial runs, it asks Tune to save it every ``save_every_s`` seconds, more rarely where that would take over
    2 % of its time, and never if that is ``math.inf``. Tune keeps every checkpoint unless told how many
    (``CheckpointConfig(num_to_keep=...)``). ``initial_ul_state`` is what the ul model starts from, as its
    ``state_dict``.

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
        save_every_s: float = 30.0,
        initial_ul_state: Any = None,
        trial_timeout_s: float | None = None,
        timeouts: Path | None = None,
    ) -> None:
        """Keep what makes a trial."""
        # `tune.with_parameters` passes these to `setup` alone, and a reused actor sees only `reset_config`.
        self._problem = problem
        self._data = data
        self._metric, self._mode = metric, mode
        self._save_every_s = save_every_s
        self._timeout_s, self._timeouts = trial_timeout_s, timeouts
        self._timer: threading.Timer | None = None
        self._initial_ul_state = initial_ul_state
        self._troubles = TroubleTeller()
        self._worst = math.inf if mode == "min" else -math.inf
        self._own_config = config

    @cached_property
    def _trial(self) -> Trial:
        # Built by the call that first needs it. A mistake then reaches the search as itself, where one in an actor's
        # constructor only kills the actor; and the trial before it is gone from memory.
        if self._timeout_s is not None:
            self._timer = threading.Timer(self._timeout_s, self._end)
            self._timer.daemon = True
            self._timer.start()
        config = dict(_of_one_repeat(self._own_config))
        saved = config.pop(RESUME_FROM, ())
        trial = Trial(
            self._problem, config, self._data, self._metric, self._mode, initial_ul_state=self._initial_ul_state
        )
        if trial.problem.selected_on != "select_data":
            warnings.warn(NO_SELECT_DATA, stacklevel=2)
        if newest := read_newest(Path(file) for file in saved):
            trial.load(newest[0])
        return trial

    def _end(self) -> None:
        """End this worker, whose trial takes too long, and leave word of it to the one that Tune starts instead."""
        if self._timeouts is not None:
            self._timeouts.mkdir(parents=True, exist_ok=True)
            (self._timeouts / self.trial_id).touch()
        os._exit(EXIT_CODE)

    def _was_ended(self) -> bool:
        return self._timeouts is not None and (self._timeouts / self.trial_id).exists()

    def cleanup(self) -> None:
        """Let the trial take its time: it has ended, or another comes."""
        if self._timer is not None:
            self._timer.cancel()

    @cached_property
    def _saves(self) -> SaveClock:
        return SaveClock(self._save_every_s)

    def step(self) -> Record:
        """Advance the trial to its next report; of one that is completed, return the last record again."""
        if self._was_ended():
            reason = reason_of(self._timeout_s or 0.0)
            return {self._metric: self._worst, "ul_step": 0, "completed": False, "failure": reason, "done": True}
        saves = self._saves
        try:
            record = self._trial.advance()
            if self._trial.completed:
                self.cleanup()
                record = self._trial.record
                self._troubles.tell(record)
            elif saves.due():
                record = record | {SAVE_NOW: True}
            return record | {"done": self._trial.completed}
        except TRIAL_FAILURES as error:
            self.cleanup()
            record = self._trial.failure_record(str(error))
            self._troubles.tell(record)
            return {name: self._worst if value == math.inf else value for name, value in record.items()} | {
                "done": True
            }

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Save the whole trial to where Tune keeps its checkpoints.

        Raises
        ------
        StorageError
            If it cannot be written, to ``checkpoint_dir`` or to the Tuner's ``storage_path``.
        """
        began = time.monotonic()
        try:
            saved = super().save(checkpoint_dir)
        except StorageError:
            raise
        except OSError as error:  # it is written, but not copied to where Tune keeps it
            raise StorageError(_not_written("where its Tuner keeps them", error)) from error
        # With the copying, which may take longer than the writing.
        self._saves.saved(time.monotonic() - began)
        return saved

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the whole trial to a folder.

        Raises
        ------
        StorageError
            If it cannot be written there.
        """
        try:
            self._trial.save(Path(checkpoint_dir) / CHECKPOINT_FILE)
        except OSError as error:
            raise StorageError(_not_written(repr(checkpoint_dir), error)) from error

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on from a checkpoint, with this trial's own settings."""
        self._trial.load(Path(checkpoint) / CHECKPOINT_FILE)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Make this worker ready for the next trial, which shares nothing with the one before."""
        self.cleanup()
        self.__dict__.pop("_trial", None)
        self.__dict__.pop("_saves", None)
        self._own_config = new_config
        return True


def _of_one_repeat(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the key that the Repeater has added to it, if it has, and with a seed of its own."""
    if REPEAT not in config:
        return config
    own = {name: value for name, value in config.items() if name != REPEAT}
    return own | {"seed": ImplicitSettings.from_config(own).seed + config[REPEAT]}


def _not_written(where: str, error: OSError) -> str:
    return (
        f"The trial's checkpoint cannot be written to {where}: {error}. Free space there, or take another disk: for "
        "the first copy by the environment variable TMPDIR, for what is kept by the Tuner's `storage_path`, the "
        "`output` of a search. What finished before is kept."
    )
